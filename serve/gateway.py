"""The parts of an ingress that its routes share."""

import secrets
import time
from dataclasses import dataclass

import numpy as np

from ip2p.edit.editor import EditRequest
from ip2p.recipe import Recipe, Sampling
from ip2p.workspace import Workspace
from serve.admission import Admission, Pace
from serve.engine_client import EngineClient, EngineHandle
from serve.metrics import Metrics
from serve.pictures import Pictures
from serve.schema import Settings


@dataclass(frozen=True, eq=False)
class Gateway:
    """One for each ingress. longest_edit: seconds for an edit whose request sets no deadline."""

    recipe: Recipe
    workspace: Workspace | None
    secret: bytes  # signs the ids of edits
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
    pace = Pace()
    admission = Admission(recipe.serve.queue, pace)
    metrics = Metrics(in_flight=lambda: admission.in_flight)
    return Gateway(
        recipe=recipe,
        workspace=workspace,
        secret=secret,
        longest_edit=longest_edit,
        started=int(time.time()),
        admission=admission,
        metrics=metrics,
        engines=EngineClient(handles, shares, pace, metrics),
        pictures=Pictures(recipe.serve.max_pixels, secret),
    )


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
