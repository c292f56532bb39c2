"""Serve an editor over HTTP: POST /v1/images/edits as OpenAI's API, POST /v1/edits, a page at /.

An ingress without a model reads requests and asks engines. Each engine fills one UNet with the
edits of many requests. The editor is the one that --workspace trained, or the recipe's shipped one.
Clients need a key from --keys, unless --open restricts the service to this machine.
"""

import asyncio
import errno
import hashlib
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
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
from runtime.connect import connect, uses_gpu
from runtime.exit import TerminatedError, exit_statuses
from serve import proxy
from serve.api import make_api
from serve.batcher import Batcher, Job
from serve.engine_client import Description, EditProgress, EditResult
from serve.feedback import SECRET_BYTES, workspace_secret
from serve.gateway import open_gateway
from serve.guard import is_loopback
from serve.keys import Clients, Key, read_keys

NAME = "ip2p"
LONGEST_EDIT = 120  # seconds that a stopping replica has to finish its edits
REQUESTS = 4096  # at an ingress: far more than edits, so that it can reject the excess itself


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
    """The HTTP side: keys, limits, pictures, and retries of edits whose engine died."""

    def __init__(
        self,
        recipe: Recipe,
        workspace: Workspace | None,
        engines: dict[str, Any],
        keys: list[Key] | None,
        keys_file: str | None,
        secret: bytes,
    ):
        shares = dict.fromkeys(engines, 1.0)
        if canary := recipe.serve.canary:
            main = next(iter(engines))
            shares = {main: 1 - canary.share, canary.version: canary.share}
        self.gateway = open_gateway(recipe, workspace, engines, shares, secret, LONGEST_EDIT)
        self.clients = Clients(keys, recipe.serve.ingresses, keys_file)

    def __serve_build_asgi_app__(self):
        return make_api(self.gateway, self.clients)

    async def drain(self) -> None:
        """Refuse new edits, and return when none is in flight."""
        await self.gateway.admission.drain()


@serve.deployment(
    graceful_shutdown_timeout_s=LONGEST_EDIT,
    health_check_period_s=5,
    max_surge_percent=25,
)
class EditService:
    """One editor, warmed up. `label` names the version and the state of its files."""

    def __init__(self, recipe: Recipe, workspace: Workspace | None, version: str, label: str):
        settings = recipe.serve
        self.editor = Editor(load_editor(recipe, workspace, version), settings.batch_size, recipe.sampling.max_side)
        warm_up = np.zeros((self.editor.max_side, self.editor.max_side, 3), np.uint8)
        for edits in (1, settings.batch_size):
            self.editor.edit([EditRequest(warm_up, "warm up", steps=1, solver=recipe.sampling.solver)] * edits)
        self.description = Description(label, self.editor.max_side, self.editor.multiple)
        self.batcher = Batcher(self.editor)
        self.gauges = {
            state: Gauge(f"ip2p_serve_{state}", f"edits {state} at an engine", ("version",))
            for state in ("running", "waiting")
        }

    def check_health(self) -> None:
        """Raises `DeadEngineError`, upon which Serve replaces this engine."""
        self.batcher.check()
        for state, gauge in self.gauges.items():
            gauge.set(getattr(self.batcher, state), {"version": self.description.version})

    async def describe(self) -> Description:
        return self.description

    async def edit(self, request: EditRequest, seconds: float) -> EditResult:
        """Return a completed edit.

        Raises `LateError` after `seconds`, `UserError` for what the model can't do, and
        `DeadEngineError`.
        """
        async for event in self.follow(request, seconds):
            if isinstance(event, EditResult):
                return event
        raise AssertionError

    async def follow(
        self, request: EditRequest, seconds: float, preview_every: int | None = None
    ) -> AsyncIterator[EditProgress | EditResult]:
        """Yield the progress of an edit, then its result.

        With `preview_every` None, yield only the result. Unread progress events are coalesced.
        Closing the iterator cancels the edit and frees its slot. Raises as `edit` does.
        """
        loop, woken = asyncio.get_running_loop(), asyncio.Event()
        unread: list[EditProgress] = []
        ends: list[np.ndarray | Exception] = []

        def advance(progress: EditProgress) -> None:
            # Of what was not read yet only the last preview is kept, if this one has none.
            unread[:] = [one for one in unread if one.preview is not None and progress.preview is None]
            unread.append(progress)
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
            job.moved = lambda step, preview: loop.call_soon_threadsafe(advance, EditProgress(step, preview))

        self.batcher.submit(job)
        try:
            while not ends:
                await woken.wait()
                woken.clear()
                while unread:
                    yield unread.pop(0)
        finally:
            if not ends:
                self.batcher.cancel(job)
        if isinstance(ends[0], Exception):
            raise ends[0]
        assert job.started is not None
        yield EditResult(ends[0], self.description, job.started - job.submitted)


