"""Pair generation beside its peers, each comparison in one run on the same models.

    protocol    what an accepted pair costs: a fixed number of candidates, as the paper, against rounds (pairs.adaptive)
    throughput  candidates/s: the engine against the upstream procedure written plainly on diffusers
    job         candidates/s: the Ray job against bare engines on the same cores, after start-up

`--recipe` and any key of a recipe say what is measured; the last line of `--json` is one JSON object.
"""

import copy
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import EulerAncestralDiscreteScheduler
from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import CliImplicitFlag
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ip2p.cli import load_settings
from ip2p.clip_similarity import similarities
from ip2p.evaluate.bootstrap import by_case, difference, estimate
from ip2p.evaluate.truth import judge
from ip2p.images import decode, to_uint8
from ip2p.miniature.triplets import draw_triplet
from ip2p.pairs.candidates import draw_candidate
from ip2p.pairs.generate import PairGenerator
from ip2p.recipe import Adaptive, Pairs, Recipe, Sharing
from ip2p.records import INSTRUCTIONS, caption_id
from ip2p.workspace import Workspace
from jobs import generate_pairs

Row = dict[str, Any]
Part = Literal["protocol", "throughput", "job"]
ROWS_AT_ONCE = 8


class Flags(BaseModel):
    model_config = ConfigDict(populate_by_name=True)  # a field can not be called json

    parts: list[Part] = Field(["protocol", "throughput", "job"], description="what to measure")
    rows: int = Field(200, ge=1, description="held-out caption pairs for the protocol")
    timed_rows: int = Field(24, ge=4, description="caption pairs for throughput and job")
    rounds: int = Field(3, ge=1, description="timed repetitions, the two in turn; the median counts")
    processes: int = Field(os.cpu_count() or 1, ge=1, description="of one thread each, for protocol and job")
    json_line: CliImplicitFlag[bool] = Field(False, alias="json", description="print one JSON object as the last line")


def held_out_rows(count: int, seed: int = 0) -> list[Row]:
    """Rows of INSTRUCTIONS with correct edits of scenes that no model was trained on, kinds in turn."""
    rng = random.Random(f"benchmark {seed}")
    rows: dict[str, Row] = {}
    while len(rows) < count:
        drawn = draw_triplet(rng, held_out=True)
        key = caption_id(drawn.caption)
        values = (key, drawn.caption, drawn.instruction, drawn.edited_caption, "ok", "", drawn.edit.kind, 1)
        rows[key] = dict(zip(INSTRUCTIONS.names, values, strict=True))
    return list(rows.values())


# ---- protocol ----


def protocols(recipe: Recipe) -> dict[str, Pairs]:
    """The paper's 100 candidates ranked by direction, and rounds judged by quality, of the same candidates."""
    if recipe.pairs.quality is None:
        raise ValueError("pairs.quality: missing; `python -m jobs.calibrate` finds it")
    fixed = {"candidates": 100, "adaptive": None, "quality": None, "early_look": None}
    adaptive = {"candidates": 100, "adaptive": recipe.pairs.adaptive or Adaptive()}
    return {name: recipe.pairs.model_copy(update=update) for name, update in (("fixed", fixed), ("adaptive", adaptive))}


def measure_protocols(recipe: Recipe, rows: list[Row], processes: int) -> dict[str, float]:
    """UNet samples for each accepted pair and how many of these are right, both ways."""
    judged: list[Row] = []
    cost: dict[str, float] = {}
    for name, settings in protocols(recipe).items():
        blocks = in_processes(recipe.model_copy(update={"pairs": settings}), rows, processes, f"protocol: {name}")
        results = [result for _, block in blocks for result in block]
        cost[name] = sum(result["unet_samples"] for result in results)
        for row, result in zip(rows, results, strict=True):
            judged += [pair | {"protocol": name, "caption_id": row["caption_id"]} for pair in judge_pairs(row, result)]
    names = list(cost)
    counts = {name: sum(pair["protocol"] == name for pair in judged) for name in names}
    success = by_case(judged, "success", names, lambda pair: pair["protocol"])
    direction = by_case(judged, "clip_sim_dir", names, lambda pair: pair["protocol"])
    rates, directions = estimate(*success), estimate(*direction)
    table = Table("protocol", "pairs", "captions with pairs", "UNet samples a pair", "right", "95%", "direction")
    for name, rate, mean in zip(names, rates, directions, strict=True):
        captions = len({pair["caption_id"] for pair in judged if pair["protocol"] == name})
        per_pair = f"{cost[name] / max(counts[name], 1):,.0f}"
        interval = f"{rate.low:.1%} to {rate.high:.1%}"
        table.add_row(
            name, str(counts[name]), str(captions), per_pair, f"{rate.mean:.1%}", interval, f"{mean.mean:.3f}"
        )
    gain = difference(*success, 1, 0)
    ratio = (cost["fixed"] / counts["fixed"]) / (cost["adaptive"] / counts["adaptive"])
    table.title = f"{len(rows)} held-out caption pairs"
    table.caption = (
        f"{ratio:.1f} times fewer UNet samples a pair; right {100 * gain.mean:+.1f} points "
        f"({100 * gain.low:+.1f} to {100 * gain.high:+.1f}, paired by caption)"
    )
    Console().print(table)
    return {
        "unet_samples_per_accepted_ratio": ratio,
        "unet_samples_per_accepted_fixed": cost["fixed"] / counts["fixed"],
        "unet_samples_per_accepted_adaptive": cost["adaptive"] / counts["adaptive"],
        "pairs_fixed": counts["fixed"],
        "pairs_adaptive": counts["adaptive"],
        "oracle_success_fixed": rates[0].mean,
        "oracle_success_adaptive": rates[1].mean,
        "oracle_success_gain_low": gain.low,
        "oracle_success_gain_high": gain.high,
        "direction_fixed": directions[0].mean,
        "direction_adaptive": directions[1].mean,
    }


