"""The editor behind HTTP on Ray Serve: POST /v1/images/edits, GET /healthz, and a page to try it at /.

Serves the editor of --workspace when it has one, else the recipe's shipped editor.
"""

import asyncio
import base64
import secrets
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import ray
from fastapi import FastAPI, Form, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig, HTTPOptions
from starlette.exceptions import HTTPException

from cluster.connect import connect
from ip2p import images
from ip2p.cli import load_settings, read_recipe
from ip2p.diffusion.solvers import plan
from ip2p.edit.editor import Editor, EditRequest
from ip2p.evaluate.editors import available, load_editor
from ip2p.evaluate.sweep import SHIPPED
from ip2p.recipe import Recipe, locate
from ip2p.workspace import Workspace
from serve.schema import (
    MAX_IMAGE_BYTES,
    Defaults,
    EditedImage,
    EditForm,
    EditResponse,
    ErrorResponse,
    Health,
    Problem,
)

PAGE = Path(__file__).with_name("page.html")
BATCH_SIZE = 8  # edits in one UNet call
ONGOING, QUEUED = 16, 64  # requests at the replica, and waiting for it
LONGEST_EDIT = 120  # seconds that a replica may finish its edits in when it is asked to stop

api = FastAPI(title="ip2p", summary="Edit images by written instructions", docs_url="/docs")


class BadRequestError(Exception):
    """Something in the request is wrong: what, and in which field."""

    def __init__(self, message: str, param: str | None, status: int = 400):
        super().__init__(message)
        self.problem, self.status = Problem(message=message, param=param), status


@api.exception_handler(BadRequestError)
async def _bad_request(_: Request, error: BadRequestError) -> JSONResponse:
    return JSONResponse(ErrorResponse(error=error.problem).model_dump(), status_code=error.status)


@api.exception_handler(RequestValidationError)
async def _bad_fields(_: Request, error: RequestValidationError) -> JSONResponse:
    """One line for every field that is wrong; without the input itself, which may be a whole file."""
    problems = [(str(problem["loc"][-1]), problem["msg"]) for problem in error.errors()]
    message = "; ".join(f"{field}: {text}" for field, text in problems)
    return JSONResponse(
        ErrorResponse(error=Problem(message=message, param=problems[0][0])).model_dump(), status_code=400
    )


@api.exception_handler(HTTPException)
async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    message = (
        f"{request.method} {request.url.path}: {error.detail}; there are POST /v1/images/edits, GET /healthz and /docs"
    )
    return JSONResponse(ErrorResponse(error=Problem(message=message)).model_dump(), error.status_code, error.headers)


