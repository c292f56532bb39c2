"""Stage 1: a language model writes an instruction and an edited caption for every caption.

captions/ -> prompts -> vLLM -> parse -> instructions/, one row for every caption, whatever becomes of it
"""

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from pydantic import BaseModel, Field
from pydantic_settings import CliImplicitFlag
from ray.data import DataContext, SaveMode
from ray.data.checkpoint import CheckpointConfig
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

from cluster.connect import connect, uses_gpu
from cluster.progress import Tally, time_left
from ip2p.captions.parse import parse
from ip2p.captions.prompt import SCHEMA, few_shot_messages, tuned_prompt
from ip2p.captions.screen import NearDuplicates, refuse
from ip2p.captions.source import file_captions, hub_captions
from ip2p.cli import load_settings
from ip2p.miniature.edits import EDIT_KINDS, PLACED_KINDS
from ip2p.miniature.triplets import draw_triplet
from ip2p.recipe import FileCaptions, GrammarCaptions, HubCaptions, Instructions, Recipe, locate
from ip2p.records import CAPTIONS, INSTRUCTIONS, caption_id, digest
from ip2p.workspace import Workspace

ROWS_PER_FILE = 5000
# Less than a whole CPU each: on two cores a resumed run's checkpoint filter holds one, and a task needs room as well.
ENGINE_CPUS = 0.5
TASK_CPUS = 0.5
CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process less to start: the engine's core runs the model itself
    "VLLM_LOGGING_LEVEL": "ERROR",
}


class Flags(BaseModel):
    overwrite: CliImplicitFlag[bool] = Field(
        False, description="make instructions/ anew, and remove what was made from it"
    )


def run(recipe: Recipe, workspace: Workspace, overwrite: bool = False) -> None:
    """Write `instructions/`. The same call goes on where a killed one stopped, and costs nothing when all is done.

    Raises `ValueError` when `instructions/` was begun with another recipe.
    """
    started = time.perf_counter()
    workspace.claim("instructions", decisive(recipe), overwrite)
    counts: dict[str, Any] = write_captions(recipe, workspace)
    left = len(ids(workspace, "captions") - ids(workspace, "instructions"))
    print(
        f"edit_captions: {counts['captions']} captions, {left} to do, {counts['duplicates']} duplicates left out, "
        f"{counts['refused']} refused unasked"
    )
    if left:
        connect()
        generate(recipe, workspace, left)
    rows = workspace.read_table("instructions").to_pylist()
    counts |= summary(rows)
    workspace.mark_done("instructions", **counts)
    workspace.record(
        "edit_captions", recipe=recipe.model_dump(mode="json"), seconds=time.perf_counter() - started, **counts
    )
    show(rows, counts)


def decisive(recipe: Recipe) -> dict[str, Any]:
    """The keys of a recipe that decide what becomes of a caption; others say how fast, or how many captions."""
    keys = recipe.model_dump(
        mode="json", include={"seed": True, "models": {"llm"}, "captions": True, "instructions": True}
    )
    for how_many in ("count", "limit"):
        keys["captions"].pop(how_many, None)
    for how_fast in ("batch_size", "replicas", "max_model_len", "engine"):
        del keys["instructions"][how_fast]
    return keys


def write_captions(recipe: Recipe, workspace: Workspace) -> dict[str, int]:
    """Write `captions/` (CAPTIONS; each caption once), always anew: the same recipe gives the same files."""
    folder = workspace.path("captions")
    if isinstance(recipe.captions, FileCaptions) and Workspace(recipe.captions.path).path("").startswith(f"{folder}/"):
        raise ValueError(f"captions.path: {folder} is written by this job; keep {recipe.captions.path!r} elsewhere")
    captions = read_captions(recipe)
    if workspace.exists("captions"):
        workspace.fs.delete_dir(folder)
    screen = screening(recipe)
    seen: set[str] = set()
    rows: list[dict[str, str]] = []
    duplicates = refused = files = 0
    for caption in captions:
        name = caption_id(caption)
        if name in seen:
            duplicates += 1
            continue
        seen.add(name)
        refusal = screen(caption)
        refused += bool(refusal)
        rows.append({"caption_id": name, "caption": caption, "refusal": refusal})
        if len(rows) == ROWS_PER_FILE:
            _write_part(workspace, files, rows)
            rows, files = [], files + 1
    if rows:
        _write_part(workspace, files, rows)
    if not seen:
        raise ValueError(f"captions: there are none in {recipe.captions}")
    return {"captions": len(seen), "duplicates": duplicates, "refused": refused}


