"""Rows that kill their worker, and GPUs that break: tried again a few times, and the job continues.

A crash in native code or the kernel's out-of-memory killer ends the process, so no code in it can
tell which row it was. A ledger outside remembers what was started and not finished.

| what happens | what follows |
|---|---|
| a worker dies with a batch | Ray restarts it; the batch comes again and is taken row by row |
| it dies with a row alone, DEATHS times | the row is `failed` with the reason |
| its GPU breaks | the process exits, since nothing works in it any more; the batch comes again |
| a row alone breaks a second GPU | the row is `failed` with the reason |
| a GPU breaks BREAKS times | an actor holds it for the rest of the run, and its worker leaves |

The batches of a worker that has left count as lost blocks (`runtime.rows.chain`): the next pass
asks for their rows again. When no other worker is left, the device's error ends the job.
"""

import logging
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import pyarrow as pa
import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ip2p.errors import DeviceError
from runtime.progress import on_this_node, tables

log = logging.getLogger("ip2p")

DEATHS = 2  # of a worker that had this row alone, after which the row is not tried again
BREAKS = 3  # of a GPU, after which it gets no more work
PATIENCE = 10.0  # seconds for which a healthy GPU may be held beside a broken one
DEVICES = 2  # that a row alone has broken, after which the row is not tried again

Device = tuple[str, str]  # id of a node, id of a GPU there


class CrashGuard:
    """A callable class for Ray Data around `of(*arguments)`, which maps a table to tables in turn.

    A row that keeps killing its worker or breaking GPUs becomes `fail(row, reason)`.
    Restarts take as many retries as Ray Data grants by default, without end: calls that a lost node
    refuses, before Ray knows that it is lost, are counted too.
    """

    def __init__(
        self,
        of: type,
        arguments: tuple,
        ledger: "CrashLedger",
        fail: Callable[[pa.Table, str], pa.Table],
    ):
        self.ledger, self.fail = ledger, fail
        if self.ledger.is_held(_device()):
            self._exit(for_good=True)  # on its way to its holder the GPU was lent once more
        try:
            self.inner = of(*arguments)
        except DeviceError as error:
            self._leave(error, alone=None)
        self.ledger.join(_actor_id())

    def __call__(self, rows: pa.Table) -> Iterator[pa.Table]:
        ids = rows["caption_id"].to_pylist()
        if self.ledger.begin(ids):
            for n, id_ in enumerate(ids):
                yield from self._alone(rows.slice(n, 1), id_)
        else:
            yield from self._run(rows)
        self.ledger.end(ids)

    def _alone(self, row: pa.Table, id_: str) -> Iterator[pa.Table]:
        if reason := self.ledger.begin_alone(id_):
            yield self.fail(row, reason)
            return
        yield from self._run(row, alone=id_)
        self.ledger.end_alone(id_)

    def _run(self, rows: pa.Table, alone: str | None = None) -> Iterator[pa.Table]:
        try:
            yield from tables(self.inner(rows))
        except DeviceError as error:
            self._leave(error, alone)

    def _leave(self, error: DeviceError, alone: str | None) -> NoReturn:
        """End this process, for now or for good.

        Raises `error` when no other worker is left, or when this one has no GPU of Ray's.
        """
        device = _device()
        if device is None:
            raise error
        breaks, others = self.ledger.note_break(device, str(error), alone, _actor_id())
        node, gpu = device
        held = breaks >= BREAKS
        what = "it gets no more work" if held else "the process restarts and tries the batch again"
        count = f"{breaks} of {BREAKS}"
        log.error("GPU %s of node %s broke (%s): %s: %s", gpu, node, count, error, what)
        if held and not others:
            raise error
        self._exit(for_good=held)

    def _exit(self, for_good: bool) -> NoReturn:
        """End this process; Ray restarts it unless it is `for_good`.

        A worker that has never been ready holds no batch, and Ray Data takes its end for good as an
        error: it is restarted in any case, on another GPU, or waits for one.
        """
        if for_good and self.ledger.has_joined(_actor_id()):
            ray.kill(ray.get_runtime_context().current_actor)
            while True:
                time.sleep(1)
        os._exit(1)


def _device() -> Device | None:
    """Return the GPU that Ray has lent to this process, if any."""
    gpus = ray.get_gpu_ids()
    return (ray.get_runtime_context().get_node_id(), str(gpus[0])) if gpus else None


def _actor_id() -> str:
    return ray.get_runtime_context().get_actor_id() or ""