class Flags(BaseModel):
    host: str = Field(default="127.0.0.1", description="address to listen at; 0.0.0.0 for all, with TLS")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen at")
    keys: str | None = Field(default=None, description="file of the clients' keys; python -m serve.keys makes one")
    open: CliImplicitFlag[bool] = Field(default=False, description="require no keys, and serve this machine only")
    tls_cert: str | None = Field(default=None, description="PEM file of the certificate: serve HTTPS")
    tls_key: str | None = Field(default=None, description="PEM file of the certificate's key")
    behind_tls: CliImplicitFlag[bool] = Field(
        default=False, description="a proxy in front ends TLS, so plain HTTP may leave this machine"
    )


class ApplicationArgs(BaseModel):
    """`args` of the application in a Serve config file."""

    model_config = ConfigDict(extra="forbid")

    recipe: str = Field(description="recipe file, looked up in the current directory and then in the repository")
    workspace: str | None = Field(default=None, description="folder of the run whose editor is served, if it has one")
    keys: str | None = Field(default=None, description="file of the keys; default: the text in IP2P_SERVE_KEYS")
    open: bool = Field(default=False, description="require no keys, and serve the proxy's own machine only")


def build(args: ApplicationArgs) -> Application:
    """Return the application for a Serve config file (`import_path: serve.app:build`).

    Serve calls this in a process connected to Ray. The config may override what a deployment asks
    for. Raises `UserError` when the recipe is wrong, or there is no editor to serve, or no key.
    """
    recipe, workspace = read_recipe(args.recipe), Workspace(args.workspace) if args.workspace else None
    if args.open:
        check_forwarding()
    keys = None if args.open else read_keys(args.keys)
    return application(recipe, workspace, keys, engine_resources(recipe), absolute(args.keys))


def absolute(path: str | None) -> str | None:
    return path and str(Path(path).absolute())


def engine_resources(recipe: Recipe) -> dict[str, Any]:
    """Return `ray_actor_options` of an engine, whichever version it serves."""
    return {"num_gpus": 1} if uses_gpu(recipe.device) else {"num_cpus": 1}


def application(
    recipe: Recipe,
    workspace: Workspace | None,
    keys: list[Key] | None,
    resources: dict[str, Any],
    keys_file: str | None = None,
) -> Application:
    """Return the ingress and its engines. resources: `ray_actor_options` of each engine.

    keys_file: where the keys come from, absolute. Ingresses that find it read it when it changes.
    Without keys the service is open. Raises `UserError` when there is no editor to serve.
    """
    settings = recipe.serve
    main = settings.version or available(workspace)[0]
    deployments = {main: EditService.name}  # names by version
    if settings.canary:
        if settings.canary.version == main:
            raise UserError(f"serve.canary.version: {main!r} is the main version already; name another one")
        deployments[settings.canary.version] = f"{EditService.name}Canary"
    engine = EditService.options(
        max_ongoing_requests=2 * settings.batch_size,  # a waiting edit takes a free slot at once
        max_queued_requests=settings.queue,
        num_replicas="auto",
        autoscaling_config=autoscaling(recipe),
        ray_actor_options=resources,
    )
    engines = {
        version: engine.options(name=name).bind(recipe, workspace, version, label(recipe, workspace, version))
        for version, name in deployments.items()
    }
    ingress = EditIngress.options(num_replicas=settings.ingresses)
    secret = workspace_secret(workspace) if workspace else None
    feedback_to = workspace if secret else None
    return ingress.bind(recipe, feedback_to, engines, keys, keys_file, secret or secrets.token_bytes(SECRET_BYTES))


def autoscaling(recipe: Recipe) -> AutoscalingConfig:
    """Scale engines by edits in flight, to as many as keep every batch full."""
    fewest, most = recipe.serve.replicas
    return AutoscalingConfig(
        min_replicas=fewest,
        max_replicas=most,
        target_ongoing_requests=recipe.serve.batch_size,
        upscale_delay_s=5,
        downscale_delay_s=120,
    )