def judge_pairs(row: Row, result: Row) -> list[Row]:
    """The accepted pairs of a caption with the oracle's `success`."""
    pairs = result["pairs"]
    if not pairs:
        return []
    before, after = ([decode(pair[key]) for pair in pairs] for key in ("original_image", "edited_image"))
    truths = judge(before, [row["edit_prompt"]] * len(pairs), after)
    return [pair | {"success": truth.success} for pair, truth in zip(pairs, truths, strict=True)]


# ---- bare engines in processes ----

_generator: PairGenerator  # of this process


def _load(recipe: Recipe) -> None:
    global _generator
    torch.set_num_threads(1)
    _generator = PairGenerator(recipe)


def _generate(rows: list[Row]) -> tuple[float, list[Row]]:
    results = list(_generator.generate(rows))
    return time.time(), results


def in_processes(recipe: Recipe, rows: Sequence[Row], processes: int, what: str) -> list[tuple[float, list[Row]]]:
    """(time when done, what PAIRS has beyond the rows) of each block of rows, by bare engines of one thread each."""
    blocks = [list(rows[at : at + ROWS_AT_ONCE]) for at in range(0, len(rows), ROWS_AT_ONCE)]
    with ProcessPoolExecutor(processes, get_context("spawn"), _load, (recipe,)) as pool:
        return list(track(pool.map(_generate, blocks), what, len(blocks), console=Console(stderr=True)))


# ---- throughput ----


