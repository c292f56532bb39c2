"""Training beside its peers, each comparison in one run on the same model, pairs and threads.

    ahead    samples/s: latents encoded once, ahead of training, against encoding the images in every step
    sd15     the same at 256 px with Stable Diffusion 1.5's architecture and random weights, where the VAE is large:
             samples/s of the UNet forward and backward, and of encoding the pairs
    peer     samples/s: the job (Ray Train) with one worker and with two on the same cores, against a plain loop of
             diffusers and torch doing the same work

`--recipe` and any key of a recipe say what is measured; the last line of `--json` is one JSON object.
"""

import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from pyarrow.fs import LocalFileSystem
from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import CliImplicitFlag
from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ip2p import images
from ip2p.cli import load_settings
from ip2p.miniature.render import render
from ip2p.miniature.triplets import draw_triplet
from ip2p.models import TextToImage
from ip2p.recipe import Recipe
from ip2p.records import DATASET, caption_id
from ip2p.train.encode import PairEncoder, encode_pairs, token_ids
from ip2p.train.latents import Batch, LatentPairs, sample_indices, share, write_local_cache
from ip2p.workspace import Workspace
from jobs import train as job

Part = Literal["ahead", "sd15", "peer"]
SD15_BATCH = 2
Clock = Callable[[], None]  # called after every step


class Flags(BaseModel):
    model_config = ConfigDict(populate_by_name=True)  # a field can not be called json

    parts: list[Part] = Field(["ahead", "sd15", "peer"], description="what to measure")
    rows: int = Field(256, ge=2, description="rendered pairs to train on")
    timed_steps: int = Field(60, ge=3, description="steps that are timed, in three parts that end in a checkpoint")
    rounds: int = Field(3, ge=1, description="timed repetitions, peers in turn; the median counts")
    json_line: CliImplicitFlag[bool] = Field(False, alias="json", description="print one JSON object as the last line")


def rendered_pairs(count: int, side: int) -> list[dict[str, Any]]:
    """Rows of a dataset: edits of drawn scenes, resized to `side`."""
    rng = random.Random("training benchmark")
    rows = []
    for n in range(count):
        drawn = draw_triplet(rng, held_out=False)
        before, after = (
            images.encode(images.resize(render(scene), side, side)) for scene in (drawn.scene, drawn.edited_scene)
        )
        row = dict.fromkeys(DATASET.names) | {"pair_id": str(n), "caption_id": caption_id(drawn.caption)}
        row |= {"original_prompt": drawn.caption, "edit_prompt": drawn.instruction}
        rows.append(row | {"original_image": {"bytes": before}, "edited_image": {"bytes": after}})
    return rows


class StepClock:
    """Seconds of the steps after the first ones, until the end of the last."""

    def __init__(self, warm_up: int):
        self.warm_up = warm_up
        self.ends: list[float] = []

    def __call__(self) -> None:
        self.ends.append(time.perf_counter())

    def samples_per_second(self, batch_size: int) -> float:
        timed = self.ends[self.warm_up - 1 :]
        return (len(timed) - 1) * batch_size / (timed[-1] - timed[0])


def plain_loop(
    recipe: Recipe, model: TextToImage, next_batch: Callable[[int], Batch], steps: int, clock: Clock
) -> None:
    """What the job does, written plainly in one process: noise, loss, AdamW, clipping, moving average, dropout, and a
    checkpoint every `train.checkpoint_every` steps."""
    settings = recipe.train
    unet = model.unet.float().to(memory_format=torch.channels_last).requires_grad_(True).train()  # pyright: ignore
    optimizer = torch.optim.AdamW(unet.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    ema = EMAModel(unet.parameters(), decay=settings.ema_decay, foreach=True)
    scheduler = DDPMScheduler.from_config(model.schedule.config)
    null_text = model.text_encoder(token_ids(model, "")[None])[0].float()
    for step in range(steps):
        batch = next_batch(step)
        size = len(batch.token_ids)
        noise = torch.randn_like(batch.target_latents)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (size,))  # pyright: ignore
        noisy = scheduler.add_noise(batch.target_latents, noise, timesteps)  # pyright: ignore
        with torch.no_grad():
            text = model.text_encoder(batch.token_ids)[0].float()
        u = torch.rand(size)[:, None, None]
        text = torch.where(u < settings.drop_text + settings.drop_both, null_text, text)
        kept = (u < settings.drop_text) | (u >= settings.drop_text + settings.drop_both + settings.drop_image)
        predicted = unet(torch.cat([noisy, batch.image_latents * kept[..., None]], 1), timesteps, text).sample
        is_epsilon = scheduler.config.prediction_type == "epsilon"  # pyright: ignore
        target = noise if is_epsilon else scheduler.get_velocity(batch.target_latents, noise, timesteps)  # pyright: ignore
        F.mse_loss(predicted, target).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(unet.parameters())
        clock()
        if (step + 1) % settings.checkpoint_every == 0:
            state = {"unet": unet.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}
            with tempfile.TemporaryFile() as file:
                torch.save(state, file)


def encoded_in_the_step(
    recipe: Recipe, model: TextToImage, pictures: np.ndarray, ids: torch.Tensor, step: int
) -> Batch:
    """The batch of a step from its images, uint8 (N, 2, H, W, 3), as a trainer without latents/ makes it."""
    at = sample_indices(len(pictures), recipe.seed, share(step, recipe.train.batch_size, 0, 1))
    image, target = encode_pairs(model, [list(pair) for pair in pictures[at]], flip=False)
    return Batch(image.float().clone(), target.float().clone(), ids[at])


