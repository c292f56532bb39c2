"""Stage 1: a language model writes an instruction and an edited caption for every caption.

captions/ -> prompts -> vLLM -> parse and check -> instructions/, one row for every caption, whatever becomes of it
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import ray
from pydantic import Field
from ray.data import ActorPoolStrategy, Dataset
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

from ip2p.captions.answers import ANSWERS, AnswerReader, names_type
from ip2p.captions.edit_types import EDIT_TYPES
from ip2p.captions.intake import screening, write_captions
from ip2p.captions.prompt import few_shot_messages, schema, tuned_prompt
from ip2p.captions.source import file_captions, hub_captions
from ip2p.cli import RowStageFlags, load_settings
from ip2p.errors import UserError
from ip2p.miniature.captions import grammar_captions
from ip2p.miniature.edits import EDIT_KINDS
from ip2p.miniature.triplets import edit_kind
from ip2p.recipe import FileCaptions, HubCaptions, Recipe, locate
from ip2p.records import caption_id, digest
from ip2p.stage import Stage
from ip2p.workspace import Workspace
from runtime.connect import connect, uses_gpu
from runtime.exit import exit_statuses
from runtime.job import job
from runtime.progress import StageCounters, WithCounters, time_left
from runtime.rows import chain, newest_epoch

# Less than a whole CPU each: on two cores a resumed run's checkpoint filter holds one, and a task needs room as well.
ENGINE_CPUS = 0.5
READER_CPUS = 0.25
TASK_CPUS = 0.25
BATCHES_IN_ENGINE = 4
ENGINE_RESTARTS = 3
CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process less to start: the engine's core runs the model itself
    "VLLM_LOGGING_LEVEL": "ERROR",
}


class Flags(RowStageFlags):
    preview: int = Field(0, ge=0, description="ask for the first so many captions, print what comes, write nothing")


def run(recipe: Recipe, workspace: Workspace, overwrite: bool = False, retry_failed: bool = False) -> None:
    """Write `instructions/`. The same call resumes an interrupted run and does nothing when all is done.

    Raises `UserError` when `instructions/` was made with another recipe.
    """
    check(recipe)
    stage = Stage(workspace, "instructions", recipe)
    if not stage.begin(overwrite, retry_failed):
        print(f"edit_captions: {workspace.uri('instructions')} is complete")
        show([], workspace.counts("instructions"))
        return
    counts: dict[str, Any] = write_captions(recipe, workspace, read_captions(recipe))
    print(
        f"edit_captions: {counts['captions']} captions, {to_do(workspace)} to do, {counts['duplicates']} duplicates "
        f"left out, {counts['refused']} refused unasked"
    )
    if left := to_do(workspace):
        generate(recipe, workspace, recipe.instructions.attempts, left)
    rows = workspace.read_table("instructions").to_pylist()
    counts |= summary(rows)
    show(rows, counts)
    stage.finish(counts, rows=len(rows), failed=counts.get("failed", 0), example="see the reasons above")


def check(recipe: Recipe) -> None:
    """Raises `UserError`, naming the key, for a quota of what is no edit type here."""
    allowed = EDIT_TYPES if names_type(recipe) else EDIT_KINDS
    for name in recipe.instructions.quotas:
        if name not in allowed:
            raise UserError(f"instructions.quotas: {name!r} is no edit type; choose of {', '.join(allowed)}")


def to_do(workspace: Workspace) -> int:
    """Captions without a row in `instructions/`."""
    return len(ids(workspace, "captions") - ids(workspace, "instructions"))


def read_captions(recipe: Recipe) -> Iterator[str]:
    """The captions that the recipe names, as they are."""
    if isinstance(recipe.captions, FileCaptions):
        return file_captions(recipe.captions)
    if isinstance(recipe.captions, HubCaptions):
        return hub_captions(recipe.captions)
    return grammar_captions(recipe.captions, recipe.seed)


def generate(recipe: Recipe, workspace: Workspace, attempt: int, left: int) -> None:
    """Ask the model for every caption that has no row yet, `left` of them, and append rows to `instructions/`.

    Before the last attempt that is a row for what is settled; the others stay without, to be asked again.
    """
    connect()
    attempts = recipe.instructions.attempts
    again = f", attempt {attempt} of {attempts} for {left} captions" if attempt > 1 else ""
    print(f"edit_captions: {recipe.instructions.replicas} vLLM engine(s) with {recipe.models.llm.path}{again}")
    chain(
        workspace,
        "captions",
        "instructions",
        "caption_id",
        recipe.instructions.batch_size,
        lambda captions, counters: answered(captions, recipe, attempt, counters),
        StageCounters("edit_captions"),
        newest_epoch(workspace, "instructions") + 1,
        line=progress_line,
        complete=attempt == attempts,
    )


def answered(captions: Dataset, recipe: Recipe, attempt: int, counters: StageCounters) -> Dataset:
    """CAPTIONS -> the model -> INSTRUCTIONS; see AnswerReader for what `attempt` leaves out."""
    light: dict[str, Any] = {"num_cpus": TASK_CPUS}
    model = build_processor(
        engine_config(recipe),
        preprocess=lambda row: ask(row, recipe, attempt),
        postprocess=lambda row: answer_of(row, recipe.instructions.max_tokens),
        preprocess_map_kwargs=light,
        postprocess_map_kwargs=light,
    )
    # A model that vLLM can load and not run kills its engine at every request; Ray would start new ones for ever.
    model.get_stage_by_name("vLLMEngineStage").map_batches_kwargs["max_restarts"] = ENGINE_RESTARTS
    edit_type = None if names_type(recipe) else edit_kind
    return model(captions).map_batches(
        WithCounters,  # pyright: ignore[reportArgumentType]
        fn_constructor_args=(AnswerReader, (recipe, attempt, edit_type), counters, count),
        batch_format="pyarrow",
        batch_size=recipe.instructions.batch_size,
        compute=ActorPoolStrategy(size=1),
        num_cpus=READER_CPUS,
    )


def preview(recipe: Recipe, captions: int) -> None:
    """Print the answers to the first captions that are not refused, with what the checks say; nothing is written."""
    check(recipe)
    screen, chosen = screening(recipe), []
    for caption in read_captions(recipe):
        if not screen(caption):
            chosen.append({"caption_id": caption_id(caption), "caption": caption, "refusal": ""})
        if len(chosen) == captions:
            break
    if not chosen:
        raise UserError(f"captions: none of {recipe.captions} can be asked for; a run without --preview says why")
    connect()
    print(f"edit_captions: {recipe.models.llm.path} is asked for {len(chosen)} captions, once")
    once = {"attempts": 1, "replicas": 1}
    recipe = recipe.model_copy(update={"instructions": recipe.instructions.model_copy(update=once)})
    rows = answered(ray.data.from_items(chosen), recipe, 1, StageCounters("preview")).take_all()
    for row in rows:
        print(example(row))
    print(f"edit_captions: {histogram(row['edit_type'] for row in rows if row['status'] == 'ok')}")


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
        max_concurrent_batches=BATCHES_IN_ENGINE,
        chat_template_stage={"enabled": settings.prompt == "few_shot", "num_cpus": TASK_CPUS},
        tokenize_stage=False,
        detokenize_stage=False,
        placement_group_config={"bundles": [{"CPU": ENGINE_CPUS}]} if on_cpu else None,
        runtime_env={"env_vars": CPU_ENVIRONMENT} if on_cpu else None,
        should_continue_on_error=True,
        log_engine_metrics=False,
    )


def ask(row: dict[str, Any], recipe: Recipe, attempt: int = 1) -> dict[str, Any]:
    """Columns for the engine. A refused caption is marked as ray.data.llm marks failures, which passes the model by."""
    caption, settings = row["caption"], recipe.instructions
    sampling = {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "min_p": settings.min_p,
        "max_tokens": settings.max_tokens,
        # Of the caption alone: the answer does not depend on which others share its batch, or on a restart.
        "seed": (digest("instruction", recipe.seed, row["caption_id"]) + attempt - 1) % 2**31,
        "structured_outputs": {"json": json.dumps(schema(names_type(recipe)))},
    }
    few_shot = settings.prompt == "few_shot"
    question = {"messages": few_shot_messages(caption)} if few_shot else {"prompt": tuned_prompt(caption)}
    return {**question, "sampling_params": sampling, "__inference_error__": row["refusal"]}


def answer_of(row: dict[str, Any], max_tokens: int) -> dict[str, Any]:
    """The row of ANSWERS in what comes back from the engine; a refused caption has not been there."""
    error = "" if row["refusal"] else row["__inference_error__"]
    text = "" if row["refusal"] or error else row["generated_text"]
    cut = bool(text) and row["num_generated_tokens"] >= max_tokens
    values = (row["caption_id"], row["caption"], row["refusal"], text, cut, error)
    return dict(zip(ANSWERS.names, values, strict=True))


def count(rows: pa.Table) -> dict[str, int]:
    """For the line of progress."""
    return {"captions": rows.num_rows, **Counter(rows["status"].to_pylist())}


def progress_line(counts: Counter[str], seconds: float, to_do: int) -> str:
    """What there is, and how long the rest takes."""
    statuses = ", ".join(f"{counts[status]:,} {status}" for status in ("ok", "rejected", "failed"))
    return f"{counts['captions']:,} of {to_do:,} captions: {statuses}; {time_left(counts['captions'], to_do, seconds)}"


def ids(workspace: Workspace, folder: str) -> set[str]:
    """The caption ids in a folder's parquet files; none if there are no files yet."""
    if not any(path.endswith(".parquet") for path in workspace.files(folder)):
        return set()
    return set(workspace.read_table(folder, columns=["caption_id"])["caption_id"].to_pylist())


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows by status, by reason where there is one, by type of edit and, of those asked, by number of attempts."""
    reasons = Counter(row["reason"] for row in rows if row["reason"])
    types = Counter(row["edit_type"] for row in rows if row["status"] == "ok")
    attempts = Counter(str(row["attempts"]) for row in rows if row["attempts"])
    return {
        **Counter(row["status"] for row in rows),
        "reasons": dict(reasons.most_common()),
        "edit_types": dict(types.most_common()),
        "attempts": dict(sorted(attempts.items())),
    }


def show(rows: list[dict[str, Any]], counts: dict[str, Any]) -> None:
    """Print what came out, and five examples."""
    print("edit_captions: " + ", ".join(f"{counts.get(status, 0)} {status}" for status in ("ok", "rejected", "failed")))
    for reason, number in counts["reasons"].items():
        print(f"  {number:6d} {reason}")
    print(f"edit_captions: {histogram(row['edit_type'] for row in rows if row['status'] == 'ok')}")
    for row in [row for row in rows if row["status"] == "ok"][:5]:
        print(example(row))


def example(row: dict[str, Any]) -> str:
    verdict = f"\n    {row['status']}: {row['reason']}" if row["reason"] else ""
    kind = f" ({row['edit_type']})" if row["edit_type"] else ""
    return f"  {row['original_prompt']}\n    -> {row['edit_prompt']}{kind}\n    => {row['edited_prompt']}{verdict}"


def histogram(edit_types: Iterable[str]) -> str:
    """`time 31%, add 12%, ...`"""
    counts = Counter(edit_type or "?" for edit_type in edit_types)
    return ", ".join(f"{name} {number / counts.total():.0%}" for name, number in counts.most_common())


def main(argv: list[str] | None = None) -> None:
    needs = ("workspace", "captions", "models.llm", "models.text_to_image", "models.clip")
    recipe, workspace, flags = load_settings(__doc__ or "", Flags, argv=argv, needs=needs)
    assert workspace is not None
    if flags.preview:
        with exit_statuses():
            preview(recipe, flags.preview)
    else:
        with job("edit_captions", workspace):
            run(recipe, workspace, flags.overwrite, flags.retry_failed)


if __name__ == "__main__":
    main()
