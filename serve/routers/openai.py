"""POST /v1/images/edits, as OpenAI's clients send it."""

import base64
import time
from dataclasses import dataclass, replace
from typing import Annotated, Any

from fastapi import APIRouter, Form
from fastapi.responses import Response

from ip2p.edit.editor import EditRequest
from serve.bodies import BodyRoute
from serve.engine_client import EditCall, EditResult
from serve.errors import RefusedError, before
from serve.gateway import Gateway, RequestContext, edit_request, work
from serve.load import Load, memory_of
from serve.pictures import Source, Upload, output_size, size_box
from serve.routers.dependencies import (
    REFUSALS,
    CurrentClient,
    CurrentGateway,
    ModelVersion,
    UntilAnswered,
    run_all,
)
from serve.schema import EditedImage, EditForm, EditResponse, OutputFormat

SEEDS = 2**63  # seeds count up from an image's first one, and wrap here

router = APIRouter(route_class=BodyRoute)


@dataclass(frozen=True, eq=False)
class _Planned:
    """An edit to be made. size: (H, W) of the answer."""

    call: EditCall
    source: Source
    size: tuple[int, int]


@dataclass(frozen=True, eq=False)
class _Finished:
    """An edit as it is answered. file: the picture in the output format."""

    request: EditRequest
    result: EditResult
    file: bytes
    output_format: OutputFormat
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
    _check(form)
    version = gateway.engines.choose(x_model_version, form.model)
    context = RequestContext(gateway, version, client.key.name if client else "", form.deadline_s)
    async with before(context.deadline):
        uploads = [await context.inspect(await file.read()) for file in form.image]
        until_answered.enter_context(
            gateway.admission.admit(client, len(uploads) * form.n, _load(gateway, form, uploads))
        )
        planned: list[_Planned] = []
        for upload in uploads:
            planned += await _plan(context, form, upload)
        finished = await run_all(_make(context, form, one) for one in planned)
    return _png(finished[0]) if form.response_format == "png" else _json(finished)


def _check(form: EditForm) -> None:
    """Raises `RefusedError` for what the schema of a form can't express."""
    if form.mask is not None:
        message = "mask: not supported; leave it out and describe the change in the prompt"
        raise RefusedError(message, 400, param="mask")
    several = len(form.image) * form.n > 1
    if form.response_format == "png" and (several or form.output_format not in ("auto", "png")):
        message = "response_format: png holds one PNG; use b64_json, or ask for one image"
        raise RefusedError(message, 400, param="response_format")
    size_box(form.size)


def _load(gateway: Gateway, form: EditForm, uploads: list[Upload]) -> Load:
    """Return the load of all edits of a form."""
    box, lossless = size_box(form.size), form.output_format in ("png", "webp")
    results = [form.n * (upload.pixels if box is None else box[0] * box[1]) for upload in uploads]
    return Load(
        work=form.n * sum(work(gateway, upload, form) for upload in uploads),
        memory=sum(
            memory_of(len(upload.data), upload.pixels, pixels, lossless) for upload, pixels in zip(uploads, results)
        ),
    )


async def _plan(context: RequestContext, form: EditForm, upload: Upload) -> list[_Planned]:
    """Return the `n` edits of one file. Raises `RefusedError`."""
    asked_format = "png" if form.response_format == "png" else form.output_format
    source, fitted = await context.decode(upload, asked_format, opaque=form.background == "opaque")
    first = edit_request(form, form.prompt, fitted, context.gateway.recipe.sampling)
    size = output_size(form.size, source.rgb, context.gateway.recipe.serve.max_pixels)
    seeds = [(first.seed + k) % SEEDS for k in range(form.n)]
    load = work(context.gateway, upload, form)
    return [
        _Planned(context.call(replace(first, seed=seed), load, "num_inference_steps"), source, size) for seed in seeds
    ]


async def _make(context: RequestContext, form: EditForm, planned: _Planned) -> _Finished:
    result = await context.gateway.engines.edit(planned.call)
    file, edit_id = await context.gateway.pictures.finish(
        context.client, planned.call.request, planned.source, result, planned.size, form.output_compression
    )
    return _Finished(planned.call.request, result, file, planned.source.output_format, edit_id)


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


def _json(finished: list[_Finished]) -> EditResponse:
    data = [
        EditedImage(
            b64_json=base64.b64encode(one.file).decode(),
            output_format=one.output_format,
            seed=one.request.seed,
            edit_id=one.edit_id,
        )
        for one in finished
    ]
    return EditResponse(
        created=int(time.time()),
        data=data,
        model=finished[0].result.engine.version,
        output_format=finished[0].output_format,
        **_settings(finished[0].request),
    )
