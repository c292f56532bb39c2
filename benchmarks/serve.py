"""The endpoint beside its peers: one skeleton, one model, one run, real HTTP.

    engine        our batch engine, mixed as requests come
    one by one    diffusers' StableDiffusionInstructPix2PixPipeline, a request at a time
    equal ones    the same pipeline with @serve.batch: requests of equal steps and scales that wait together

All three lie behind the same ingress with as many replicas of one thread, and answer the same requests: 10 to 50 steps,
scales from a small set. Closed loop: clients that ask again when they are answered. Open loop: requests that arrive at
random at a share of what the better peer can do. The bare engine edits the same without any HTTP.
`--recipe` and any key of a recipe say what is measured; the last line of `--json` is one JSON object.
"""

import asyncio
import base64
import json
import os
import random
import socket
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import CliImplicitFlag
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig
from rich.console import Console
from rich.table import Table

from ip2p import images
from ip2p.cli import load_settings
from ip2p.edit.editor import Editor, EditRequest
from ip2p.edit.editors import load_editor
from ip2p.edit.names import SHIPPED
from ip2p.miniature.render import render
from ip2p.miniature.triplets import draw_triplet
from ip2p.recipe import Recipe, locate
from runtime.connect import connect
from serve.app import EditIngress, application
from serve.engine_client import Description, EditResult
from serve.feedback import SECRET_BYTES

STEPS = (10, 20, 30, 50)
SHORT = STEPS[0]
GUIDANCE, IMAGE_GUIDANCE = (3.0, 4.0, 6.0), (1.5, 2.0)
OURS, ONE, EQUAL = "engine", "one by one", "equal ones"
ONE_THREAD = {"num_cpus": 0.1, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}


class Flags(BaseModel):
    model_config = ConfigDict(populate_by_name=True)  # a field can not be called json

    clients: int = Field(16, ge=1, description="that ask at once in the closed loop")
    requests: int = Field(96, ge=16, description="edits of each way in each round")
    rounds: int = Field(3, ge=1, description="timed repetitions, the ways in turn; the median counts")
    engines: int = Field(os.cpu_count() or 1, ge=1, description="replicas of one thread, of each way")
    arrivals: float = Field(0.8, gt=0, description="of the open loop, as a share of the better peer's throughput")
    json_line: CliImplicitFlag[bool] = Field(False, alias="json", description="print one JSON object as the last line")


# ---- what is asked


@dataclass(frozen=True)
class Asked:
    picture: str  # base64
    edit: dict[str, Any]

    @property
    def body(self) -> dict[str, Any]:
        return {"image": self.picture, "edits": [self.edit]}

    def request(self, recipe: Recipe) -> EditRequest:
        """The same for the bare engine."""
        edit = self.edit
        image = images.decode(base64.b64decode(self.picture))
        scales = (edit["guidance_scale"], edit["image_guidance_scale"])
        steps, seed = edit["num_inference_steps"], edit["seed"]
        return EditRequest(image, edit["instruction"], *scales, steps=steps, seed=seed, solver=recipe.sampling.solver)


def draw_requests(count: int, seed: int) -> list[Asked]:
    """Scenes with their instructions, each number of steps equally often."""
    rng = random.Random(f"serve {seed}")
    steps = [STEPS[k % len(STEPS)] for k in range(count)]
    rng.shuffle(steps)
    asked = []
    for k in range(count):
        drawn = draw_triplet(rng, held_out=True)
        edit = {
            "instruction": drawn.instruction,
            "num_inference_steps": steps[k],
            "guidance_scale": rng.choice(GUIDANCE),
            "image_guidance_scale": rng.choice(IMAGE_GUIDANCE),
            "seed": rng.randrange(2**31),
        }
        asked.append(Asked(base64.b64encode(images.encode(render(drawn.scene))).decode(), edit))
    return asked


# ---- the peers


