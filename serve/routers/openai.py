"""POST /v1/images/edits, as OpenAI's clients send it."""

import base64
import time
from dataclasses import dataclass, replace
from typing import Annotated, Any

from fastapi import APIRouter, Form, UploadFile
from fastapi.responses import Response

from ip2p.edit.editor import EditRequest
from serve.engine_client import Description, EditResult
from serve.errors import RefusedError
from serve.gateway import Gateway, edit_request
from serve.pictures import Source, output_size
from serve.routers.dependencies import (
    REFUSALS,
    CurrentClient,
    CurrentGateway,
    ModelVersion,
    UntilAnswered,
    run_all,
)
from serve.schema import MAX_IMAGES, EditedImage, EditForm, EditResponse, OutputFormat

SEEDS = 2**63  # seeds count up from an image's first one, and wrap here

router = APIRouter()


@dataclass(frozen=True, eq=False)
class _Planned:
    """An edit to be made. size: (H, W) of the answer."""

    request: EditRequest
    source: Source
    size: tuple[int, int]


@dataclass(frozen=True, eq=False)
class _Finished:
    """An edit as it is answered. file: the picture in the output format."""

    request: EditRequest
    result: EditResult
    file: bytes
    edit_id: str


@router.post(
    "/v1/images/edits",
    response_model=EditResponse,
    responses={200: {"content": {"image/png": {}}}} | REFUSALS,
)
async def edit_images(
    gateway: CurrentGateway,
    client: CurrentClient,
    until_answered: UntilAnswered,
    form: Annotated[EditForm, Form(media_type="multipart/form-data")],
    x_model_version: ModelVersion = None,
):
    """Edits images as the prompt says. Results keep the size, orientation and transparency."""
    files = [*form.image, *form.images]
    _check(form, files)
    version = gateway.engines.choose(x_model_version, form.model)
    deadline = time.monotonic() + (form.deadline_s or gateway.longest_edit)
    until_answered.enter_context(gateway.admission.admit(client, len(files) * form.n))

    model = await gateway.engines.describe(version, deadline)
    planned: list[_Planned] = []
    for file in files:
        planned += await _plan(gateway, form, file, model)
    finished = await run_all(_make(gateway, version, deadline, form.output_format, one) for one in planned)
    return _png(finished[0]) if form.response_format == "png" else _json(form, finished)


def _check(form: EditForm, files: list[UploadFile]) -> None:
    """Raises `RefusedError` for what the schema of a form can't express."""
    if form.mask is not None:
        message = "mask: not supported; leave it out and describe the change in the prompt"
        raise RefusedError(message, 400, param="mask")
    if not files:
        message = "image: field required: send a PNG, JPEG or WebP file"
        raise RefusedError(message, 400, param="image")
    if len(files) > MAX_IMAGES:
        message = f"image: {len(files)} images are too many; send at most {MAX_IMAGES}"
        raise RefusedError(message, 400, param="image")
    if form.response_format == "png" and (len(files) * form.n > 1 or form.output_format != "png"):
        message = "response_format: png holds one PNG; use b64_json, or ask for one image"
        raise RefusedError(message, 400, param="response_format")


async def _plan(gateway: Gateway, form: EditForm, file: UploadFile, model: Description) -> list[_Planned]:
    """Return the `n` edits of one file. Raises `RefusedError`."""
    source = await gateway.pictures.decode(await file.read(), form.output_format)
    fitted = await gateway.pictures.fit(source, model)
    first = edit_request(form, form.prompt, fitted, gateway.recipe.sampling)
    size = output_size(form.size, source.rgb)
    seeds = [(first.seed + k) % SEEDS for k in range(form.n)]
    return [_Planned(replace(first, seed=seed), source, size) for seed in seeds]


async def _make(
    gateway: Gateway, version: str, deadline: float, output_format: OutputFormat, planned: _Planned
) -> _Finished:
    request, source, size = planned.request, planned.source, planned.size
    result = await gateway.engines.edit(version, request, deadline, "num_inference_steps")
    file, edit_id = await gateway.pictures.finish(request, source, result, output_format, size)
    return _Finished(request, result, file, edit_id)


def _settings(request: EditRequest) -> dict[str, Any]:
    return {
        "seed": request.seed,
        "guidance_scale": request.guidance_scale,
        "image_guidance_scale": request.image_guidance_scale,
        "num_inference_steps": request.steps,
    }


def _png(finished: _Finished) -> Response:
    """Return the picture itself, with its settings as headers, e.g. x-num-inference-steps."""
    facts = _settings(finished.request) | {
        "model_version": finished.result.engine.version,
        "edit_id": finished.edit_id,
    }
    headers = {f"x-{name.replace('_', '-')}": str(value) for name, value in facts.items()}
    return Response(finished.file, media_type="image/png", headers=headers)


def _json(form: EditForm, finished: list[_Finished]) -> EditResponse:
    data = [
        EditedImage(
            b64_json=base64.b64encode(one.file).decode(),
            seed=one.request.seed,
            edit_id=one.edit_id,
        )
        for one in finished
    ]
    return EditResponse(
        created=int(time.time()),
        data=data,
        model=finished[0].result.engine.version,
        output_format=form.output_format,
        **_settings(finished[0].request),
    )
