"""The parts of an ingress that its routes share."""

import secrets
import time
from dataclasses import dataclass

import numpy as np

from ip2p.edit.editor import EditRequest
from ip2p.recipe import Recipe, Sampling
from ip2p.workspace import Workspace
from serve.admission import Admission, Pace
from serve.engine_client import EditCall, EngineClient, EngineHandle
from serve.load import work_of
from serve.metrics import Metrics
from serve.pictures import Pictures, Source, Upload
from serve.schema import AskedFormat, Settings

PICTURES = 16  # of `max_pixels` each, that an ingress may hold
BYTES_A_PIXEL = 4


@dataclass(frozen=True, eq=False)
class Gateway:
    """One for each ingress. longest_edit: seconds for an edit whose request sets no deadline.

    workspace: where feedback goes, None when there is none that can be written.
    """

    recipe: Recipe
    workspace: Workspace | None
    secret: bytes  # encrypts the ids of edits
    longest_edit: float
    started: int  # Unix time
    admission: Admission
    metrics: Metrics
    engines: EngineClient
    pictures: Pictures


def open_gateway(
    recipe: Recipe,
    workspace: Workspace | None,
    handles: dict[str, EngineHandle],
    shares: dict[str, float],
    secret: bytes,
    longest_edit: float,
) -> Gateway:
    """Return a gateway to engines. handles and shares: as of `EngineClient`."""
    settings, pace = recipe.serve, Pace()
    admission = Admission(settings.queue, BYTES_A_PIXEL * PICTURES * settings.max_pixels, pace)
    # Twice of what all engines can batch, so that a waiting edit takes a free place at once. Fewer
    # would hide the demand from Serve's autoscaling.
    slots = max(settings.batch_size, 2 * settings.batch_size * settings.replicas[1] // settings.ingresses)
    metrics = Metrics(in_flight=lambda: admission.in_flight)
    return Gateway(
        recipe=recipe,
        workspace=workspace,
        secret=secret,
        longest_edit=longest_edit,
        started=int(time.time()),
        admission=admission,
        metrics=metrics,
        engines=EngineClient(handles, shares, slots, pace, metrics),
        pictures=Pictures(settings.max_pixels, secret),
    )


class RequestContext:
    """The version, client and deadline (by time.monotonic) of a request for edits."""

    def __init__(self, gateway: Gateway, version: str, client: str, seconds: float | None):
        self.gateway, self.version, self.client = gateway, version, client
        self.deadline = time.monotonic() + (seconds or gateway.longest_edit)

    def call(self, request: EditRequest, load: float, param: str) -> EditCall:
        return EditCall(self.version, request, self.client, load, self.deadline, param)

    async def inspect(self, data: bytes | str) -> Upload:
        """Return a file by its header. Raises `RefusedError`."""
        return await self.gateway.pictures.inspect(self.client, data)

    async def decode(self, upload: Upload, asked: AskedFormat, opaque: bool = False) -> tuple[Source, np.ndarray]:
        """Return the picture, and what the model sees of it. Raises `RefusedError`."""
        pictures = self.gateway.pictures
        model = await self.gateway.engines.describe(self.version, self.deadline)
        source = await pictures.decode(self.client, upload, asked, opaque)
        return source, await pictures.fit(self.client, source, model)


def work(gateway: Gateway, upload: Upload, settings: Settings, preview_every: int = 0) -> float:
    """Return the work of one edit of an upload, in usual edits."""
    sampling = gateway.recipe.sampling
    steps = settings.num_inference_steps or sampling.steps
    previews = (steps - 1) // preview_every if preview_every else 0
    full = sampling.max_side**2
    return work_of(steps, previews, min(upload.pixels, full), full)


def edit_request(settings: Settings, instruction: str, image: np.ndarray, defaults: Sampling) -> EditRequest:
    """Return the request to an engine, with the recipe's values where the client set none.

    A missing seed is drawn here, so that a retry makes the same picture.
    """
    s_text, s_image = settings.guidance_scale, settings.image_guidance_scale
    seed = secrets.randbelow(2**31) if settings.seed is None else settings.seed
    return EditRequest(
        image=image,
        instruction=instruction,
        guidance_scale=defaults.guidance_scale if s_text is None else s_text,
        image_guidance_scale=defaults.image_guidance_scale if s_image is None else s_image,
        steps=settings.num_inference_steps or defaults.steps,
        seed=seed,
        solver=settings.solver or defaults.solver,
        negative_prompt=settings.negative_prompt,
    )
