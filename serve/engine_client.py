"""Ask engines for edits: which version, until when, and again when an engine dies."""

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Awaitable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from ray.exceptions import ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from ip2p.edit.editor import EditRequest
from ip2p.errors import UserError
from serve.admission import Pace
from serve.batcher import DeadEngineError, LateError
from serve.errors import RefusedError, before, late
from serve.metrics import Metrics
from serve.turns import Turns

logger = logging.getLogger("ray.serve")

# An edit that kills its engine kills no more than this many.
ATTEMPTS = 4
# Seconds before each retry. Serve replaces a dead engine after its next health checks.
PAUSES = (0.0, 1.0, 3.0)
READY_WITHIN = 5.0  # seconds that the first probe of an engine may take
PROBE_AGE = 3.0  # seconds after which the result of a probe is renewed
GENERIC_MODELS = ("editor", "ip2p")  # OpenAI's clients must name some model
TRANSIENT = (RayActorError, WorkerCrashedError, ObjectLostError, DeploymentUnavailableError, DeadEngineError)


@dataclass(frozen=True)
class Description:
    """The version of an engine, and the sizes of pictures that its model takes."""

    version: str
    max_side: int
    multiple: int


@dataclass(frozen=True, eq=False)
class EditCall:
    """An edit to ask an engine for.

    client: whose turn it takes. work: of the edit, as of `work_of`. deadline: by time.monotonic.
    param: the field to name when the model can't do the edit.
    """

    version: str
    request: EditRequest
    client: str
    work: float
    deadline: float
    param: str


@dataclass(frozen=True, eq=False)
class EditResult:
    """A completed edit. image: uint8 (H, W, 3), of the size that the model sees."""

    image: np.ndarray
    engine: Description
    waited: float  # seconds until the first step


@dataclass(frozen=True, eq=False)
class EditProgress:
    """The number of steps made. preview: uint8 (H, W, 3), the estimate of the result, or None."""

    step: int
    preview: np.ndarray | None


class EngineHandle(Protocol):
    """The part of Ray Serve's DeploymentHandle that is used here."""

    describe: Any
    edit: Any
    follow: Any

    def options(self, *, stream: bool) -> "EngineHandle": ...