def label(recipe: Recipe, workspace: Workspace | None, version: str) -> str:
    """Return the version, and for a workspace's version a hash of its files' sizes and times.

    A retrained version has another label, so Serve replaces its engines. Raises `UserError` when it
    does not exist.
    """
    if version == SHIPPED:
        locate(recipe.models.editor.path, "models.editor.path")
        return version
    folder = version_folder(version)
    if workspace is None or not workspace.exists(*folder, "model_index.json"):
        problem = f"no editor in {workspace.location}/{'/'.join(folder)}" if workspace else "no --workspace"
        raise UserError(f"serve.version: {version!r} can't be served: {problem}; jobs.train writes editors")
    infos = workspace.fs.get_file_info(FileSelector(workspace.path(*folder), recursive=True))
    facts = sorted((info.path, info.size, info.mtime_ns) for info in infos if info.type == FileType.File)
    return f"{version}@{hashlib.blake2b(repr(facts).encode(), digest_size=4).hexdigest()}"


def start(
    recipe: Recipe,
    workspace: Workspace | None,
    host: str,
    port: int,
    keys: list[Key] | None = None,
    keys_file: str | None = None,
    tls_cert: str | None = None,
    tls_key: str | None = None,
) -> None:
    """Deploy the endpoint, or a change to it, and return when it is ready.

    It runs on the cluster of RAY_ADDRESS, else on a local Ray.
    Without keys the service is open, and `host` must be a loopback address. Raises `UserError`.
    """
    if keys is None:
        check_open(host)
    if not ray.is_initialized() and not os.environ.get("RAY_ADDRESS"):
        check_port(host, port)
        proxy.install()
    connect()
    deployed = application(recipe, workspace, keys, engine_resources(recipe), absolute(keys_file))
    serve.start(http_options=HTTPOptions(host=host, port=port, ssl_certfile=tls_cert, ssl_keyfile=tls_key))
    serve.run(deployed, name=NAME, route_prefix="/")


def check_tls(flags: Flags) -> None:
    """Raises `UserError` if keys and pictures would cross a network unencrypted."""
    if bool(flags.tls_cert) != bool(flags.tls_key):
        raise UserError("--tls_cert and --tls_key belong together: give both")
    for flag, path in (("--tls_cert", flags.tls_cert), ("--tls_key", flags.tls_key)):
        if path and not os.access(path, os.R_OK):
            raise UserError(f"{flag} {path}: no such file, or not readable")
    if not (is_loopback(flags.host) or flags.open or flags.tls_cert or flags.behind_tls):
        raise UserError(
            f"--host {flags.host}: keys and pictures would cross the network unencrypted; give --tls_cert and "
            "--tls_key, or --behind_tls if a proxy in front ends TLS (cluster/nginx has one)"
        )


def check_open(host: str) -> None:
    """Raises `UserError` if others than this machine could use an endpoint without keys."""
    if not is_loopback(host):
        raise UserError(f"--open serves this machine only; use --host 127.0.0.1 instead of {host}, or pass --keys")
    check_forwarding()


def check_forwarding() -> None:
    """Raises `UserError` if uvicorn would believe any client that claims to be this machine."""
    if "*" in os.environ.get("FORWARDED_ALLOW_IPS", ""):
        raise UserError("FORWARDED_ALLOW_IPS=*: any client could claim to be this machine; unset it, or use keys")


def check_port(host: str, port: int) -> None:
    """Raises `UserError` if another process listens at the port.

    Ray's proxies share ports (SO_REUSEPORT), so two services would each get half of the requests.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger do no harm
        try:
            probe.bind(address)
            probe.listen()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(f"port {port} is in use; stop its service, or choose another --port") from error
            raise UserError(f"--host {host} --port {port}: {error.strerror}; choose others") from error


def drain() -> None:
    """Refuse new edits, wait for those in flight, and end the service."""
    ingress = serve.get_app_handle(NAME)
    try:
        ingress.broadcast("drain").results(timeout_s=LONGEST_EDIT + 30)
    finally:
        serve.shutdown()


def main(argv: list[str] | None = None) -> None:
    recipe, workspace, flags = load_settings(__doc__ or "", extra=Flags, argv=argv, needs=())
    with exit_statuses():
        check_tls(flags)
        keys = None if flags.open else read_keys(flags.keys)
        start(recipe, workspace, flags.host, flags.port, keys, flags.keys, flags.tls_cert, flags.tls_key)
        version = recipe.serve.version or available(workspace)[0]
        scheme = "https" if flags.tls_cert else "http"
        print(f"serving the {version} editor at {scheme}://{flags.host}:{flags.port}/  (Ctrl-C ends)", flush=True)
        try:
            while True:
                time.sleep(3600)
        except (KeyboardInterrupt, TerminatedError):
            print("ending: edits in flight are finished first  (Ctrl-C again ends at once)", flush=True)
            drain()


if __name__ == "__main__":
    main()