class Pipeline:
    """diffusers' pipeline, warm, as an engine of the ingress."""

    def __init__(self, recipe: Recipe):
        from diffusers import StableDiffusionInstructPix2PixPipeline

        loaded = load_editor(recipe, None, SHIPPED)  # its sizes, and the device that a recipe means
        editor = Editor(loaded, max_side=recipe.sampling.max_side)
        self.description = Description(SHIPPED, editor.max_side, editor.multiple)
        path = locate(recipe.models.editor.path)
        pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(path, torch_dtype=loaded.dtype)
        self.pipeline = pipeline.to(loaded.device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.batch_size = recipe.serve.batch_size
        self.run([EditRequest(np.zeros((editor.max_side,) * 2 + (3,), np.uint8), "warm up", steps=1)] * self.batch_size)

    async def describe(self) -> Description:
        return self.description

    def run(self, requests: list[EditRequest]) -> list[np.ndarray]:
        """Edits of equal steps and scales."""
        first = requests[0]
        results = self.pipeline(
            [request.instruction for request in requests],
            image=[Image.fromarray(request.image) for request in requests],
            num_inference_steps=first.steps,
            guidance_scale=first.guidance_scale,
            image_guidance_scale=first.image_guidance_scale,
            generator=[torch.Generator().manual_seed(request.seed) for request in requests],
        ).images
        return [np.asarray(result) for result in results]


@serve.deployment
class OneByOne(Pipeline):
    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        self.turn = asyncio.Lock()

    async def edit(self, request: EditRequest, seconds: float) -> EditResult:  # noqa: ARG002
        since = time.monotonic()
        async with self.turn:
            waited = time.monotonic() - since
            (result,) = await asyncio.to_thread(self.run, [request])
        return EditResult(result, self.description, waited)


@serve.deployment
class EqualOnes(Pipeline):
    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        self.together.set_max_batch_size(self.batch_size)

    async def edit(self, request: EditRequest, seconds: float) -> EditResult:  # noqa: ARG002
        return EditResult(await self.together(request), self.description, 0.0)

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.02)
    async def together(self, requests: list[EditRequest]) -> list[np.ndarray]:
        groups: dict[tuple, list[int]] = {}
        for k, request in enumerate(requests):
            key = (request.steps, request.guidance_scale, request.image_guidance_scale, request.image.shape)
            groups.setdefault(key, []).append(k)
        results: dict[int, np.ndarray] = {}
        for indices in groups.values():
            made = await asyncio.to_thread(self.run, [requests[k] for k in indices])
            results |= dict(zip(indices, made))
        return [results[k] for k in range(len(requests))]


def serve_all(recipe: Recipe, port: int) -> dict[str, str]:
    """Each way's address."""
    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    serve.start(http_options=HTTPOptions(port=port))
    engines, _ = recipe.serve.replicas
    apps = {OURS: application(recipe, None, None, ONE_THREAD)}
    for name, peer in ((ONE, OneByOne), (EQUAL, EqualOnes)):
        many = peer.options(num_replicas=engines, ray_actor_options=ONE_THREAD, max_ongoing_requests=64)
        apps[name] = EditIngress.bind(recipe, None, {SHIPPED: many.bind(recipe)}, None, None, bytes(SECRET_BYTES))
    routes = {name: "/" + name.replace(" ", "-") for name in apps}
    for name, app in apps.items():
        serve.run(app, name=routes[name][1:], route_prefix=routes[name], logging_config=quiet)
    return {name: f"http://127.0.0.1:{port}{route}" for name, route in routes.items()}


# ---- load


@dataclass
class Load:
    """What a round of requests gave."""

    seconds: float
    latencies: list[tuple[int, float]] = field(default_factory=list)  # steps, seconds

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.seconds

    def p95(self, steps: int) -> float:
        return float(np.percentile([seconds for of, seconds in self.latencies if of == steps], 95))


async def ask(client: httpx.AsyncClient, address: str, asked: Asked) -> np.ndarray:
    answer = await client.post(f"{address}/v1/edits", json=asked.body)
    answer.raise_for_status()
    return images.decode(base64.b64decode(answer.json()["edits"][0]["image"]))


def loaded(address: str, requests: list[Asked], drive: Callable[..., Any]) -> Load:
    async def run() -> Load:
        load = Load(0.0)
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=600, limits=limits) as client:

            async def timed(asked: Asked) -> None:
                began = time.perf_counter()
                await ask(client, address, asked)
                load.latencies.append((asked.edit["num_inference_steps"], time.perf_counter() - began))

            began = time.perf_counter()
            await drive(requests, timed)
            load.seconds = time.perf_counter() - began
        return load

    return asyncio.run(run())


def closed_loop(clients: int) -> Callable[..., Any]:
    async def drive(requests: list[Asked], timed: Callable[[Asked], Any]) -> None:
        left = iter(requests)

        async def client() -> None:
            for asked in left:
                await timed(asked)

        await asyncio.gather(*(client() for _ in range(clients)))

    return drive


def open_loop(rate: float) -> Callable[..., Any]:
    """Requests at random times, `rate` a second on average, whether or not others have been answered."""

    async def drive(requests: list[Asked], timed: Callable[[Asked], Any]) -> None:
        rng = random.Random("arrivals")
        async with asyncio.TaskGroup() as group:
            for asked in requests:
                group.create_task(timed(asked))
                await asyncio.sleep(rng.expovariate(rate))

    return drive


