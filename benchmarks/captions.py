"""Captions to instructions beside plain `transformers.generate`: same model, same captions, same run.

    speed   rows/s of jobs.edit_captions, after its engine is up, against generate() at batch 1 and at batch 16
    truth   how many of the job's `ok` rows are right by the miniature's grammar, on held-out scenes
    prefix  how much of few-shot prompts vLLM's prefix cache answers for

`--recipe` and any key of a recipe say what is measured; the last line of `--json` is one JSON object.
"""

import json
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
import torch
from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import CliImplicitFlag
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from ip2p.captions.prompt import few_shot_messages, tuned_prompt
from ip2p.cli import load_settings
from ip2p.evaluate.bootstrap import by_case, estimate
from ip2p.miniature.triplets import consistent, draw_triplet
from ip2p.models import load_language_model
from ip2p.recipe import FileCaptions, Recipe
from ip2p.records import caption_id
from ip2p.workspace import Workspace
from jobs import edit_captions
from runtime.vllm import BATCHES_IN_ENGINE, CPU_ENVIRONMENT

Part = Literal["speed", "truth", "prefix"]
BATCHES = {1: 32, 16: 128}  # captions for generate() at each batch size
FEW_SHOT_POSITIONS = 4096


class Flags(BaseModel):
    model_config = ConfigDict(populate_by_name=True)  # a field can not be called json

    parts: list[Part] = Field(["speed", "truth", "prefix"], description="what to measure")
    rows: int = Field(2048, ge=1, description="held-out captions for speed and truth")
    json_line: CliImplicitFlag[bool] = Field(False, alias="json", description="print one JSON object as the last line")


def held_out_captions(count: int) -> list[str]:
    """Different captions of scenes that no model was trained on, the kinds of edit that they allow in turn."""
    rng = random.Random("captions benchmark")
    captions: dict[str, None] = {}
    while len(captions) < count:
        captions[draw_triplet(rng, held_out=True).caption] = None
    return list(captions)


