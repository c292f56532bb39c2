"""The HTTP interface of an ingress: what is asked, in which form, and what is answered."""

import asyncio
import base64
import binascii
import contextlib
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import Depends, FastAPI, Form, Header, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from ip2p import images
from ip2p.edit.editor import EditRequest
from serve import feedback
from serve.door import CONTENT_TYPES, Door, problem
from serve.front import Front, Made, Source
from serve.keys import Clients, RefusedError
from serve.schema import (
    MAX_IMAGE_BYTES,
    MAX_IMAGES,
    MAX_SIDE,
    Defaults,
    Edited,
    EditedImage,
    EditForm,
    EditResponse,
    EditsRequest,
    EditsResponse,
    ErrorResponse,
    Feedback,
    Health,
    Limits,
    Model,
    Models,
    OutputFormat,
    Problem,
)

T = TypeVar("T")
logger = logging.getLogger("ray.serve")
PAGE = Path(__file__).with_name("page.html")
READY_WITHIN = 5  # seconds that an engine may take to answer /readyz

REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "something in the request is wrong: what, in which field"},
    401: {"model": ErrorResponse, "description": "no key, or one that is not known"},
    408: {"model": ErrorResponse, "description": "the request did not arrive in time, or was not done by its deadline"},
    413: {"model": ErrorResponse, "description": "too large"},
    415: {"model": ErrorResponse, "description": "wrong content type"},
    429: {"model": ErrorResponse, "description": "too much at once; try again after Retry-After seconds"},
}

ModelVersion = Annotated[str | None, Header(description="one of /v1/models; before the field `model`")]


def make_api(front: Front, clients: Clients, longest_edit: float) -> FastAPI:
    """longest_edit: seconds that an edit may take where the request does not say."""
    api = FastAPI(title="ip2p", summary="Edit images by written instructions", docs_url="/docs", redoc_url=None)
    api.add_middleware(Door, clients=clients, upload_s=front.recipe.serve.upload_s, count=front.count)
    _add_errors(api)
    _add_facts(api, front)
    _add_openai_edits(api, front, longest_edit)
    _add_edits(api, front, longest_edit)
    return api


# ---- errors


def _add_errors(api: FastAPI) -> None:
    @api.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> Response:
        body, headers = problem(error)
        return Response(body, error.status, headers)

    @api.exception_handler(RequestValidationError)
    async def bad_fields(_: Request, error: RequestValidationError) -> JSONResponse:
        """One line for every field that is wrong; without the input itself, which may be a whole file."""
        problems = [(_field(one["loc"]), one["msg"]) for one in error.errors()]
        message = "; ".join(f"{field}: {text}"[:300] for field, text in problems[:8])
        told = ErrorResponse(error=Problem(message=message, param=problems[0][0]))
        return JSONResponse(told.model_dump(), status_code=400)

    @api.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code in (404, 405):
            there = [f"{method.upper()} {path}" for path, item in api.openapi()["paths"].items() for method in item]
            way_out = f"there are {', '.join(there)}, and /docs"
        else:
            way_out = f"send {CONTENT_TYPES.get(request.url.path, 'a well-formed body')}, as /docs shows"
        message = f"{request.method} {request.url.path[:200]}: {error.detail}; {way_out}"
        told = ErrorResponse(error=Problem(message=message))
        return JSONResponse(told.model_dump(), error.status_code, error.headers)


def _field(location: tuple[int | str, ...]) -> str:
    """('body', 'edits', 0, 'seed') -> edits.0.seed; where a body can't be parsed at all, pydantic gives a position."""
    where = ".".join(map(str, location[1:]))[:100]
    return "body" if not where or where.isdigit() else where


# ---- facts


def _add_facts(api: FastAPI, front: Front) -> None:
    @api.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> str:
        return PAGE.read_text()

    @api.get("/healthz")
    async def healthz() -> Health:
        """Answers as long as this process lives."""
        return Health(model=front.main_version)

    @api.get("/readyz", responses={503: {"model": ErrorResponse}})
    async def readyz() -> Health:
        """Answers once a model is loaded and warm, or may be loaded when it is asked."""
        if front.recipe.serve.replicas[0]:  # asking would wake one that sleeps
            try:
                async with asyncio.timeout(READY_WITHIN):
                    await front.engines[front.main_version].describe.remote()
            except TimeoutError as error:
                raise RefusedError("no engine is warm yet: ask again", 503, retry_after=READY_WITHIN) from error
        return Health(model=front.main_version)

    @api.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(generate_latest(front.registry), media_type=CONTENT_TYPE_LATEST)

    @api.get("/v1/defaults", responses={401: REFUSALS[401]})
    async def defaults() -> Defaults:
        """The values of fields that a request leaves out, and the limits."""
        sampling = front.recipe.sampling
        return Defaults(
            model=front.main_version,
            guidance_scale=sampling.guidance_scale,
            image_guidance_scale=sampling.image_guidance_scale,
            num_inference_steps=sampling.steps,
            solver=sampling.solver,
            limits=Limits(max_pixels=front.recipe.serve.max_pixels),
        )

    @api.get("/v1/models", responses={401: REFUSALS[401]})
    async def models() -> Models:
        """The versions that are served."""
        return Models(
            data=[Model(id=name, created=front.started, share=front.shares.get(name, 0.0)) for name in front.engines]
        )

    @api.post(
        "/v1/feedback",
        status_code=204,
        responses=REFUSALS | {404: {"model": ErrorResponse}, 409: {"model": ErrorResponse}},
    )
    async def give_feedback(given: Feedback) -> None:
        """Keep what a person thinks of an edit."""
        record = feedback.read_edit_id(given.edit_id, front.secret)
        if record is None:
            raise RefusedError("edit_id: no edit has it: give one that came with an image", 404, param="edit_id")
        if front.workspace is None:
            raise RefusedError("there is no workspace to keep feedback in: start the service with --workspace", 409)
        opinion = {"edit_id": given.edit_id, "choice": given.choice, "comment": given.comment}
        row = record | opinion | {"time": datetime.now(UTC)}
        await front.in_thread(feedback.append, front.workspace, row)