# ---- the bare engine

_editor: Editor | None = None


def _load(recipe: Recipe) -> None:
    global _editor
    torch.set_num_threads(1)
    _editor = Editor(load_editor(recipe, None, SHIPPED), recipe.serve.batch_size, recipe.sampling.max_side)


def _edit(requests: list[EditRequest]) -> float:
    assert _editor is not None
    began = time.perf_counter()
    _editor.edit(requests)
    return time.perf_counter() - began


# ---- the report


def measure(recipe: Recipe, flags: Flags, port: int) -> dict[str, float]:
    section = recipe.serve.model_dump() | {"replicas": (flags.engines, flags.engines)}
    recipe = recipe.model_copy(update={"serve": recipe.serve.model_validate(section)})
    connect()
    addresses = serve_all(recipe, port)
    warm = draw_requests(2 * flags.clients, seed=-1)
    closed: dict[str, list[Load]] = {name: [] for name in addresses}
    bare: list[float] = []
    with ProcessPoolExecutor(flags.engines, get_context("spawn"), _load, (recipe,)) as pool:
        list(pool.map(_edit, [[asked.request(recipe) for asked in warm[:4]]] * flags.engines))
        for address in addresses.values():
            loaded(address, warm, closed_loop(flags.clients))
        for turn in range(flags.rounds):
            asked = draw_requests(flags.requests, seed=turn)
            for name, address in addresses.items():
                closed[name].append(loaded(address, asked, closed_loop(flags.clients)))
            requests = [one.request(recipe) for one in asked]
            began = time.perf_counter()
            list(pool.map(_edit, [requests[k :: flags.engines] for k in range(flags.engines)]))
            bare.append(len(asked) / (time.perf_counter() - began))
    rates = {name: statistics.median(load.rate for load in loads) for name, loads in closed.items()}
    better = max(rates[ONE], rates[EQUAL])
    asked = draw_requests(flags.requests, seed=99)
    opened = {name: loaded(a, asked, open_loop(flags.arrivals * better)) for name, a in addresses.items()}
    report(flags, closed, opened, bare)
    ratio = [o.rate / max(x.rate, y.rate) for o, x, y in zip(closed[OURS], closed[ONE], closed[EQUAL])]
    short = [
        min(x.p95(SHORT), y.p95(SHORT)) / o.p95(SHORT) for o, x, y in zip(*(closed[n] for n in (OURS, ONE, EQUAL)))
    ]
    where = "gpu" if torch.cuda.is_available() and recipe.device != "cpu" else "cpu"
    return {
        f"throughput_ratio_{where}": statistics.median(ratio),
        "p95_short_ratio": statistics.median(short),
        "p95_short_ratio_open": min(opened[ONE].p95(SHORT), opened[EQUAL].p95(SHORT)) / opened[OURS].p95(SHORT),
        "engine_share": statistics.median(o.rate / b for o, b in zip(closed[OURS], bare)),
        "edits_per_second": rates[OURS],
        "edits_per_second_one_by_one": rates[ONE],
        "edits_per_second_equal_ones": rates[EQUAL],
        "edits_per_second_bare": statistics.median(bare),
    }


def report(flags: Flags, closed: dict[str, list[Load]], opened: dict[str, Load], bare: list[float]) -> None:
    table = Table("way", "edits/s", "min", "max", "p95, 10 steps", "p95, 50 steps", "open loop: p95, 10 steps")
    for name, loads in closed.items():
        values = [load.rate for load in loads]
        middle = [statistics.median(load.p95(steps) for load in loads) for steps in (SHORT, STEPS[-1])]
        cells = [f"{x:.2f}" for x in (statistics.median(values), min(values), max(values))]
        table.add_row(name, *cells, *(f"{x:.2f} s" for x in (*middle, opened[name].p95(SHORT))))
    table.add_row("bare engine", *(f"{x:.2f}" for x in (statistics.median(bare), min(bare), max(bare))))
    table.title = f"{flags.clients} clients, {flags.engines} engines of one thread each"
    table.caption = f"{flags.requests} edits of {min(STEPS)} to {max(STEPS)} steps, median of {flags.rounds} rounds"
    Console().print(table)


def main(argv: list[str] | None = None) -> None:
    recipe, _, flags = load_settings(__doc__ or "", Flags, argv=argv, needs=("models.editor",))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        found = measure(recipe, flags, port)
    finally:
        serve.shutdown()
    if flags.json_line:
        print(json.dumps({name: round(value, 4) for name, value in found.items()}))


if __name__ == "__main__":
    main()