class CrashLedger:
    """What was started and not finished, and which GPUs broke, kept on the driver's node.

    It outlives the workers and their nodes. When the driver's last handle is gone it ends and gives
    its GPUs back.
    """

    def __init__(self) -> None:
        # Ray's memory monitor may kill this actor, too. Its counts start over then, and the job continues.
        options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": on_this_node()}
        options |= {"max_restarts": -1, "max_task_retries": -1}
        self._ledger = ray.remote(**options)(_Ledger).remote()

    def start_pass(self) -> None:
        """Note that the workers of the pass before are gone."""
        ray.get(self._ledger.start_pass.remote())

    def join(self, worker: str) -> None:
        """Note that `worker` is ready for batches."""
        ray.get(self._ledger.join.remote(worker))

    def has_joined(self, worker: str) -> bool:
        """Whether `worker` has been ready for batches, in this process or in one before."""
        return ray.get(self._ledger.has_joined.remote(worker))

    def is_held(self, device: Device | None) -> bool:
        """Whether `device` may get no more work."""
        return ray.get(self._ledger.is_held.remote(device))

    def begin(self, ids: Sequence[str]) -> int:
        """Note that a batch begins; return how often it has begun before without an end."""
        return ray.get(self._ledger.begin.remote(tuple(ids)))

    def end(self, ids: Sequence[str]) -> None:
        """Note that a batch is done."""
        self._ledger.end.remote(tuple(ids))

    def begin_alone(self, id_: str) -> str:
        """Note that a row begins alone. Return "", or the reason why it must not be tried again."""
        return ray.get(self._ledger.begin_alone.remote(id_))

    def end_alone(self, id_: str) -> None:
        """Note that a row alone is done."""
        self._ledger.end.remote(id_)

    def note_break(
        self,
        device: Device,
        error: str,
        alone: str | None,
        worker: str,
    ) -> tuple[int, int]:
        """Note that `device` broke under `worker`; return its breaks and how many others work.

        A device that has broken BREAKS times is held for the rest of the run.
        """
        return ray.get(self._ledger.note_break.remote(device, error, alone, worker))


class _Ledger:
    def __init__(self) -> None:
        self.begun: Counter[Any] = Counter()
        self.workers: set[str] = set()  # of this pass, at work
        self.joined: set[str] = set()  # all that were ever ready
        self.breaks: Counter[Device] = Counter()
        self.broken_by: defaultdict[str, set[Device]] = defaultdict(set)  # by a row alone
        self.errors: dict[str, str] = {}
        self.holders: list[Any] = []

    def start_pass(self) -> None:
        self.workers.clear()

    def join(self, worker: str) -> None:
        self.workers.add(worker)
        self.joined.add(worker)

    def has_joined(self, worker: str) -> bool:
        return worker in self.joined

    def is_held(self, device: Device | None) -> bool:
        return device is not None and self.breaks[device] >= BREAKS

    def begin(self, what: Any) -> int:
        self.begun[what] += 1
        return self.begun[what] - 1

    def end(self, what: Any) -> None:
        del self.begun[what]

    def begin_alone(self, id_: str) -> str:
        if len(self.broken_by[id_]) >= DEVICES:
            return f"broke {len(self.broken_by[id_])} GPUs: {self.errors[id_]}"
        if self.begun[id_] >= DEATHS:
            return f"killed its worker {self.begun[id_] + 1} times"
        self.begin(id_)
        return ""

    def note_break(
        self,
        device: Device,
        error: str,
        alone: str | None,
        worker: str,
    ) -> tuple[int, int]:
        self.breaks[device] += 1
        if alone is not None:
            self.begun[alone] -= 1  # the device is to blame, until another one breaks as well
            self.broken_by[alone].add(device)
            self.errors[alone] = error
        if self.breaks[device] == BREAKS:
            threading.Thread(target=self._hold, args=(device,), daemon=True).start()
        if self.breaks[device] >= BREAKS:
            self.workers.discard(worker)
        return self.breaks[device], len(self.workers - {worker})

    def _hold(self, device: Device) -> None:
        """Hold a GPU. Ray lends any free one of a node: keep others until the right one comes.

        Others are kept for a moment only. Their workers would meanwhile ask for the broken one.
        """
        node, gpu = device
        here = NodeAffinitySchedulingStrategy(node, soft=False)
        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": 1, "scheduling_strategy": here}
        others = []
        while True:
            holder: Any = ray.remote(**options)(_Holder).remote()
            try:
                given = ray.get(holder.gpu.remote(), timeout=PATIENCE if others else None)
            except GetTimeoutError:
                ray.kill(holder)  # pyright: ignore[reportArgumentType]
                others.clear()
                continue
            except RayActorError:
                return  # the node is gone, and the GPU with it
            if given == gpu:
                self.holders.append(holder)
                return
            others.append(holder)


class _Holder:
    def gpu(self) -> str:
        return str(ray.get_gpu_ids()[0])
