"""What a running stage has done so far: one line now and then for who watches, Ray metrics for who monitors."""

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import pyarrow as pa
import ray
from ray.util import metrics

from runtime.lease import SUBMISSION

log = logging.getLogger("ip2p")

SECONDS_BETWEEN_LINES = 5.0

Counts = Mapping[str, float]


class Tally:
    """Counts of one stage from all its workers; it can be sent to them.

    Each count is exported as the Ray metric `ip2p_<stage>_<name>`; "rejected: <reason>" as `ip2p_<stage>_rejected` with
    the reason as a tag.
    """

    def __init__(self, stage: str):
        self.stage = stage
        self._board = ray.remote(num_cpus=0)(_Board).remote()

    def add(self, counts: Counts) -> None:
        """From any process, without waiting. A batch that Ray runs again is counted again: these are for watching."""
        self._board.add.remote(dict(counts))
        for name, count in counts.items():
            what, _, reason = name.partition(": ")
            tags = {"reason": reason} if reason else {}
            if count > 0:
                _metric(f"ip2p_{self.stage}_{what}", tuple(tags)).inc(count, tags)

    def read(self) -> Counter[str]:
        return ray.get(self._board.read.remote())

    @contextmanager
    def shown(self, line: Callable[[Counter[str], float], str]) -> Iterator[None]:
        """Inside, print `line(counts, seconds since the start)` now and then, when anything has changed."""
        stop, started = threading.Event(), time.monotonic()

        def watch() -> None:
            said: Counter[str] = Counter()
            while not stop.wait(SECONDS_BETWEEN_LINES):
                counts = self.read()
                if counts != said:
                    print(f"{self.stage}: {line(counts, time.monotonic() - started)}", flush=True)
                    said = counts

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            stop.set()
            watcher.join()


class _Board:
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, counts: Counts) -> None:
        self.counts.update(counts)  # pyright: ignore[reportCallIssue, reportArgumentType]

    def read(self) -> Counter[str]:
        return self.counts


class Counted:
    """A callable class for Ray Data: `of(*arguments)`, whose batches are counted, and whose failed rows are logged."""

    def __init__(self, of: type, arguments: tuple, tally: Tally, count: Callable[[Any], Counts]):
        self.inner, self.tally, self.count = of(*arguments), tally, count

    def __call__(self, batch: Any) -> Any:
        result = self.inner(batch)
        self.tally.add(self.count(result))
        if isinstance(result, pa.Table) and {"status", "reason", "caption_id"} <= set(result.column_names):
            log_failures(result, self.tally.stage)
        return result


def log_failures(rows: pa.Table, stage: str) -> None:
    """Write a log record for each row whose `status` is failed."""
    for row in rows.select(["status", "reason", "caption_id"]).to_pylist():
        if row["status"] == "failed":
            where = {"job": os.environ.get(SUBMISSION), "stage": stage}
            log.warning("failed: %s", row["reason"], extra=where | {"caption_id": row["caption_id"]})


def time_left(done: float, total: float, seconds: float) -> str:
    """`4:05 left`, at the rate so far."""
    if not done:
        return "? left"
    minutes, rest = divmod(round(seconds * (total - done) / done), 60)
    return f"{minutes}:{rest:02d} left"


def show(stage: str, values: Mapping[str, float]) -> None:
    """Export what is as it is now, as the Ray metrics `ip2p_<stage>_<name>`."""
    for name, value in values.items():
        _gauge(f"ip2p_{stage}_{name}").set(float(value))


@cache
def _gauge(name: str) -> metrics.Gauge:
    return metrics.Gauge(name, description="see runtime/progress.py")


@cache
def _metric(name: str, tag_keys: tuple[str, ...]) -> metrics.Counter:
    return metrics.Counter(name, description="see runtime/progress.py", tag_keys=tag_keys)
