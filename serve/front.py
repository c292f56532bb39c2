"""From a request to an engine and back: which version, whether there is room, retries, sizes, ids."""

import asyncio
import contextlib
import random
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from ray.exceptions import ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from ip2p import images
from ip2p.edit.editor import EditRequest
from ip2p.errors import UserError
from ip2p.recipe import Recipe
from ip2p.workspace import Workspace
from serve import feedback
from serve.batcher import DeadEngineError, LateError
from serve.keys import Client, RefusedError
from serve.schema import OutputFormat, Settings

ATTEMPTS = 4  # of an edit whose engine died: a deadly one ends no more engines than that
PAUSES = (0.0, 1.0, 3.0, 6.0)  # seconds: a dead engine that still answers is replaced after its next health checks
CODERS = 2  # threads that decode and encode pictures


@dataclass(frozen=True)
class Description:
    """What an ingress must know of an engine."""

    version: str
    max_side: int
    multiple: int


@dataclass(frozen=True, eq=False)
class Made:
    """An engine's answer. image: uint8 (H, W, 3), of the size that the model sees."""

    image: np.ndarray
    engine: Description
    waited: float  # seconds until the first step


@dataclass(frozen=True, eq=False)
class Moved:
    """How far an edit is; preview: what it would be by now."""

    step: int
    preview: np.ndarray | None


class Engine(Protocol):
    """A handle of engines: `ray.serve`'s DeploymentHandle."""

    describe: Any
    edit: Any
    follow: Any

    def options(self, *, stream: bool) -> "Engine": ...


@dataclass(frozen=True, eq=False)
class Source:
    """A picture that was sent. rgb: uint8 (H, W, 3), upright; alpha (H, W) where it has any."""

    rgb: np.ndarray
    alpha: np.ndarray | None


