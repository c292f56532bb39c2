"""Rows that kill their worker: tried again a few times, then failed with the reason, and the job goes on.

A crash in native code or the kernel's out-of-memory killer ends the process, so nobody in it can tell which row it was.
An actor elsewhere remembers what was begun and not finished.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

DEATHS = 2  # of a worker that had this row alone, after which the row is not tried again


class Guarded:
    """A callable class for Ray Data, `of(*arguments)`, of tables; a row that keeps killing its worker is `failed`.

    A batch during which a worker died comes again and is then taken row by row. That takes as many retries as Ray Data
    grants by default, without end: calls that a lost node refuses, before Ray knows that it is lost, are counted too.
    """

    def __init__(self, of: type, arguments: tuple, ledger: "Ledger", fail: Callable[[pa.Table, str], pa.Table]):
        self.inner, self.ledger, self.fail = of(*arguments), ledger, fail

    def __call__(self, rows: pa.Table) -> pa.Table:
        ids = rows["caption_id"].to_pylist()
        if self.ledger.begin(ids):
            result = pa.concat_tables([self._alone(rows.slice(n, 1), id_) for n, id_ in enumerate(ids)])
        else:
            result = self.inner(rows)
        self.ledger.end(ids)
        return result

    def _alone(self, row: pa.Table, id_: str) -> pa.Table:
        deaths = self.ledger.begin([id_, "alone"])
        if deaths >= DEATHS:
            return self.fail(row, f"killed its worker {deaths + 1} times")
        result = self.inner(row)
        self.ledger.end([id_, "alone"])
        return result


class Ledger:
    """What was begun and not finished, kept on the driver's node: it outlives the workers and their nodes."""

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here}
        self._book = ray.remote(**options)(_Book).remote()

    def begin(self, what: Sequence[str]) -> int:
        """Note that `what` begins; returns how often it has begun before without an end."""
        return ray.get(self._book.begin.remote(tuple(what)))

    def end(self, what: Sequence[str]) -> None:
        self._book.end.remote(tuple(what))


class _Book:
    def __init__(self) -> None:
        self.begun: Counter[Any] = Counter()

    def begin(self, what: tuple[str, ...]) -> int:
        self.begun[what] += 1
        return self.begun[what] - 1

    def end(self, what: tuple[str, ...]) -> None:
        del self.begun[what]