@serve.deployment(
    max_ongoing_requests=ONGOING,
    max_queued_requests=QUEUED,
    backpressure_config=BackpressureConfig(status_code=429, retry_after_s=2),
    graceful_shutdown_timeout_s=LONGEST_EDIT,
)
@serve.ingress(api)
class EditService:
    """Holds the editor; requests that wait together are denoised together, whatever their scales and steps."""

    def __init__(self, recipe: Recipe, workspace: Workspace | None):
        self.sampling = recipe.sampling
        self.name = available(workspace)[0]
        self.editor = Editor(load_editor(recipe, workspace, self.name), BATCH_SIZE, recipe.sampling.max_side)
        warm_up = np.zeros((self.editor.max_side, self.editor.max_side, 3), np.uint8)
        self.editor.edit([EditRequest(warm_up, "warm up", steps=1, solver=recipe.sampling.solver)])

    @api.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page(self) -> str:
        return PAGE.read_text()

    @api.get("/healthz")
    async def healthz(self) -> Health:
        """Answers once the model is loaded and warm."""
        return Health(model=self.name)

    @api.get("/v1/defaults")
    async def defaults(self) -> Defaults:
        """The values of fields that a request leaves out."""
        sampling = self.sampling
        return Defaults(
            model=self.name,
            guidance_scale=sampling.guidance_scale,
            image_guidance_scale=sampling.image_guidance_scale,
            num_inference_steps=sampling.steps,
        )

    @api.post(
        "/v1/images/edits",
        response_model=EditResponse,
        responses={
            200: {"content": {"image/png": {}}},
            400: {"model": ErrorResponse},
            413: {"model": ErrorResponse},
            429: {"description": "too many requests are waiting; try again after Retry-After seconds"},
        },
    )
    async def edit(self, form: Annotated[EditForm, Form(media_type="multipart/form-data")]):
        """Edit an image as the prompt says. The result has the image's size, is upright, and keeps its transparency."""
        if (form.image.size or 0) > MAX_IMAGE_BYTES:
            message = f"image: {form.image.size} bytes, more than {MAX_IMAGE_BYTES}: send a smaller file"
            raise BadRequestError(message, "image", status=413)
        data = await form.image.read()
        try:
            # Decoding a large photo takes long enough to keep other requests waiting.
            image = await asyncio.to_thread(images.decode, data)
            alpha = await asyncio.to_thread(images.decode_alpha, data)
        except ValueError as error:
            raise BadRequestError(f"image: {error}", "image") from error
        wanted = self.complete(form, image)
        result = await self.edit_together(wanted)
        png = await asyncio.to_thread(images.encode, result, "png", alpha)
        made_by = {
            "seed": wanted.seed,
            "guidance_scale": wanted.guidance_scale,
            "image_guidance_scale": wanted.image_guidance_scale,
            "num_inference_steps": wanted.steps,
        }
        if form.response_format == "png":
            headers = {f"x-{name.replace('_', '-')}": str(value) for name, value in made_by.items()}
            return Response(png, media_type="image/png", headers=headers)
        edited = EditedImage(b64_json=base64.b64encode(png).decode())
        return EditResponse(created=int(time.time()), data=[edited], **made_by)

    def complete(self, form: EditForm, image: np.ndarray) -> EditRequest:
        """The request with the recipe's values where the form has none. Raises `BadRequestError`."""
        sampling = self.sampling
        steps = form.num_inference_steps or sampling.steps
        try:
            plan(self.editor.schedule, sampling.solver, steps)
        except ValueError as error:
            raise BadRequestError(str(error), "num_inference_steps") from error
        s_text, s_image = form.guidance_scale, form.image_guidance_scale
        return EditRequest(
            image=image,
            instruction=form.prompt,
            guidance_scale=sampling.guidance_scale if s_text is None else s_text,
            image_guidance_scale=sampling.image_guidance_scale if s_image is None else s_image,
            steps=steps,
            seed=secrets.randbelow(2**31) if form.seed is None else form.seed,
            solver=sampling.solver,
        )

    @serve.batch(max_batch_size=BATCH_SIZE, batch_wait_timeout_s=0.02)
    async def edit_together(self, wanted: list[EditRequest]) -> list[np.ndarray]:
        """One batch at a time, off the event loop."""
        return await asyncio.to_thread(self.editor.edit, wanted)


class Flags(BaseModel):
    host: str = Field(default="127.0.0.1", description="address to listen at; 0.0.0.0 for all")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen at")


class ApplicationArgs(BaseModel):
    """`args` of the application in a Serve config file."""

    model_config = ConfigDict(extra="forbid")

    recipe: str = Field(description="recipe file, looked up in the current directory and then in the repository")
    workspace: str | None = Field(default=None, description="folder of the run whose editor is served, if it has one")


def build(args: ApplicationArgs) -> Application:
    """The application for a Serve config file (`import_path: serve.app:build`), whose deployments say what it needs.

    Raises `ValueError` when the recipe is wrong, or there is no editor to serve.
    """
    recipe, workspace = read_recipe(args.recipe), Workspace(args.workspace) if args.workspace else None
    check(recipe, workspace)
    return EditService.bind(recipe, workspace)


def check(recipe: Recipe, workspace: Workspace | None) -> None:
    """Raises `ValueError`, naming the key, when the shipped editor is to be served and is not there."""
    if available(workspace)[0] == SHIPPED:
        locate(recipe.models.editor.path, "models.editor.path")


def start(recipe: Recipe, workspace: Workspace | None, host: str, port: int) -> None:
    """Start the endpoint on the Ray that runs, or on a local one; returns when it is ready."""
    check(recipe, workspace)
    connect()
    gpu = recipe.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    serve.start(http_options=HTTPOptions(host=host, port=port))
    resources = {"num_gpus": 1} if gpu else {"num_cpus": 1}
    serve.run(EditService.options(ray_actor_options=resources).bind(recipe, workspace), name="ip2p", route_prefix="/")


def main(argv: list[str] | None = None) -> None:
    recipe, workspace, flags = load_settings(__doc__ or "", extra=Flags, argv=argv, needs=())
    try:
        start(recipe, workspace, flags.host, flags.port)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(
        f"serving the {available(workspace)[0]} editor at http://{flags.host}:{flags.port}/  (Ctrl-C ends)", flush=True
    )
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        serve.shutdown()


if __name__ == "__main__":
    main()