class Front:
    """What an ingress does for its routes. engines: by version; shares: of the edits that name none."""

    def __init__(
        self,
        recipe: Recipe,
        workspace: Workspace | None,
        engines: dict[str, Engine],
        shares: dict[str, float],
        secret: bytes,
    ):
        self.recipe, self.workspace, self.engines, self.shares, self.secret = (
            recipe, workspace, engines, shares, secret,
        )  # fmt: skip
        self.coders = ThreadPoolExecutor(CODERS, thread_name_prefix="coder")
        self.started = int(time.time())
        self.in_flight = 0
        self.pace = 1.0  # seconds between two edits that are done, lately
        self.last_done: float | None = None
        self._described: dict[str, Description] = {}
        self.registry = CollectorRegistry()
        self._requests = self._metric(Counter, "requests", "answers by path and status", "path", "status")
        self._edits = self._metric(Counter, "edits", "edits made", "version")
        self._retries = self._metric(Counter, "retries", "edits begun anew because their engine died", "version")
        self._seconds = self._metric(Histogram, "edit_seconds", "from admission to the image", "version")
        self._waited = self._metric(Histogram, "wait_seconds", "of an edit before its first step", "version")
        self._metric(Gauge, "edits_in_flight", "edits that wait or are on their way").set_function(
            lambda: self.in_flight
        )

    def _metric(self, kind: Any, name: str, what: str, *labels: str) -> Any:
        return kind(f"ip2p_serve_{name}", what, labels, registry=self.registry)

    def count(self, path: str, status: int) -> None:
        known = path if path in KNOWN_PATHS else "other"
        self._requests.labels(known, status).inc()

    # ---- versions

    def choose(self, *asked: str | None) -> str:
        """The version that a header or field names, else one drawn by share. Raises `RefusedError`."""
        for name in asked:
            if name and name not in GENERIC:
                if name not in self.engines:
                    raise RefusedError(
                        f"there is no model {name[:80]!r}: there are {', '.join(self.engines)}", 404, param="model"
                    )
                return name
        return random.choices(list(self.shares), list(self.shares.values()))[0]

    @property
    def main_version(self) -> str:
        return next(iter(self.engines))

    async def describe(self, version: str, deadline: float) -> Description:
        """Waits for an engine the first time only. Raises `RefusedError` when none is up by the deadline."""
        attempt = 0
        while version not in self._described:
            response = self.engines[version].describe.remote()
            try:
                self._described[version] = await self._answer(response, response, deadline, "deadline_s")
            except TRANSIENT as error:
                await self._again(version, attempt, error)
                attempt += 1
        return self._described[version]

    # ---- admission

    @contextlib.contextmanager
    def places(self, client: Client | None, edits: int) -> Iterator[None]:
        """Occupy places for edits. Raises `RefusedError` (429) where there are none."""
        limit = self.recipe.serve.queue
        if self.in_flight + edits > limit:
            over = self.in_flight + edits - limit
            raise RefusedError(
                f"{self.in_flight} edits are on their way and {limit} may be: try again later, or send fewer at once",
                429,
                retry_after=min(60.0, over * self.pace),
            )
        if client is not None:
            client.charge(edits - 1)  # one was charged at the door
            client.enter(edits)
        self.in_flight += edits
        try:
            yield
        finally:
            self.in_flight -= edits
            if client is not None:
                client.leave(edits)

    def _done(self, made: Made, began: float) -> None:
        now = time.monotonic()
        if self.last_done is not None:
            self.pace += 0.1 * (min(now - self.last_done, 10.0) - self.pace)
        self.last_done = now
        version = made.engine.version
        self._edits.labels(version).inc()
        self._seconds.labels(version).observe(now - began)
        self._waited.labels(version).observe(made.waited)

    # ---- pictures

    async def in_thread(self, function: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.coders, function, *args)

    async def read(self, data: bytes, param: str) -> Source:
        """Raises `RefusedError`; the header is looked at before a pixel is decoded."""

        def decode() -> Source:
            images.inspect(data, self.recipe.serve.max_pixels)
            return Source(*images.decode_with_alpha(data, self.recipe.serve.max_pixels))

        try:
            return await self.in_thread(decode)
        except UserError as error:
            raise RefusedError(f"{param}: {error}", 400, param=param) from error

    async def finish(
        self, request: EditRequest, source: Source, made: Made, format: OutputFormat, size: tuple[int, int]
    ) -> tuple[bytes, str]:
        """The picture, of `size` (H, W) and with the source's transparency, and its edit's id for POST /v1/feedback."""

        def encode() -> tuple[bytes, str]:
            alpha = None if source.alpha is None else images.resize(source.alpha, *size)
            result = images.resize(made.image, *size)
            record = {
                "source_id": feedback.image_id(source.rgb),
                "result_id": feedback.image_id(result),
                "instruction": request.instruction,
                "negative_prompt": request.negative_prompt,
                "guidance_scale": request.guidance_scale,
                "image_guidance_scale": request.image_guidance_scale,
                "steps": request.steps,
                "seed": request.seed,
                "solver": request.solver,
                "model": made.engine.version,
            }
            return images.encode(result, format, alpha), feedback.make_edit_id(record, self.secret)

        return await self.in_thread(encode)

    # ---- edits

    def complete(self, settings: Settings, instruction: str, image: np.ndarray) -> EditRequest:
        """The recipe's values where the settings have none; a seed is drawn here, so that a retry makes the same."""
        sampling = self.recipe.sampling
        s_text, s_image = settings.guidance_scale, settings.image_guidance_scale
        seed = secrets.randbelow(2**31) if settings.seed is None else settings.seed
        return EditRequest(
            image=image,
            instruction=instruction,
            guidance_scale=sampling.guidance_scale if s_text is None else s_text,
            image_guidance_scale=sampling.image_guidance_scale if s_image is None else s_image,
            steps=settings.num_inference_steps or sampling.steps,
            seed=seed,
            solver=settings.solver or sampling.solver,
            negative_prompt=settings.negative_prompt,
        )

    async def edit(self, version: str, request: EditRequest, deadline: float, param: str) -> Made:
        """Begun anew, with its seed, when its engine dies.

        Raises `RefusedError` when it is late (408), or the request can't be done (400).
        """
        began = time.monotonic()
        for attempt in range(ATTEMPTS):
            response = self.engines[version].edit.remote(request, deadline - time.monotonic())
            try:
                made = await self._answer(response, response, deadline, param)
            except TRANSIENT as error:
                await self._again(version, attempt, error)
            else:
                self._seen(version, made, began)
                return made
        raise AssertionError

    async def follow(
        self, version: str, request: EditRequest, deadline: float, param: str, preview_every: int
    ) -> AsyncGenerator[Moved | Made, None]:
        """`edit` as it moves on, `Made` last. An edit that is begun anew moves from its first step again."""
        began = time.monotonic()
        for attempt in range(ATTEMPTS):
            handle = self.engines[version].options(stream=True)
            response = handle.follow.remote(request, deadline - time.monotonic(), preview_every)
            try:
                while True:
                    event = await self._answer(response, anext(response), deadline, param)
                    if isinstance(event, Made):
                        self._seen(version, event, began)
                    yield event
                    if isinstance(event, Made):
                        return
            except TRANSIENT as error:
                await self._again(version, attempt, error)
            finally:
                response.cancel()  # what has ended is not touched

    async def _answer(self, response: Any, awaitable: Awaitable[Any], deadline: float, param: str) -> Any:
        """What an engine answers. Raises `RefusedError`, or one of `TRANSIENT` when the engine died."""
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await awaitable
        except asyncio.CancelledError as error:
            response.cancel()
            task = asyncio.current_task()
            if task is not None and not task.cancelling():  # not ours: the engine was ended, and its work with it
                raise DeadEngineError("the engine gave the edit up") from error
            raise
        except TimeoutError as error:
            response.cancel()
            raise _late() from error
        except BackPressureError as error:
            raise RefusedError("too many edits wait: try again later", 429, retry_after=10 * self.pace) from error
        except Exception as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, LateError):
                raise _late() from error
            if isinstance(cause, UserError):
                raise RefusedError(str(cause), 400, param=param) from error
            if isinstance(cause, TRANSIENT):
                raise cause from error
            raise

    async def _again(self, version: str, attempt: int, error: Exception) -> None:
        if attempt == ATTEMPTS - 1:
            raise error
        self._retries.labels(version).inc()
        await asyncio.sleep(PAUSES[attempt])

    def _seen(self, version: str, made: Made, began: float) -> None:
        self._described[version] = made.engine  # after a redeploy it may be another model
        self._done(made, began)


TRANSIENT = (RayActorError, WorkerCrashedError, ObjectLostError, DeploymentUnavailableError, DeadEngineError)
GENERIC = ("editor", "ip2p")  # OpenAI's clients must name some model
KNOWN_PATHS = {
    "/", "/healthz", "/readyz", "/metrics", "/docs", "/openapi.json",
    "/v1/defaults", "/v1/models", "/v1/edits", "/v1/images/edits", "/v1/feedback",
}  # fmt: skip


def _late() -> RefusedError:
    return RefusedError("not done by the deadline: allow more seconds, or ask for fewer steps", 408, param="deadline_s")