# ---- edits


async def _until_answered() -> AsyncIterator[contextlib.ExitStack]:
    """What is entered here is left when the answer has been sent, or the client is gone."""
    with contextlib.ExitStack() as stack:
        yield stack


UntilAnswered = Annotated[contextlib.ExitStack, Depends(_until_answered)]
Tell = Callable[[str, dict[str, Any]], None]


def _add_openai_edits(api: FastAPI, front: Front, longest_edit: float) -> None:
    @api.post(
        "/v1/images/edits",
        response_model=EditResponse,
        responses={200: {"content": {"image/png": {}}}} | REFUSALS,
    )
    async def edit_images(
        request: Request,
        until_answered: UntilAnswered,
        form: Annotated[EditForm, Form(media_type="multipart/form-data")],
        x_model_version: ModelVersion = None,
    ):
        """Edit images as the prompt says. A result has its image's size, is upright, and keeps its transparency."""
        files = [*form.image, *form.images]
        _check_form(form, files)
        version = front.choose(x_model_version, form.model)
        deadline = time.monotonic() + (form.deadline_s or longest_edit)
        until_answered.enter_context(front.places(request.scope["client_of_key"], len(files) * form.n))
        described = await front.describe(version, deadline)
        works: list[tuple[EditRequest, Source, tuple[int, int]]] = []
        for file in files:
            source = await _source(front, await file.read(), form.output_format)
            fitted = await front.in_thread(images.fit, source.rgb, described.max_side, described.multiple)
            first = front.complete(form, form.prompt, fitted)
            size = _size(form.size, source.rgb)
            works += [(replace(first, seed=(first.seed + k) % 2**63), source, size) for k in range(form.n)]

        async def work(wanted: EditRequest, source: Source, size: tuple[int, int]) -> tuple[Made, bytes, str]:
            made = await front.edit(version, wanted, deadline, "num_inference_steps")
            return made, *await front.finish(wanted, source, made, form.output_format, size)

        results = await _all(work(*one) for one in works)
        wanted, made = works[0][0], results[0][0]
        made_by = {
            "seed": wanted.seed,
            "guidance_scale": wanted.guidance_scale,
            "image_guidance_scale": wanted.image_guidance_scale,
            "num_inference_steps": wanted.steps,
        }
        if form.response_format == "png":
            told = made_by | {"model_version": made.engine.version, "edit_id": results[0][2]}
            headers = {f"x-{name.replace('_', '-')}": str(value) for name, value in told.items()}
            return Response(results[0][1], media_type="image/png", headers=headers)
        data = [
            EditedImage(b64_json=base64.b64encode(picture).decode(), seed=wanted.seed, edit_id=edit_id)
            for (wanted, _, _), (_, picture, edit_id) in zip(works, results)
        ]
        return EditResponse(
            created=int(time.time()),
            data=data,
            model=made.engine.version,
            output_format=form.output_format,
            **made_by,
        )


