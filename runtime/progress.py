"""Progress of a running stage: a line every few seconds, and Ray metrics for dashboards."""

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayActorError
from ray.util import metrics
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from runtime.lease import SUBMISSION

log = logging.getLogger("ip2p")

SECONDS_BETWEEN_LINES = 5.0

Counts = Mapping[str, float]


class StageCounters:
    """The counters of one stage, incremented by all its workers. They can be sent to workers.

    Each count is exported as the Ray metric `ip2p_<stage>_<name>`, and "rejected: <reason>" as
    `ip2p_<stage>_rejected` with the reason as a tag.
    """

    def __init__(self, stage: str):
        self.stage = stage
        # On the driver's node: counters on a worker's node would be lost with it.
        options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": on_this_node()}
        self._counters = ray.remote(**options)(_Counters).remote()

    def add(self, counts: Counts) -> None:
        """Add to the counters, from any process, without waiting.

        A batch that Ray runs again is counted again: the counters are for watching.
        """
        self._counters.add.remote(dict(counts))
        for name, count in counts.items():
            what, _, reason = name.partition(": ")
            tags = {"reason": reason} if reason else {}
            if count > 0:
                _metric(f"ip2p_{self.stage}_{what}", tuple(tags)).inc(count, tags)

    def read(self) -> Counter[str]:
        """Return all counts. Raises `RayActorError` when the counters' node is lost."""
        return ray.get(self._counters.read.remote())

    @contextmanager
    def shown(self, line: Callable[[Counter[str], float], str]) -> Iterator[None]:
        """Inside, print `line(counts, seconds)` every few seconds when a count has changed.

        Both are counted from the start of the block.
        """
        stop, started, before = threading.Event(), time.monotonic(), self.read()

        def watch() -> None:
            printed: Counter[str] = Counter()
            while not stop.wait(SECONDS_BETWEEN_LINES):
                try:
                    counts = self.read() - before
                except RayActorError:
                    print(f"{self.stage}: the counters are lost; the rest runs unseen", flush=True)
                    return
                if counts != printed:
                    print(f"{self.stage}: {line(counts, time.monotonic() - started)}", flush=True)
                    printed = counts

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            stop.set()
            watcher.join()


class _Counters:
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, counts: Counts) -> None:
        self.counts.update(counts)  # pyright: ignore[reportCallIssue, reportArgumentType]

    def read(self) -> Counter[str]:
        return self.counts


class WithCounters:
    """A callable class for Ray Data that counts what `of(*arguments)` gives and logs failed rows.

    Like the callable inside, it maps a batch to one table or to tables in turn.
    """

    def __init__(
        self,
        of: type,
        arguments: tuple,
        counters: StageCounters,
        count: Callable[[pa.Table], Counts],
    ):
        self.inner, self.counters, self.count = of(*arguments), counters, count

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for table in tables(self.inner(batch)):
            self.counters.add(self.count(table))
            if {"status", "reason", "caption_id"} <= set(table.column_names):
                log_failures(table, self.counters.stage)
            yield table


def log_failures(rows: pa.Table, stage: str) -> None:
    """Write a log record for each row whose `status` is failed."""
    where = {"job": os.environ.get(SUBMISSION), "stage": stage}
    for row in rows.select(["status", "reason", "caption_id"]).to_pylist():
        if row["status"] == "failed":
            log.warning("failed: %s", row["reason"], extra=where | {"caption_id": row["caption_id"]})


def tables(result: pa.Table | Iterable[pa.Table]) -> Iterable[pa.Table]:
    """Return what a callable gave for a batch, one table or several, as several."""
    return [result] if isinstance(result, pa.Table) else result


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Return the strategy for actors that must outlive the nodes of the driver's workers."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)


def time_left(done: float, total: float, seconds: float) -> str:
    """Format the time left at the rate so far: `4:05 left`."""
    if not done:
        return "? left"
    minutes, rest = divmod(round(seconds * (total - done) / done), 60)
    return f"{minutes}:{rest:02d} left"


def set_gauges(stage: str, values: Mapping[str, float]) -> None:
    """Set the Ray metrics `ip2p_<stage>_<name>`."""
    for name, value in values.items():
        _gauge(f"ip2p_{stage}_{name}").set(float(value))


@cache
def _gauge(name: str) -> metrics.Gauge:
    return metrics.Gauge(name, description="see runtime/progress.py")


@cache
def _metric(name: str, tag_keys: tuple[str, ...]) -> metrics.Counter:
    return metrics.Counter(name, description="see runtime/progress.py", tag_keys=tag_keys)