def read_captions(recipe: Recipe) -> Iterator[str]:
    """The captions that the recipe names, as they are."""
    if isinstance(recipe.captions, FileCaptions):
        return file_captions(recipe.captions)
    if isinstance(recipe.captions, HubCaptions):
        return hub_captions(recipe.captions)
    return grammar_captions(recipe.captions, recipe.seed)


def screening(recipe: Recipe) -> Callable[[str], str]:
    """A function that says of one caption after the other why the model is not asked; "" where it is."""
    max_words = recipe.instructions.max_caption_words
    # Scenes of the grammar are told apart by single words, and the job draws no caption twice.
    alike = 1.0 if isinstance(recipe.captions, GrammarCaptions) else recipe.captions.near_duplicates
    earlier = NearDuplicates(alike) if alike < 1 else None

    def screen(caption: str) -> str:
        refusal = refuse(caption, max_words)
        if not refusal and earlier is not None and earlier.add(caption):
            return "near-duplicate"
        return refusal

    return screen


def _write_part(workspace: Workspace, part: int, rows: list[dict[str, str]]) -> None:
    with workspace.open_out("captions", f"part-{part:05d}.parquet") as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=CAPTIONS), file)


def grammar_captions(captions: GrammarCaptions, seed: int) -> Iterator[str]:
    """Captions of miniature scenes, all different; every kind of edit is possible in an equal part of them.

    Many leave places or background unsaid. Scenes that are held out for evaluation are left out. Raises ValueError when
    a kind needs places that no caption may say.
    """
    kinds = captions.kinds or EDIT_KINDS
    if not captions.say_places and (placed := [kind for kind in kinds if kind in PLACED_KINDS]):
        raise ValueError(f"captions.say_places: false, but {', '.join(placed)} of captions.kinds needs to know places")
    seen: set[str] = set()
    attempt = 0
    while len(seen) < captions.count:
        kind = kinds[len(seen) % len(kinds)]
        drawn = draw_triplet(random.Random(digest("grammar", seed, attempt)), kind, held_out=False)
        attempt += 1
        if drawn.caption not in seen and (captions.say_places or "places" in drawn.unsaid):
            seen.add(drawn.caption)
            yield drawn.caption


def generate(recipe: Recipe, workspace: Workspace, to_do: int) -> None:
    """Ask the model for every caption that has no row yet, `to_do` of them, and append the rows to `instructions/`."""
    settings = recipe.instructions
    context = DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(
        id_column="caption_id",
        checkpoint_path=workspace.uri("checkpoints", "instructions"),
        delete_checkpoint_on_success=False,
    )
    light: dict[str, Any] = {"num_cpus": TASK_CPUS}
    model = build_processor(
        engine_config(recipe),
        preprocess=lambda row: ask(row, settings, recipe.seed),
        postprocess=lambda row: row,
        preprocess_map_kwargs=light,
        postprocess_map_kwargs=light,
    )
    tally = Tally("edit_captions")
    print(f"edit_captions: starting {settings.replicas} vLLM engine(s) with {recipe.models.llm.path}")
    try:
        with tally.shown(lambda counts, seconds: progress_line(counts, seconds, to_do)):
            captions = ray.data.read_parquet(workspace.path("captions"), filesystem=workspace.fs, **light).repartition(
                target_num_rows_per_block=settings.batch_size
            )
            (
                model(captions)
                .map_batches(
                    lambda table: read_answers(table, settings, tally), batch_format="pyarrow", batch_size=None, **light
                )
                .write_parquet(
                    workspace.path("instructions"), filesystem=workspace.fs, mode=SaveMode.APPEND, ray_remote_args=light
                )
            )
    finally:
        # It is the whole process's, and other stages have other ids.
        context.checkpoint_config = None