def _add_edits(api: FastAPI, front: Front, longest_edit: float) -> None:
    @api.post(
        "/v1/edits",
        response_model=EditsResponse,
        responses={200: {"content": {"text/event-stream": {}}}} | REFUSALS,
    )
    async def edit(
        request: Request, until_answered: UntilAnswered, asked: EditsRequest, x_model_version: ModelVersion = None
    ):
        """Several edits of one image. With `stream` by events: `progress`, `preview`, `result`, `error`, `done`."""
        version = front.choose(x_model_version, asked.model)
        deadline = time.monotonic() + (asked.deadline_s or longest_edit)
        until_answered.enter_context(front.places(request.scope["client_of_key"], len(asked.edits)))
        described = await front.describe(version, deadline)
        source = await _source(front, _from_base64(asked.image), asked.output_format)
        fitted = await front.in_thread(images.fit, source.rgb, described.max_side, described.multiple)
        works = [front.complete(one, one.instruction, fitted) for one in asked.edits]

        async def result(index: int, made: Made) -> Edited:
            wanted, size = works[index], (source.rgb.shape[0], source.rgb.shape[1])
            picture, edit_id = await front.finish(wanted, source, made, asked.output_format, size)
            return Edited(
                edit_id=edit_id,
                index=index,
                instruction=wanted.instruction,
                guidance_scale=wanted.guidance_scale,
                image_guidance_scale=wanted.image_guidance_scale,
                num_inference_steps=wanted.steps,
                negative_prompt=wanted.negative_prompt,
                seed=wanted.seed,
                solver=wanted.solver,
                model=made.engine.version,
                image=base64.b64encode(picture).decode(),
            )

        async def work(index: int) -> Edited:
            return await result(index, await front.edit(version, works[index], deadline, f"edits.{index}"))

        async def follow(index: int, tell: Tell) -> None:
            moves = front.follow(version, works[index], deadline, f"edits.{index}", asked.preview_every)
            async with contextlib.aclosing(moves):
                async for event in moves:
                    if isinstance(event, Made):
                        tell("result", (await result(index, event)).model_dump())
                        continue
                    where = {"index": index, "step": event.step, "steps": works[index].steps}
                    tell("progress", where)
                    if event.preview is not None:
                        picture = await front.in_thread(images.encode, event.preview, asked.output_format)
                        tell("preview", where | {"image": base64.b64encode(picture).decode()})

        if asked.stream:
            events = _events(len(works), follow)
            return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        edits = await _all(work(index) for index in range(len(works)))
        return EditsResponse(created=int(time.time()), model=edits[0].model, edits=edits)


def _check_form(form: EditForm, files: list[UploadFile]) -> None:
    if form.mask is not None:
        raise RefusedError("mask: not supported: leave it out, the instruction says what changes", 400, param="mask")
    if not files:
        raise RefusedError("image: field required: send a PNG, JPEG or WebP file", 400, param="image")
    if len(files) > MAX_IMAGES:
        raise RefusedError(f"image: {len(files)} images, more than {MAX_IMAGES}: send fewer", 400, param="image")
    if form.response_format == "png" and (len(files) * form.n > 1 or form.output_format != "png"):
        raise RefusedError(
            "response_format: png holds one PNG: ask for b64_json, or for one image", 400, param="response_format"
        )


def _size(size: str, image: np.ndarray) -> tuple[int, int]:
    """(H, W) of the result: the image's own, or the largest of its aspect that fits. Raises `RefusedError`."""
    height, width = image.shape[:2]
    if size == "auto":
        return height, width
    numbers = re.fullmatch("([1-9][0-9]{0,3})x([1-9][0-9]{0,3})", size)
    if not numbers or max(map(int, numbers.groups())) > MAX_SIDE:
        raise RefusedError(f"size {size!r}: auto, or WIDTHxHEIGHT with at most {MAX_SIDE} a side", 400, param="size")
    scale = min(int(numbers[1]) / width, int(numbers[2]) / height)
    return max(1, round(height * scale)), max(1, round(width * scale))


async def _source(front: Front, data: bytes, format: OutputFormat) -> Source:
    """Raises `RefusedError`."""
    if len(data) > MAX_IMAGE_BYTES:
        raise RefusedError(
            f"image: {len(data)} bytes, more than {MAX_IMAGE_BYTES}: send a smaller file", 413, param="image"
        )
    source = await front.read(data, "image")
    if format == "jpeg" and source.alpha is not None:
        raise RefusedError(
            "output_format: the image is transparent in parts, which jpeg can't hold: ask for png or webp",
            400,
            param="output_format",
        )
    return source


def _from_base64(text: str) -> bytes:
    """Bytes of base64, or of a data: URL. Raises `RefusedError`."""
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise RefusedError("image: a data: URL of an image reads data:image/png;base64,…", 400, param="image")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RefusedError(f"image: not base64 ({error}): send the file in base64", 400, param="image") from error


async def _all(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order, made at once; the first that fails ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _events(edits: int, follow: Callable[[int, Tell], Awaitable[None]]) -> AsyncIterator[str]:
    """Server-sent events of edits that move on together; one that fails does not end the others."""
    ready: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue()

    def tell(event: str, data: dict[str, Any]) -> None:
        ready.put_nowait((event, data))

    async def one(index: int) -> None:
        try:
            await follow(index, tell)
        except RefusedError as error:
            tell("error", {"index": index, "message": error.message})
        except Exception as error:
            tell("error", {"index": index, "message": f"the edit failed ({type(error).__name__}): try again"})
            logger.exception("an edit failed")

    async def all_of_them() -> None:
        await asyncio.gather(*map(one, range(edits)))
        tell("done", {})

    task = asyncio.create_task(all_of_them())
    try:
        event = ""
        while event != "done":
            event, data = await ready.get()
            yield f"event: {event}\ndata: {json.dumps(data)}\n\n"
    finally:
        task.cancel()
