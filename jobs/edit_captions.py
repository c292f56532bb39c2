"""Stage 1: a language model writes an instruction and an edited caption for every caption.

captions/ -> prompts -> vLLM -> parse and check -> instructions/, one row for every caption
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from pydantic import Field
from ray.data import Dataset

from ip2p.captions.answers import AnswerReader, names_type
from ip2p.captions.edit_types import EDIT_TYPES
from ip2p.captions.intake import check_source, screening, write_captions
from ip2p.captions.prompt import few_shot_messages, schema, tuned_prompt
from ip2p.captions.source import file_captions, hub_captions, source_bytes
from ip2p.cli import RowStageFlags, load_settings
from ip2p.errors import UserError
from ip2p.miniature.captions import grammar_captions
from ip2p.miniature.edits import EDIT_KINDS
from ip2p.miniature.triplets import edit_kind
from ip2p.recipe import FileCaptions, HubCaptions, Recipe
from ip2p.records import INSTRUCTIONS, caption_id, digest
from ip2p.stage import Stage
from ip2p.workspace import Workspace
from runtime.connect import connect
from runtime.exit import exit_statuses
from runtime.job import job
from runtime.progress import StageCounters, log_failures, time_left
from runtime.rows import TASK_CPUS, chain, forget_failed, run_epoch
from runtime.vllm import Engines, engine_config


class Flags(RowStageFlags):
    preview: int = Field(0, ge=0, description="ask for the first so many captions, print what comes, write nothing")


def run(recipe: Recipe, workspace: Workspace, overwrite: bool = False, retry_failed: bool = False) -> None:
    """Write `instructions/`. The same call resumes an interrupted run and does nothing when all is done.

    Raises `UserError` when `instructions/` was made with another recipe.
    """
    check(recipe)
    check_source(recipe, workspace)
    files = recipe.captions if isinstance(recipe.captions, FileCaptions) else None
    amount = {"bytes in captions.path": source_bytes(files)} if files else {}
    stage = Stage(workspace, "instructions", recipe, amount=amount)
    if not stage.begin(overwrite, retry_failed):
        print(f"edit_captions: {workspace.uri('instructions')} is complete")
        show([], workspace.counts("instructions"))
        return
    if retry_failed:
        forget_failed(workspace, "instructions")
    counts: dict[str, Any] = write_captions(recipe, workspace, read_captions(recipe))
    print(
        f"edit_captions: {counts['captions']} captions, {to_do(workspace)} to do, {counts['duplicates']} duplicates "
        f"left out, {counts['refused']} refused unasked"
    )
    generate(recipe, workspace)
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


def generate(recipe: Recipe, workspace: Workspace) -> None:
    """Ask the model for every caption that has no row yet, and append the rows to `instructions/`."""
    connect()
    engines = Engines()
    print(f"edit_captions: {recipe.instructions.replicas} vLLM engine(s) with {recipe.models.llm.path}")
    with engines.cause_named():
        chain(
            workspace,
            "captions",
            "instructions",
            "caption_id",
            recipe.instructions.batch_size,
            lambda captions, counters: answered(captions, recipe, engines, counters),
            StageCounters("edit_captions"),
            run_epoch(workspace, "instructions"),
            line=progress_line,
        )


def answered(captions: Dataset, recipe: Recipe, engines: Engines, counters: StageCounters) -> Dataset:
    """Map CAPTIONS to INSTRUCTIONS by the language model."""
    settings = recipe.instructions
    config = engine_config(recipe, recipe.models.llm, "models.llm.path", settings, chat=settings.prompt == "few_shot")
    edit_type = None if names_type(recipe) else edit_kind
    return engines.answered(
        captions,
        config,
        ask=lambda row: ask(row, recipe),
        reader=partial(AnswerReader, recipe, edit_type),
        schema=INSTRUCTIONS,
        id_column="caption_id",
        attempts=settings.attempts,
    ).map_batches(
        noted,  # pyright: ignore[reportArgumentType]
        fn_kwargs={"counters": counters},
        batch_format="pyarrow",
        batch_size=None,
        num_cpus=TASK_CPUS,
    )


def noted(rows: pa.Table, counters: StageCounters) -> pa.Table:
    """Count `rows` for the line of progress, log the failed ones, and return them as they are."""
    counters.add(count(rows))
    log_failures(rows, counters.stage)
    return rows


def preview(recipe: Recipe, captions: int) -> None:
    """Print the answers to the first captions that are not refused, with their reasons. Writes nothing."""
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
    engines = Engines()
    with engines.cause_named():
        rows = answered(ray.data.from_items(chosen), recipe, engines, StageCounters("preview")).take_all()
    for row in rows:
        print(example(row))
    print(f"edit_captions: {histogram(row['edit_type'] for row in rows if row['status'] == 'ok')}")


def ask(row: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return the columns for the engine. A refused caption has an error, so that it is not asked."""
    caption, settings = row["caption"], recipe.instructions
    sampling = {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "min_p": settings.min_p,
        "max_tokens": settings.max_tokens,
        # Of the caption alone: the answer does not depend on which others share its batch, or on a restart.
        "seed": digest("instruction", recipe.seed, row["caption_id"]) % 2**31,
        "structured_outputs": {"json": json.dumps(schema(names_type(recipe)))},
    }
    few_shot = settings.prompt == "few_shot"
    question = {"messages": few_shot_messages(caption)} if few_shot else {"prompt": tuned_prompt(caption)}
    return {**question, "sampling_params": sampling, "__inference_error__": row["refusal"]}


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