def engine_config(recipe: Recipe) -> vLLMEngineProcessorConfig:
    """vLLM's engines in Ray Data: on GPUs where the recipe and the cluster have them, else on the CPU."""
    settings, on_cpu = recipe.instructions, not uses_gpu(recipe.device)
    engine: dict[str, Any] = {
        "dtype": recipe.models.llm.dtype,
        "revision": recipe.models.llm.revision,
        "max_model_len": settings.max_model_len,
        "enable_prefix_caching": True,  # few_shot: all prompts begin with the same exemplars
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        "seed": recipe.seed,
    }
    if on_cpu:
        # Compiling takes longer than a miniature run; fewer sequences, less to warm up.
        engine |= {"enforce_eager": True, "max_num_seqs": 64, "disable_log_stats": True}
    return vLLMEngineProcessorConfig(
        model_source=locate(recipe.models.llm.path, "models.llm.path"),
        engine_kwargs=engine | settings.engine,
        concurrency=(settings.replicas, settings.replicas),
        batch_size=settings.batch_size,
        max_concurrent_batches=4,
        chat_template_stage={"enabled": settings.prompt == "few_shot", "num_cpus": TASK_CPUS},
        tokenize_stage=False,
        detokenize_stage=False,
        placement_group_config={"bundles": [{"CPU": ENGINE_CPUS}]} if on_cpu else None,
        runtime_env={"env_vars": CPU_ENVIRONMENT} if on_cpu else None,
        should_continue_on_error=True,
        log_engine_metrics=False,
    )


def ask(row: dict[str, Any], settings: Instructions, run_seed: int) -> dict[str, Any]:
    """Columns for the engine. A refused caption is marked as ray.data.llm marks failures, which passes the model by."""
    caption = row["caption"]
    sampling = {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_tokens": settings.max_tokens,
        # Of the caption alone: the answer does not depend on which others share its batch, or on a restart.
        "seed": digest("instruction", run_seed, row["caption_id"]) % 2**31,
        "structured_outputs": {"json": json.dumps(SCHEMA)},
    }
    few_shot = settings.prompt == "few_shot"
    question = {"messages": few_shot_messages(caption)} if few_shot else {"prompt": tuned_prompt(caption)}
    return {**question, "sampling_params": sampling, "__inference_error__": row["refusal"]}


def read_answers(table: pa.Table, settings: Instructions, tally: Tally) -> pa.Table:
    """Rows of `instructions/` for what came back from the engine."""
    rows = [read_answer(row, settings) for row in table.to_pylist()]
    tally.add({"captions": len(rows), **Counter(row["status"] for row in rows)})
    return pa.Table.from_pylist(rows, schema=INSTRUCTIONS)


def progress_line(counts: Counter[str], seconds: float, to_do: int) -> str:
    """What there is, and how long the rest takes."""
    statuses = ", ".join(f"{counts[status]:,} {status}" for status in ("ok", "rejected", "failed"))
    return f"{counts['captions']:,} of {to_do:,} captions: {statuses}; {time_left(counts['captions'], to_do, seconds)}"


def read_answer(row: dict[str, Any], settings: Instructions) -> dict[str, str]:
    """The row of `instructions/` (INSTRUCTIONS) for what came back from the engine."""
    caption, instruction, edited_caption = row["caption"], "", ""
    if row["refusal"]:
        status, reason = "rejected", row["refusal"]
    elif row["__inference_error__"]:
        status, reason = "failed", row["__inference_error__"]
    else:
        instruction, edited_caption, reason = parse(row["generated_text"], caption, settings.max_caption_words)
        if reason == "not json" and row["num_generated_tokens"] >= settings.max_tokens:
            reason = "answer cut at max_tokens"
        status = "rejected" if reason else "ok"
    values = (row["caption_id"], caption, instruction, edited_caption, status, reason)
    return dict(zip(INSTRUCTIONS.names, values, strict=True))


def ids(workspace: Workspace, folder: str) -> set[str]:
    """The caption ids in a folder's parquet files; none if there are no files yet."""
    if not any(path.endswith(".parquet") for path in workspace.files(folder)):
        return set()
    return set(workspace.read_table(folder, columns=["caption_id"])["caption_id"].to_pylist())


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows by status, and by reason where there is one."""
    reasons = Counter(row["reason"] for row in rows if row["reason"])
    return {**Counter(row["status"] for row in rows), "reasons": dict(reasons.most_common())}


def show(rows: list[dict[str, Any]], counts: dict[str, Any]) -> None:
    """Print what came out, and five examples."""
    print("edit_captions: " + ", ".join(f"{counts.get(status, 0)} {status}" for status in ("ok", "rejected", "failed")))
    for reason, count in counts["reasons"].items():
        print(f"  {count:6d} {reason}")
    for row in [row for row in rows if row["status"] == "ok"][:5]:
        print(f"  {row['original_prompt']}\n    -> {row['edit_prompt']}\n    => {row['edited_prompt']}")


def main(argv: list[str] | None = None) -> None:
    needs = ("workspace", "captions", "models.llm")
    recipe, workspace, flags = load_settings(__doc__ or "", Flags, argv=argv, needs=needs)
    assert workspace is not None
    run(recipe, workspace, flags.overwrite)


if __name__ == "__main__":
    main()
