"""The continuous batcher: a thread that keeps one UNet full with edits of many requests.

An edit joins at any step and leaves when it is done, cancelled or late; different steps, scales, seeds, solvers and
negative prompts share each UNet call. Edits of one latent shape make a bucket; the bucket that has had the least of the
device's time is next.
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
    """The batcher's thread has ended: this process can't edit any more."""


class LateError(Exception):
    """The deadline passed before the edit was done."""


@dataclass(eq=False)
class Job:
    """One edit. Called from the batcher's thread: `done` once, with the image (model's size) or what went wrong;
    `moved` after each step, with how many have been made, and a preview every `preview_every` steps."""

    request: EditRequest
    done: Callable[[np.ndarray | Exception], object]
    moved: Callable[[int, np.ndarray | None], object] | None = None
    preview_every: int = 0
    deadline: float = float("inf")  # by time.monotonic
    since: float = field(default_factory=time.monotonic)
    started: float | None = None

    def shows(self, step: int) -> bool:
        return self.preview_every > 0 and step % self.preview_every == 0 and step < self.request.steps


@dataclass(eq=False)
class _Bucket:
    engine: Engine
    spent: float  # seconds of the device, counted from that of the least served bucket when this one was made
    waiting: deque[Job] = field(default_factory=deque)
    running: dict[Trajectory, Job] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)


class Batcher:
    """Edits on a thread of its own. `submit`, `cancel` and the figures may be used from any thread."""

    def __init__(self, editor: Editor):
        self.editor = editor
        self.batch_size = editor.batch_size
        self.failure: BaseException | None = None
        self.unet_samples = 0
        self._buckets: dict[tuple[int, ...], _Bucket] = {}
        self._inbox: list[Job] = []
        self._dropped: set[Job] = set()
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Raises `DeadEngineError`."""
        with self._wake:
            self.check()
            self._inbox.append(job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Its place is free at the next step; `done` is not called. One that is done already is ignored."""
        with self._wake:
            self._dropped.add(job)
            self._wake.notify()

    def check(self) -> None:
        """Raises `DeadEngineError` when the thread has ended, e.g. on a broken CUDA state."""
        if self.failure is not None or not self._thread.is_alive():
            raise DeadEngineError(f"the engine has stopped: {self.failure}")

    @property
    def running(self) -> int:
        """Edits that share UNet calls now."""
        return sum(len(bucket.running) for bucket in list(self._buckets.values()))

    @property
    def waiting(self) -> int:
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
        """What has arrived, been cancelled or is late since the last turn; waits while there is nothing to do."""
        with self._wake:
            while not self._inbox and not any(map(len, self._buckets.values())):
                self._dropped.clear()
                self._wake.wait()
            arrived, self._inbox = self._inbox, []
            dropped, self._dropped = self._dropped, set()
        for job in arrived:
            shape = self.editor.fit(job.request.image).shape
            if shape not in self._buckets:
                least = min((bucket.spent for bucket in self._buckets.values()), default=0.0)
                engine = Engine(self.editor.model.unet, self.editor.schedule, self.batch_size)
                self._buckets[shape] = _Bucket(engine, least)
            self._buckets[shape].waiting.append(job)
        now = time.monotonic()
        for bucket in self._buckets.values():
            self._leave(bucket, dropped, now)
        self._buckets = {shape: bucket for shape, bucket in self._buckets.items() if len(bucket)}

    def _leave(self, bucket: _Bucket, dropped: set[Job], now: float) -> None:
        late = {job for job in (*bucket.waiting, *bucket.running.values()) if job.deadline <= now} - dropped
        gone = dropped | late
        bucket.waiting = deque(job for job in bucket.waiting if job not in gone)
        for trajectory in [trajectory for trajectory, job in bucket.running.items() if job in gone]:
            bucket.engine.remove(trajectory)
            del bucket.running[trajectory]
        for job in late:
            job.done(LateError())

    def _turn(self, bucket: _Bucket) -> None:
        """One step of a bucket. Out of memory halves its batch, and its edits begin anew: they are seeded."""
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
        for trajectory, job in bucket.running.items():
            if job.moved is not None:
                job.moved(trajectory.step, self._preview(trajectory) if job.shows(trajectory.step) else None)
        for at in range(0, len(finished), DECODED_TOGETHER):
            some = finished[at : at + DECODED_TOGETHER]
            results = self.decode([trajectory.latents for trajectory in some])
            for trajectory, result in zip(some, results):
                bucket.running.pop(trajectory).done(result)

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
            except ValueError as error:  # steps that the schedule can't do
                job.done(error)
            else:
                job.started = time.monotonic()
                bucket.running[trajectory] = job

    def decode(self, latents: list[torch.Tensor]) -> np.ndarray:
        """n of (C, h, w) -> uint8 (n, H, W, 3), the size that the model sees."""
        return images.to_uint8(self.editor.model.decode_latents(torch.stack(latents)))

    def _preview(self, trajectory: Trajectory) -> np.ndarray:
        assert trajectory.denoised is not None
        return self.decode([trajectory.denoised])[0]