class CopiedMaps:
    """Upstream's attention: probabilities of all rows are materialised, and in self-attention copied by `copies`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        copies: Sequence[tuple[int, int]] = (),
    ) -> torch.Tensor:
        """`copies`: (edited row, source row)."""
        assert attention_mask is None
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            attn.head_to_batch_dim(x) for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        maps = attn.get_attention_scores(query, key).unflatten(0, (len(hidden_states), -1))
        if encoder_hidden_states is None:
            for edited, source in copies:
                maps[edited] = maps[source]
        return attn.to_out[0](attn.batch_to_head_dim(maps.flatten(0, 1) @ value))


def upstream(generator: PairGenerator, rows: Sequence[Row]) -> list[Row]:
    """The same candidates one pair at a time: four UNet samples a call, in the plain loop of diffusers."""
    settings, model, clip = generator.settings, generator.model, generator.clip
    scheduler = EulerAncestralDiscreteScheduler.from_config(model.schedule.config)
    results = []
    for row in rows:
        prompts = [row["original_prompt"], row["edited_prompt"]]
        text = model.encode_text(["", "", *prompts])
        texts = clip.embed_texts(prompts)
        for k in range(settings.candidates):
            candidate = draw_candidate(settings, generator.recipe.seed, row["caption_id"], k)
            generators = [candidate.generator() for _ in range(2)]  # both images get the same noise
            noise = [torch.randn(generator.shape, generator=g) for g in generators]
            scheduler.set_timesteps(settings.steps)
            latents = torch.stack(noise).to(model.device, model.dtype) * scheduler.init_noise_sigma
            for step, timestep in enumerate(scheduler.timesteps):
                shares = step / max(settings.steps - 1, 1) < candidate.shared_attention_fraction
                copies = [(1, 0), (3, 2)] if shares else []
                sample = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
                out = model.unet(sample, timestep, text, cross_attention_kwargs={"copies": copies}).sample
                empty, full = out.chunk(2)
                predicted = empty + candidate.guidance_scale * (full - empty)
                latents = scheduler.step(predicted, timestep, latents, generator=generators).prev_sample
            images = to_uint8(model.decode_latents(latents))
            embedded = clip.embed_images(images)
            scores = similarities(embedded[:1], embedded[1:], texts[:1], texts[1:])
            results.append({name: value.item() for name, value in scores.items()})
    return results


def measure_throughput(recipe: Recipe, rows: list[Row], rounds: int) -> dict[str, float]:
    """Candidates/s of the engine and of the upstream procedure, in turn, on all threads of one process."""
    settings = recipe.pairs.model_copy(
        update={
            "solver": "euler_ancestral",
            "sharing": Sharing(modes=["self"]),
            "adaptive": None,
            "quality": None,
            "early_look": None,
        }
    )
    ours = PairGenerator(recipe.model_copy(update={"pairs": settings}))
    theirs = copy.copy(ours)
    theirs.model = copy.copy(ours.model)
    theirs.model.unet = copy.deepcopy(ours.model.unet)
    theirs.model.unet.set_attn_processor(CopiedMaps())  # pyright: ignore[reportArgumentType]

    def plain() -> list[Row]:
        with torch.inference_mode():
            return upstream(theirs, rows)

    def engine() -> list[Row]:
        return [candidate for result in ours.generate(rows) for candidate in result["candidates"]]

    ways: dict[str, Callable[[], list[Row]]] = {"upstream, on diffusers": plain, "batch engine": engine}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):  # the first warms up
        for name, way in ways.items():
            started = time.perf_counter()
            count = len(way())
            if turn:
                rates[name].append(count / (time.perf_counter() - started))
    ratio = statistics.median(o / t for t, o in zip(*rates.values(), strict=True))
    table = Table("way", "candidates/s", "min", "max")
    for name, values in rates.items():
        table.add_row(name, *(f"{x:.2f}" for x in (statistics.median(values), min(values), max(values))))
    device = ours.model.device
    table.title = f"{settings.steps} steps, {settings.height} px, batch of {settings.batch_size} pairs, {device}"
    table.caption = f"{ratio:.2f} times as fast, median of {rounds} pairs of runs"
    Console().print(table)
    where = "gpu" if device.startswith("cuda") else "cpu"
    return {f"throughput_ratio_{where}": ratio} | {
        f"candidates_per_second_{name.split(',')[0].replace(' ', '_')}": statistics.median(values)
        for name, values in rates.items()
    }


# ---- job ----


def measure_job(recipe: Recipe, rows: list[Row], processes: int) -> dict[str, float]:
    """Candidates/s of jobs.generate_pairs against as many bare engines, without what each needs to start."""
    settings = recipe.pairs.model_copy(update={"replicas": processes, "rows_per_block": ROWS_AT_ONCE})
    recipe = recipe.model_copy(update={"pairs": settings})
    blocks = in_processes(recipe, rows, processes, "bare engines")
    bare = steady_rate([(when, sum(len(row["candidates"]) for row in block)) for when, block in blocks], processes)
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(folder)
        write_instructions(workspace, rows)
        generate_pairs.run(recipe, workspace)
        job = steady_rate(blocks_written(workspace), processes)
    table = Table("way", "candidates/s after start-up")
    table.add_row(f"{processes} bare engines", f"{bare:.2f}")
    table.add_row(f"Ray job, {processes} actors", f"{job:.2f}")
    table.caption = f"the job makes {job / bare:.0%} of the bare engines' candidates"
    Console().print(table)
    return {"job_over_engine": job / bare, "candidates_per_second_job": job, "candidates_per_second_bare": bare}


def blocks_written(workspace: Workspace) -> list[tuple[float, int]]:
    """(time, candidates) of each file of pairs/."""
    files = [Path(path) for path in workspace.files("pairs") if path.endswith(".parquet")]
    return [
        (file.stat().st_mtime, sum(map(len, pq.read_table(file, columns=["candidates"])["candidates"].to_pylist())))
        for file in files
    ]


def steady_rate(blocks: list[tuple[float, int]], processes: int) -> float:
    """Candidates/s from when each process has finished its first block to when the last block is finished."""
    blocks = sorted(blocks)
    if len(blocks) <= processes:
        raise ValueError(f"{len(blocks)} blocks for {processes} processes: raise --timed_rows")
    counted = sum(count for _, count in blocks[processes:])
    return counted / (blocks[-1][0] - blocks[processes - 1][0])


def write_instructions(workspace: Workspace, rows: list[Row]) -> None:
    """instructions/ as jobs.edit_captions leaves it."""
    with workspace.open_out("instructions", "part-0.parquet") as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=INSTRUCTIONS), file)
    workspace.mark_done("instructions", captions=len(rows), ok=len(rows))


def measure(recipe: Recipe, flags: Flags) -> Iterator[dict[str, float]]:
    if "protocol" in flags.parts:
        yield measure_protocols(recipe, held_out_rows(flags.rows), flags.processes)
    timed = held_out_rows(flags.timed_rows, seed=1)
    if "throughput" in flags.parts:
        yield measure_throughput(recipe, timed, flags.rounds)
    if "job" in flags.parts:
        yield measure_job(recipe, timed, flags.processes)


def main(argv: list[str] | None = None) -> None:
    needs = ("models.text_to_image", "models.clip")
    recipe, _, flags = load_settings(__doc__ or "", Flags, argv=argv, needs=needs)
    found: dict[str, float] = {}
    for figures in measure(recipe, flags):
        found |= figures
    if flags.json_line:
        print(json.dumps({name: round(value, 4) for name, value in found.items()}))


if __name__ == "__main__":
    main()
