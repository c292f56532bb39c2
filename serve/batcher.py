"""The continuous batcher: a thread that fills each UNet call with the edits of many requests.

An edit joins at any step and leaves when it is done, cancelled or late. Edits with different steps,
scales, seeds, solvers and negative prompts share a call. Edits of one latent shape form a bucket,
and the bucket that has used the least device time is stepped next.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from ip2p import images
from ip2p.diffusion.engine import Engine, Trajectory
from ip2p.edit.editor import Editor, EditRequest

DECODED_TOGETHER = 4  # a decoder needs far more memory for a sample than the UNet


class DeadEngineError(RuntimeError):
    """The batcher's thread has ended, so this process can't edit."""


class LateError(Exception):
    """The deadline passed before the edit was done."""


@dataclass(eq=False)
class Job:
    """One edit, with callbacks that run on the batcher's thread.

    `done` is called once, with the image, uint8 (H, W, 3) of the model's size, or an exception.
    `moved` is called after each step with the number of steps made and a preview, which is None
    except at every `preview_every`-th step.
    """

    request: EditRequest
    done: Callable[[np.ndarray | Exception], object]
    moved: Callable[[int, np.ndarray | None], object] | None = None
    preview_every: int = 0
    deadline: float = float("inf")  # by time.monotonic, as are the next two
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None

    def wants_preview(self, step: int) -> bool:
        return self.preview_every > 0 and step % self.preview_every == 0 and step < self.request.steps


@dataclass(eq=False)
class _Bucket:
    engine: Engine
    spent: float  # device seconds; a new bucket starts at the least of the others
    waiting: deque[Job] = field(default_factory=deque)
    running: dict[Trajectory, Job] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)


class Batcher:
    """Runs edits on its own thread. The public methods and properties are thread-safe."""

    def __init__(self, editor: Editor):
        self.editor = editor
        self.batch_size = editor.batch_size
        self.failure: BaseException | None = None
        self.unet_samples = 0
        self._buckets: dict[tuple[int, ...], _Bucket] = {}
        self._inbox: list[Job] = []
        self._cancelled: set[Job] = set()
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue an edit. Raises `DeadEngineError`."""
        with self._wake:
            self.check()
            self._inbox.append(job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Free an edit's slot at the next step without calling `done`. Ignores a completed edit."""
        with self._wake:
            self._cancelled.add(job)
            self._wake.notify()

    def check(self) -> None:
        """Raises `DeadEngineError` when the thread has ended, e.g. on a broken CUDA state."""
        if self.failure is not None or not self._thread.is_alive():
            raise DeadEngineError(f"the engine has stopped: {self.failure}")

    @property
    def running(self) -> int:
        """The number of edits that share UNet calls."""
        return sum(len(bucket.running) for bucket in list(self._buckets.values()))

    @property
    def waiting(self) -> int:
        """The number of edits that wait for a slot."""
        return len(self._inbox) + sum(len(bucket.waiting) for bucket in list(self._buckets.values()))

    def _run(self) -> None:
        try:
            while True:
                self._take()
                if ready := [bucket for bucket in self._buckets.values() if len(bucket)]:
                    bucket = min(ready, key=lambda bucket: bucket.spent)
                    started = time.perf_counter()
                    self._turn(bucket)
                    bucket.spent += time.perf_counter() - started
        except BaseException as error:
            with self._wake:
                self.failure = error
                buckets = self._buckets.values()
                left = [*self._inbox, *(job for b in buckets for job in (*b.waiting, *b.running.values()))]
            for job in left:
                job.done(DeadEngineError(f"the engine has stopped: {error!r}"))
            raise

    def _take(self) -> None:
        """Take in new edits and drop cancelled and late ones. Waits while there are no edits."""
        with self._wake:
            while not self._inbox and not any(map(len, self._buckets.values())):
                self._cancelled.clear()
                self._wake.wait()
            arrived, self._inbox = self._inbox, []
            cancelled, self._cancelled = self._cancelled, set()
        for job in arrived:
            shape = self.editor.fit(job.request.image).shape
            if shape not in self._buckets:
                least = min((bucket.spent for bucket in self._buckets.values()), default=0.0)
                engine = Engine(self.editor.model.unet, self.editor.schedule, self.batch_size)
                self._buckets[shape] = _Bucket(engine, least)
            self._buckets[shape].waiting.append(job)
        now = time.monotonic()
        for bucket in self._buckets.values():
            self._leave(bucket, cancelled, now)
        self._buckets = {shape: bucket for shape, bucket in self._buckets.items() if len(bucket)}

    def _leave(self, bucket: _Bucket, cancelled: set[Job], now: float) -> None:
        """Remove cancelled and late edits from a bucket."""
        late = {job for job in (*bucket.waiting, *bucket.running.values()) if job.deadline <= now} - cancelled
        gone = cancelled | late
        bucket.waiting = deque(job for job in bucket.waiting if job not in gone)
        for trajectory in [trajectory for trajectory, job in bucket.running.items() if job in gone]:
            bucket.engine.remove(trajectory)
            del bucket.running[trajectory]
        for job in late:
            job.done(LateError())

    def _turn(self, bucket: _Bucket) -> None:
        """Step a bucket once.

        Out of memory halves the batch and restarts its edits, whose seeds give the same results.
        """
        try:
            self._admit(bucket)
            finished = bucket.engine.step()
        except torch.cuda.OutOfMemoryError:
            if self.batch_size == 1:
                raise
            self.batch_size = max(1, min(self.batch_size, bucket.engine.batch_size) // 2)
            torch.cuda.empty_cache()
            bucket.waiting.extendleft(reversed(bucket.running.values()))
            bucket.running = {}
            bucket.engine = Engine(self.editor.model.unet, self.editor.schedule, self.batch_size)
            return

        self.unet_samples = sum(b.engine.unet_samples for b in self._buckets.values())
        self._tell(bucket)
        for chunk in _chunks(finished):
            results = self.decode([trajectory.latents for trajectory in chunk])
            for trajectory, result in zip(chunk, results):
                bucket.running.pop(trajectory).done(result)

    def _tell(self, bucket: _Bucket) -> None:
        """Report the progress of a bucket's edits, with previews that are decoded together."""
        followed = {trajectory: job.moved for trajectory, job in bucket.running.items() if job.moved is not None}
        wanting = [trajectory for trajectory in followed if bucket.running[trajectory].wants_preview(trajectory.step)]
        previews: dict[Trajectory, np.ndarray] = {}
        for chunk in _chunks(wanting):
            previews |= zip(chunk, self.decode([_denoised(trajectory) for trajectory in chunk]))
        for trajectory, moved in followed.items():
            moved(trajectory.step, previews.get(trajectory))

    def _admit(self, bucket: _Bucket) -> None:
        room = bucket.engine.batch_size - len(bucket.engine)
        joining = [bucket.waiting.popleft() for _ in range(min(room, len(bucket.waiting)))]
        if not joining:
            return
        try:
            trajectories = self.editor.trajectories([job.request for job in joining])
        except torch.cuda.OutOfMemoryError:
            bucket.waiting.extendleft(reversed(joining))
            raise
        for trajectory, job in zip(trajectories, joining):
            try:
                bucket.engine.add(trajectory)
            except ValueError as error:  # e.g. more steps than the schedule has
                job.done(error)
            else:
                job.started = time.monotonic()
                bucket.running[trajectory] = job

    def decode(self, latents: list[torch.Tensor]) -> np.ndarray:
        """Decode n latents (C, h, w) to uint8 (n, H, W, 3), of the size that the model sees."""
        return images.to_uint8(self.editor.model.decode_latents(torch.stack(latents)))


def _chunks(trajectories: list[Trajectory]) -> list[list[Trajectory]]:
    return [trajectories[at : at + DECODED_TOGETHER] for at in range(0, len(trajectories), DECODED_TOGETHER)]


def _denoised(trajectory: Trajectory) -> torch.Tensor:
    assert trajectory.denoised is not None
    return trajectory.denoised
