"""The editor behind HTTP on Ray Serve: POST /v1/images/edits as OpenAI's, POST /v1/edits, and a page to try it at /.

An ingress (no model) reads requests and asks engines, which keep one UNet full with everybody's edits.
Serves the editor of --workspace when it has one, else the recipe's shipped editor. Clients need a key of --keys, unless
--open says that this machine alone is served.
"""

import asyncio
import hashlib
import ipaddress
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import ray
from pyarrow.fs import FileSelector, FileType
from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import CliImplicitFlag
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig, HTTPOptions
from ray.util.metrics import Gauge

from ip2p.cli import load_settings, read_recipe
from ip2p.edit.editor import Editor, EditRequest
from ip2p.edit.editors import load_editor
from ip2p.edit.names import SHIPPED, available, version_folder
from ip2p.errors import UserError
from ip2p.recipe import Recipe, locate
from ip2p.workspace import Workspace
from runtime.connect import connect
from serve.batcher import Batcher, Job
from serve.feedback import signing_secret
from serve.front import Description, Front, Made, Moved
from serve.keys import Clients, Key, read_keys
from serve.routes import make_api

LONGEST_EDIT = 120  # seconds that a replica may finish its edits in when it is asked to stop
REQUESTS = 4096  # at an ingress: far more than edits, so that it can answer that there are too many


@serve.deployment(
    ray_actor_options={"num_cpus": 0.1},
    max_ongoing_requests=REQUESTS,
    max_queued_requests=REQUESTS,
    backpressure_config=BackpressureConfig(status_code=429, retry_after_s=2),
    graceful_shutdown_timeout_s=LONGEST_EDIT + 30,
    max_surge_percent=25,
)
@serve.ingress()
class EditIngress:
    """Keys, limits, pictures, and edits begun anew when their engine dies: all but the model."""

    def __init__(
        self,
        recipe: Recipe,
        workspace: Workspace | None,
        engines: dict[str, Any],
        keys: list[Key] | None,
        secret: bytes,
    ):
        shares = dict.fromkeys(engines, 1.0)
        if canary := recipe.serve.canary:
            main = next(iter(engines))
            shares = {main: 1 - canary.share, canary.version: canary.share}
        self.front = Front(recipe, workspace, engines, shares, secret)
        self.clients = Clients(keys, recipe.serve.ingresses)

    def __serve_build_asgi_app__(self):
        return make_api(self.front, self.clients, LONGEST_EDIT)


@serve.deployment(
    graceful_shutdown_timeout_s=LONGEST_EDIT,
    health_check_period_s=5,
    max_surge_percent=25,
)
class EditService:
    """One editor, warm when it is up. `label` tells one state of a version from another."""

    def __init__(self, recipe: Recipe, workspace: Workspace | None, version: str, label: str):
        settings = recipe.serve
        self.editor = Editor(load_editor(recipe, workspace, version), settings.batch_size, recipe.sampling.max_side)
        warm_up = np.zeros((self.editor.max_side, self.editor.max_side, 3), np.uint8)
        for edits in (1, settings.batch_size):
            self.editor.edit([EditRequest(warm_up, "warm up", steps=1, solver=recipe.sampling.solver)] * edits)
        self.description = Description(label, self.editor.max_side, self.editor.multiple)
        self.batcher = Batcher(self.editor)
        self.gauges = {
            what: Gauge(f"ip2p_serve_{what}", f"edits {what} at an engine", ("version",))
            for what in ("running", "waiting")
        }

    def check_health(self) -> None:
        """Serve replaces an engine that fails this."""
        self.batcher.check()
        for what, gauge in self.gauges.items():
            gauge.set(getattr(self.batcher, what), {"version": self.description.version})

    async def describe(self) -> Description:
        return self.description

    async def edit(self, request: EditRequest, seconds: float) -> Made:
        """Raises `LateError` after `seconds`, `ValueError` for what can't be done, `DeadEngineError`."""
        async for event in self.follow(request, seconds):
            if isinstance(event, Made):
                return event
        raise AssertionError

    async def follow(
        self, request: EditRequest, seconds: float, preview_every: int | None = None
    ) -> AsyncIterator[Moved | Made]:
        """`edit` as it moves on; with `preview_every` None it tells only the end.

        Steps that nobody has been told of are told as one. Whoever stops listening frees the place.
        """
        loop, woken = asyncio.get_running_loop(), asyncio.Event()
        moves: list[Moved] = []
        ends: list[np.ndarray | Exception] = []

        def move(moved: Moved) -> None:
            if moves and moves[-1].preview is None:
                moves.pop()
            moves.append(moved)
            woken.set()

        def end(result: np.ndarray | Exception) -> None:
            ends.append(result)
            woken.set()

        job = Job(
            request,
            done=lambda result: loop.call_soon_threadsafe(end, result),
            deadline=time.monotonic() + seconds,
        )
        if preview_every is not None:
            job.preview_every = preview_every
            job.moved = lambda step, preview: loop.call_soon_threadsafe(move, Moved(step, preview))
        self.batcher.submit(job)
        try:
            while not ends:
                await woken.wait()
                woken.clear()
                while moves:
                    yield moves.pop(0)
        finally:
            if not ends:
                self.batcher.cancel(job)
        if isinstance(ends[0], Exception):
            raise ends[0]
        assert job.started is not None
        yield Made(ends[0], self.description, job.started - job.since)