class EngineClient:
    """Edits by the engines of each version.

    handles: by version, the main one first. shares: the share of each version in the edits that
    name none. slots: edits of this ingress that a version's engines have at once; the others wait
    here, where clients take turns.
    """

    def __init__(
        self,
        handles: dict[str, EngineHandle],
        shares: dict[str, float],
        slots: int,
        pace: Pace,
        metrics: Metrics,
    ):
        self.handles, self.shares, self.pace, self.metrics = handles, shares, pace, metrics
        self._turns = {version: Turns(slots) for version in handles}
        self._described: dict[str, Description] = {}
        self._ready, self._probed = False, 0.0
        self._probe: asyncio.Task[None] | None = None

    @property
    def main_version(self) -> str:
        return next(iter(self.handles))

    def choose(self, *asked: str | None) -> str:
        """Return the first version that is asked for by name, else one drawn by its share.

        Raises `RefusedError` (404) for an unknown version.
        """
        for name in asked:
            if name and name not in GENERIC_MODELS:
                if name not in self.handles:
                    raise RefusedError(
                        f"model: {name[:80]!r} is not served; choose one of {', '.join(self.handles)}",
                        404,
                        param="model",
                    )
                return name
        return random.choices(list(self.shares), list(self.shares.values()))[0]

    async def ready(self) -> bool:
        """Return whether an engine of the main version was warm at the last probe.

        A probe runs while somebody asks, one at a time. Only before the first success does the
        caller wait for it, for READY_WITHIN seconds.
        """
        if self._probe is None or (self._probe.done() and time.monotonic() > self._probed + PROBE_AGE):
            self._probe = asyncio.create_task(self._ask_engine())
        if not self._ready:
            await asyncio.wait({self._probe}, timeout=READY_WITHIN)
        return self._ready

    async def _ask_engine(self) -> None:
        try:
            async with asyncio.timeout(READY_WITHIN):
                await self.handles[self.main_version].describe.remote()
            self._ready = True
        except (TimeoutError, BackPressureError):
            pass  # it is loading, or busy with edits
        except Exception as error:
            logger.warning("no engine answered a probe: %r", error)
            self._ready = False
        finally:
            self._probed = time.monotonic()

    async def describe(self, version: str, deadline: float) -> Description:
        """Return the description of a version. Only the first call waits for an engine.

        Raises `RefusedError` when no engine is up by the deadline.
        """
        attempt = 0
        while version not in self._described:
            response = self.handles[version].describe.remote()
            try:
                self._described[version] = await self._answer(response, response, deadline, "deadline_s")
            except TRANSIENT as error:
                await self._before_retry(version, attempt, error)
                attempt += 1
        return self._described[version]

    async def edit(self, call: EditCall) -> EditResult:
        """Return the result of an edit, which is retried with its seed when its engine dies.

        Raises `RefusedError` when it is late (408), or when the model can't do it (400).
        """
        start = time.monotonic()
        async with before(call.deadline), self._turns[call.version].take(call.client, call.work):
            for attempt in range(ATTEMPTS):
                seconds = call.deadline - time.monotonic()
                response = self.handles[call.version].edit.remote(call.request, seconds)
                try:
                    result = await self._answer(response, response, call.deadline, call.param)
                except TRANSIENT as error:
                    await self._before_retry(call.version, attempt, error)
                else:
                    self._record(call.version, result, start)
                    return result
        raise AssertionError

    async def follow(self, call: EditCall, preview_every: int) -> AsyncGenerator[EditProgress | EditResult, None]:
        """Yield the progress of an edit, then its result. A retry starts from the first step.

        Raises `RefusedError` as `edit` does.
        """
        start = time.monotonic()
        turns = self._turns[call.version]
        async with before(call.deadline):
            await turns.enter(call.client, call.work)
        try:
            for attempt in range(ATTEMPTS):
                handle = self.handles[call.version].options(stream=True)
                response = handle.follow.remote(call.request, call.deadline - time.monotonic(), preview_every)
                try:
                    while True:
                        event = await self._answer(response, anext(response), call.deadline, call.param)
                        if isinstance(event, EditResult):
                            self._record(call.version, event, start)
                        yield event
                        if isinstance(event, EditResult):
                            return
                except TRANSIENT as error:
                    await self._before_retry(call.version, attempt, error)
                finally:
                    response.cancel()  # does nothing to a response that has ended
        finally:
            turns.leave()

    async def _answer(self, response: Any, awaitable: Awaitable[Any], deadline: float, param: str) -> Any:
        """Return an engine's answer. Raises `RefusedError`, or one of `TRANSIENT` when it died."""
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await awaitable
        except asyncio.CancelledError as error:
            response.cancel()
            task = asyncio.current_task()
            if task is not None and not task.cancelling():  # Ray cancelled the call, not our client
                raise DeadEngineError("the engine gave the edit up") from error
            raise
        except TimeoutError as error:
            response.cancel()
            raise late() from error
        except BackPressureError as error:
            wait = 10 * self.pace.seconds
            raise RefusedError("engines busy: retry later", 429, retry_after=wait) from error
        except Exception as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, LateError):
                raise late() from error
            if isinstance(cause, UserError):
                raise RefusedError(str(cause), 400, param=param) from error
            if isinstance(cause, TRANSIENT):
                raise cause from error
            raise

    async def _before_retry(self, version: str, attempt: int, error: Exception) -> None:
        """Wait before the next attempt. Raises `error` after the last one."""
        if attempt == ATTEMPTS - 1:
            raise error
        self.metrics.count_retry(version)
        await asyncio.sleep(PAUSES[attempt])

    def _record(self, version: str, result: EditResult, start: float) -> None:
        self._described[version] = result.engine  # after a redeploy it may be another model
        self.pace.tick()
        self.metrics.count_edit(result.engine.version, time.monotonic() - start, result.waited)