def loop_rate(recipe: Recipe, flags: Flags, rows: list[dict[str, Any]], ahead: bool) -> float:
    """Samples/s of the plain loop, on latents that were encoded ahead of it, or in every step."""
    torch.set_num_threads(os.cpu_count() or 1)
    every = flags.timed_steps // 3
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"checkpoint_every": every})})
    model = job.load_base(recipe, "cpu")
    clock = StepClock(every)
    if ahead:
        path = {"path": "dataset/train/part.parquet"}
        latents = PairEncoder(recipe, {path["path"]: "train"})(pa.Table.from_pylist([row | path for row in rows]))
        folder = Path(tempfile.mkdtemp())
        pq.write_table(latents, folder / "latents.parquet")
        write_local_cache(LocalFileSystem(), [str(folder / "latents.parquet")], "train", folder / "train")
        pairs = LatentPairs(folder / "train")
    else:
        keys = ("original_image", "edited_image")
        pictures = np.array([[images.decode(row[key]["bytes"]) for key in keys] for row in rows])
        ids = torch.stack([token_ids(model, row["edit_prompt"]) for row in rows])

    def next_batch(step: int) -> Batch:
        if not ahead:
            return encoded_in_the_step(recipe, model, pictures, ids, step)
        at = sample_indices(pairs.count, recipe.seed, share(step, recipe.train.batch_size, 0, 1))
        return pairs.batch(at, torch.rand(len(at)))

    plain_loop(recipe, model, next_batch, 4 * every, clock)
    return clock.samples_per_second(recipe.train.batch_size)


def sd15_ways(pixels: int = 256) -> dict[str, Callable[[], float]]:
    """Samples/s of a step's work on SD15_BATCH samples, without the optimizer, which a large batch shares."""
    torch.set_num_threads(os.cpu_count() or 1)
    side = pixels // 8
    unet = UNet2DConditionModel(sample_size=side, in_channels=8, cross_attention_dim=768).train()
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 4,  # pyright: ignore[reportArgumentType]
        block_out_channels=(128, 256, 512, 512),  # pyright: ignore[reportArgumentType]
        layers_per_block=2,
    ).eval()
    pairs = torch.randn(2 * SD15_BATCH, 3, pixels, pixels)
    latents, text = torch.randn(SD15_BATCH, 8, side, side), torch.randn(SD15_BATCH, 77, 768)

    def rate(ahead: bool) -> float:
        began = time.perf_counter()
        if not ahead:
            with torch.no_grad():
                vae.encode(pairs)
        unet(latents, torch.full((SD15_BATCH,), 500), text).sample.square().mean().backward()
        unet.zero_grad()
        return SD15_BATCH / (time.perf_counter() - began)

    rate(ahead=False)  # not counted
    return {"encoded in the step": partial(rate, False), "encoded ahead": partial(rate, True)}


def job_rate(recipe: Recipe, flags: Flags, rows: list[dict[str, Any]], workers: int) -> float:
    """Samples/s of jobs.train by the clock, checkpoints and all, from its first one on, after a third of the steps."""
    every = flags.timed_steps // 3
    others = {"workers": workers, "steps": 4 * every, "checkpoint_every": every}
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=others)})
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder, "run"))
        with workspace.open_out("dataset", "train", "part.parquet") as file:
            pq.write_table(pa.Table.from_pylist(rows, schema=DATASET), file)
        job.run(recipe, workspace)
        events = EventAccumulator(str(Path(workspace.files("tensorboard")[0]).parent))
        events.Reload()
        times = {event.step: event.wall_time for event in events.Scalars("loss")}
    return 3 * every * recipe.train.batch_size / (times[4 * every] - times[every])


def compare(peers: dict[str, Callable[[], float]], rounds: int, title: str) -> dict[str, float]:
    """Median samples/s of each peer, in turn; the first is what the others are compared with."""
    rates: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(rounds):
        for name, measure in peers.items():
            rates[name].append(measure())
    medians = {name: statistics.median(found) for name, found in rates.items()}
    base = next(iter(medians.values()))
    table = Table("", "samples/s", "all rounds", "ratio", title=title, title_justify="left")
    for name, found in rates.items():
        table.add_row(
            name, f"{medians[name]:.3g}", ", ".join(f"{rate:.3g}" for rate in found), f"{medians[name] / base:.2f}"
        )
    Console().print(table)
    return medians


def main(argv: list[str] | None = None) -> None:
    recipe, _, flags = load_settings(__doc__ or "", Flags, argv=argv, needs=("models.text_to_image",))
    recipe = job.with_base(recipe.model_copy(update={"device": "cpu"}))
    rows = rendered_pairs(flags.rows, recipe.train.resolution)
    found: dict[str, float] = {}
    if "ahead" in flags.parts:
        ways = {"encoded in the step": False, "encoded ahead": True}
        peers = {name: partial(loop_rate, recipe, flags, rows, ahead) for name, ahead in ways.items()}
        in_step, ahead = compare(peers, flags.rounds, "the same loop, latents").values()
        found["ahead_over_in_step"] = ahead / in_step
    if "sd15" in flags.parts:
        in_step, ahead = compare(sd15_ways(), flags.rounds, "SD 1.5's architecture at 256 px, latents").values()
        found["ahead_over_in_step_sd15"] = ahead / in_step
    if "peer" in flags.parts:
        peers = {
            "plain loop, one process": partial(loop_rate, recipe, flags, rows, True),
            "jobs.train, one worker": partial(job_rate, recipe, flags, rows, 1),
            "jobs.train, two workers": partial(job_rate, recipe, flags, rows, 2),
        }
        plain, one, two = compare(peers, flags.rounds, "the same work").values()
        found |= {"job_over_plain_loop": one / plain, "two_workers_over_plain_loop": two / plain}
        found["two_workers_over_one"] = two / one
    if flags.json_line:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