class Flags(BaseModel):
    host: str = Field(default="127.0.0.1", description="address to listen at; 0.0.0.0 for all")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen at")
    keys: str | None = Field(default=None, description="file of the clients' keys; python -m serve.keys makes one")
    open: CliImplicitFlag[bool] = Field(default=False, description="no keys: this machine alone is served")


class ApplicationArgs(BaseModel):
    """`args` of the application in a Serve config file."""

    model_config = ConfigDict(extra="forbid")

    recipe: str = Field(description="recipe file, looked up in the current directory and then in the repository")
    workspace: str | None = Field(default=None, description="folder of the run whose editor is served, if it has one")
    keys: str | None = Field(default=None, description="file of the keys; default: the text in IP2P_SERVE_KEYS")
    open: bool = Field(default=False, description="no keys: clients on the proxy's own machine alone are served")


def build(args: ApplicationArgs) -> Application:
    """The application for a Serve config file (`import_path: serve.app:build`), whose deployments say what it needs.

    Raises `UserError` when the recipe is wrong, or there is no editor to serve, or no key.
    """
    recipe, workspace = read_recipe(args.recipe), Workspace(args.workspace) if args.workspace else None
    return application(recipe, workspace, None if args.open else read_keys(args.keys))


def application(
    recipe: Recipe, workspace: Workspace | None, keys: list[Key] | None, engine_resources: dict[str, Any] | None = None
) -> Application:
    """The ingress and its engines. keys None: open. Raises `UserError` when there is no editor to serve."""
    settings = recipe.serve
    main = settings.version or available(workspace)[0]
    versions = {main: EditService.name}  # by the name of its deployment
    if settings.canary:
        if settings.canary.version == main:
            raise UserError(f"serve.canary.version: {main!r} is served to all already; name another version")
        versions[settings.canary.version] = f"{EditService.name}Canary"
    engine = EditService.options(
        max_ongoing_requests=2 * settings.batch_size,  # the next are there when places get free
        max_queued_requests=settings.queue,
        num_replicas="auto",
        autoscaling_config=autoscaling(recipe),
    )
    if engine_resources:
        engine = engine.options(ray_actor_options=engine_resources)
    engines = {
        version: engine.options(name=name).bind(recipe, workspace, version, label(recipe, workspace, version))
        for version, name in versions.items()
    }
    ingress = EditIngress.options(num_replicas=settings.ingresses)
    return ingress.bind(recipe, workspace, engines, keys, signing_secret(workspace))


def autoscaling(recipe: Recipe) -> AutoscalingConfig:
    """Engines by edits that wait or are on their way: as many as keep every batch full."""
    fewest, most = recipe.serve.replicas
    return AutoscalingConfig(
        min_replicas=fewest,
        max_replicas=most,
        target_ongoing_requests=recipe.serve.batch_size,
        upscale_delay_s=5,
        downscale_delay_s=120,
    )


def label(recipe: Recipe, workspace: Workspace | None, version: str) -> str:
    """The version, with a hash of its files' sizes and times where it is a workspace's: one that has been trained anew
    is another, so Serve replaces the engines. Raises `UserError`, naming the key, when it is not there.
    """
    if version == SHIPPED:
        locate(recipe.models.editor.path, "models.editor.path")
        return version
    folder = version_folder(version)
    if workspace is None or not workspace.exists(*folder, "model_index.json"):
        where = f"{workspace.location}/{'/'.join(folder)}" if workspace else "there is no workspace"
        raise UserError(f"serve.version {version!r}: no editor in {where}; jobs.train writes one")
    infos = workspace.fs.get_file_info(FileSelector(workspace.path(*folder), recursive=True))
    facts = sorted((info.path, info.size, info.mtime_ns) for info in infos if info.type == FileType.File)
    return f"{version}@{hashlib.blake2b(repr(facts).encode(), digest_size=4).hexdigest()}"


def start(recipe: Recipe, workspace: Workspace | None, host: str, port: int, keys: list[Key] | None = None) -> None:
    """Start the endpoint on the Ray that runs, or on a local one, or change it; returns when it is ready.

    keys None: open, which only a loopback address may be. Raises `UserError`.
    """
    if keys is None and not (host == "localhost" or ipaddress.ip_address(host).is_loopback):
        raise UserError(f"--open serves this machine alone: --host 127.0.0.1, not {host}; or give --keys")
    connect()
    gpu = recipe.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    resources = {"num_gpus": 1} if gpu else {"num_cpus": 1}
    deployed = application(recipe, workspace, keys, resources)
    serve.start(http_options=HTTPOptions(host=host, port=port))
    serve.run(deployed, name="ip2p", route_prefix="/")


def main(argv: list[str] | None = None) -> None:
    recipe, workspace, flags = load_settings(__doc__ or "", extra=Flags, argv=argv, needs=())
    try:
        start(recipe, workspace, flags.host, flags.port, None if flags.open else read_keys(flags.keys))
    except ValueError as error:
        sys.exit(f"error: {error}")
    version = recipe.serve.version or available(workspace)[0]
    print(f"serving the {version} editor at http://{flags.host}:{flags.port}/  (Ctrl-C ends)", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        serve.shutdown()


if __name__ == "__main__":
    main()