def run_job(recipe: Recipe, captions: Sequence[str]) -> tuple[float, list[dict[str, Any]]]:
    """(rows/s once the engine is up, rows of instructions/) of the job in a new workspace."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "captions.jsonl")
        source.write_text("".join(json.dumps({"caption": caption}) + "\n" for caption in captions))
        files = FileCaptions(path=str(source), near_duplicates=1)
        workspace = Workspace(Path(folder, "run"))
        edit_captions.run(recipe.model_copy(update={"captions": files}), workspace)
        return steady_rate(workspace, recipe), workspace.read_table("instructions").to_pylist()


def steady_rate(workspace: Workspace, recipe: Recipe) -> float:
    """Rows/s from the first file of instructions/ that was written to the last.

    What the engine had in hand when the first was written counts as done by then: that can only be too little.
    """
    paths = [path for path in workspace.files("instructions") if path.endswith(".parquet")]
    written = sorted((info.mtime_ns / 1e9, info.path) for info in workspace.fs.get_file_info(paths))
    rows = [pq.ParquetFile(workspace.fs.open_input_file(path)).metadata.num_rows for _, path in written]
    in_hand = BATCHES_IN_ENGINE * recipe.instructions.batch_size
    seconds = written[-1][0] - written[0][0]
    return (sum(rows) - max(rows[0], in_hand)) / seconds if seconds else float("nan")


@torch.inference_mode()
def generate(
    recipe: Recipe, model: Any, tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], batch_size: int
) -> float:
    """Rows/s of a plain loop over `model.generate`."""
    settings = recipe.instructions
    started = time.perf_counter()
    for first in range(0, len(captions), batch_size):
        prompts = [tuned_prompt(caption) for caption in captions[first : first + batch_size]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
        ids = model.generate(
            **inputs,
            do_sample=True,
            temperature=settings.temperature,
            top_p=settings.top_p,
            min_p=settings.min_p,
            top_k=0,
            max_new_tokens=settings.max_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return len(captions) / (time.perf_counter() - started)


def measure_speed(recipe: Recipe, captions: Sequence[str], job: float) -> dict[str, float]:
    """`job`: its rows/s."""
    model, tokenizer = load_language_model(recipe.models.llm)
    tokenizer.padding_side = "left"
    torch.set_num_threads(os.cpu_count() or 1)
    table = Table("", "rows/s", "the job is")
    table.add_row("jobs.edit_captions", f"{job:.1f}", "")
    found = {"job_rows_per_second": job}
    for batch_size, count in BATCHES.items():
        rate = generate(recipe, model.eval(), tokenizer, captions[:count], batch_size)
        table.add_row(f"generate, batch {batch_size}", f"{rate:.1f}", f"{job / rate:.1f} times as fast")
        found |= {f"generate_{batch_size}_rows_per_second": rate, f"ratio_batch_{batch_size}": job / rate}
    Console().print(table)
    return found


def measure_truth(captions: Sequence[str], rows: list[dict[str, Any]]) -> dict[str, float]:
    """How many rows are ok, and how many of these are right."""
    once = Counter(row["caption_id"] for row in rows) == Counter(map(caption_id, captions))
    ok = [row for row in rows if row["status"] == "ok"]
    for row in ok:
        row["right"] = consistent(row["original_prompt"], row["edit_prompt"], row["edited_prompt"]) is None
    kinds = sorted({row["edit_type"] for row in ok})
    whole, *each = estimate(*by_case(ok, "right", ["all"], lambda _: "all")) + estimate(
        *by_case(ok, "right", kinds, lambda row: row["edit_type"])
    )
    table = Table("edit", "ok rows", "right", "95%")
    for kind, rate in zip(["all", *(kind or "?" for kind in kinds)], [whole, *each], strict=True):
        table.add_row(kind, str(rate.count), f"{rate.mean:.1%}", f"{rate.low:.1%} to {rate.high:.1%}")
    Console().print(table)
    print(f"{len(ok)} of {len(rows)} captions ok; every caption has {'' if once else 'NOT '}exactly one row")
    return {"ok": len(ok), "consistent": whole.mean, "consistent_low": whole.low, "each_once": once}


def measure_prefix(count: int = 64) -> dict[str, float]:
    """Share of the few-shot prompts' tokens that are not computed again. The weights do not matter: they are random."""
    os.environ.update(CPU_ENVIRONMENT)
    from vllm import LLM, SamplingParams  # here: the other parts start engines of their own

    from ip2p.miniature.language import vocabulary
    from ip2p.miniature.models import language_model

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = language_model.build_tokenizer(vocabulary())
        model = language_model.build_model(len(tokenizer), layers=1)
        model.config.max_position_embeddings = FEW_SHOT_POSITIONS
        language_model.save(model, tokenizer, folder)
        engine = LLM(
            model=folder, enable_prefix_caching=True, enforce_eager=True, disable_log_stats=False, max_num_seqs=16
        )
        captions = held_out_captions(count)
        chats = [
            "".join(f"<{message['role']}>{message['content']}\n" for message in few_shot_messages(caption))
            for caption in captions
        ]
        engine.generate(chats, SamplingParams(max_tokens=4), use_tqdm=False)
        counters = {metric.name: getattr(metric, "value", 0) for metric in engine.get_metrics()}
    rate = counters["vllm:prefix_cache_hits"] / counters["vllm:prefix_cache_queries"]
    print(f"prefix cache: {rate:.1%} of the tokens of {count} few-shot prompts came from it")
    return {"prefix_cache_hit_rate": rate}


def main(argv: list[str] | None = None) -> None:
    recipe, _, flags = load_settings(__doc__ or "", Flags, argv=argv, needs=("models.llm",))
    if recipe.truth != "oracle":
        raise SystemExit("truth: none, but the captions are miniature scenes; give a recipe with truth: oracle")
    found: dict[str, float] = {}
    if {"speed", "truth"} & set(flags.parts):
        captions = held_out_captions(flags.rows)
        rate, rows = run_job(recipe, captions)
        if "truth" in flags.parts:
            found |= measure_truth(captions, rows)
        if "speed" in flags.parts:
            found |= measure_speed(recipe, captions, rate)
    if "prefix" in flags.parts:
        found |= measure_prefix()
    if flags.json_line:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
