"""Stage 1: a language model writes an instruction and an edited caption for every caption.

captions/ -> prompts -> vLLM -> parse and check -> instructions/, one row for every caption
"""

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from pydantic import BaseModel, Field
from pydantic_settings import CliImplicitFlag
from ray.data import DataContext, Dataset, SaveMode
from ray.data.checkpoint import CheckpointConfig

from ip2p.captions.answers import AnswerReader, names_type, too_long
from ip2p.captions.edit_types import EDIT_TYPES
from ip2p.captions.prompt import few_shot_messages, schema, tuned_prompt
from ip2p.captions.screen import NearDuplicates, refuse
from ip2p.captions.source import file_captions, hub_captions
from ip2p.cli import load_settings
from ip2p.errors import UserError
from ip2p.miniature.edits import EDIT_KINDS, PLACED_KINDS
from ip2p.miniature.triplets import draw_triplet, edit_kind
from ip2p.models import load_tokenizer
from ip2p.recipe import FileCaptions, GrammarCaptions, HubCaptions, Recipe
from ip2p.records import CAPTIONS, INSTRUCTIONS, caption_id, digest
from ip2p.workspace import Workspace
from runtime.connect import connect
from runtime.exit import exit_statuses
from runtime.job import job
from runtime.progress import Tally, log_failures, time_left
from runtime.rows import TASK_CPUS
from runtime.vllm import Engines, engine_config

ROWS_PER_FILE = 5000


class Flags(BaseModel):
    overwrite: CliImplicitFlag[bool] = Field(
        False, description="make instructions/ anew, and remove what was made from it"
    )
    preview: int = Field(0, ge=0, description="ask for the first so many captions, print what comes, write nothing")


def run(recipe: Recipe, workspace: Workspace, overwrite: bool = False) -> None:
    """Write `instructions/`. The same call goes on where a killed one stopped, and costs nothing when all is done.

    Raises `UserError` when `instructions/` was begun with another recipe.
    """
    started = time.perf_counter()
    check(recipe)
    workspace.claim("instructions", decisive(recipe), overwrite)
    counts: dict[str, Any] = write_captions(recipe, workspace)
    print(
        f"edit_captions: {counts['captions']} captions, {to_do(workspace)} to do, {counts['duplicates']} duplicates "
        f"left out, {counts['refused']} refused unasked"
    )
    if left := to_do(workspace):
        generate(recipe, workspace, left)
    rows = workspace.read_table("instructions").to_pylist()
    counts |= summary(rows)
    workspace.mark_done("instructions", **counts)
    workspace.record(
        "edit_captions", recipe=recipe.model_dump(mode="json"), seconds=time.perf_counter() - started, **counts
    )
    show(rows, counts)


def check(recipe: Recipe) -> None:
    """Raises `UserError`, naming the key, for a quota of what is no edit type here."""
    allowed = EDIT_TYPES if names_type(recipe) else EDIT_KINDS
    for name in recipe.instructions.quotas:
        if name not in allowed:
            raise UserError(f"instructions.quotas: {name!r} is no edit type; choose of {', '.join(allowed)}")


def to_do(workspace: Workspace) -> int:
    """Captions without a row in `instructions/`."""
    return len(ids(workspace, "captions") - ids(workspace, "instructions"))


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
        raise UserError(f"captions.path: {folder} is written by this job; keep {recipe.captions.path!r} elsewhere")
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
        raise UserError(f"captions: there are none in {recipe.captions}")
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
    tokenizer = load_tokenizer(recipe.models.text_to_image)
    # Scenes of the grammar are told apart by single words, and the job draws no caption twice.
    alike = 1.0 if isinstance(recipe.captions, GrammarCaptions) else recipe.captions.near_duplicates
    earlier = NearDuplicates(alike) if alike < 1 else None

    def screen(caption: str) -> str:
        refusal = refuse(caption, max_words)
        if not refusal and too_long(tokenizer, caption):
            return f"longer than {tokenizer.model_max_length} tokens"
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
        raise UserError(f"captions.say_places: false, but {', '.join(placed)} of captions.kinds needs to know places")
    seen: set[str] = set()
    attempt = 0
    while len(seen) < captions.count:
        kind = kinds[len(seen) % len(kinds)]
        drawn = draw_triplet(random.Random(digest("grammar", seed, attempt)), kind, held_out=False)
        attempt += 1
        if drawn.caption not in seen and (captions.say_places or "places" in drawn.unsaid):
            seen.add(drawn.caption)
            yield drawn.caption


def generate(recipe: Recipe, workspace: Workspace, left: int) -> None:
    """Ask the model for every caption that has no row yet, `left` of them, and append rows to `instructions/`."""
    connect()
    context = DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(
        id_column="caption_id",
        checkpoint_path=workspace.path("checkpoints", "instructions"),
        override_filesystem=workspace.fs,
        delete_checkpoint_on_success=False,
    )
    tally, engines = Tally("edit_captions"), Engines()
    print(f"edit_captions: {recipe.instructions.replicas} vLLM engine(s) with {recipe.models.llm.path}")
    try:
        with tally.shown(lambda counts, seconds: progress_line(counts, seconds, left)), engines.cause_named():
            captions = ray.data.read_parquet(
                workspace.path("captions"), filesystem=workspace.fs, num_cpus=TASK_CPUS
            ).repartition(target_num_rows_per_block=recipe.instructions.batch_size)
            answered(captions, recipe, engines, tally).write_parquet(
                workspace.path("instructions"),
                filesystem=workspace.fs,
                mode=SaveMode.APPEND,
                ray_remote_args={"num_cpus": TASK_CPUS},
            )
    finally:
        # It is the whole process's, and other stages have other ids.
        context.checkpoint_config = None


def answered(captions: Dataset, recipe: Recipe, engines: Engines, tally: Tally) -> Dataset:
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
        fn_kwargs={"tally": tally},
        batch_format="pyarrow",
        batch_size=None,
        num_cpus=TASK_CPUS,
    )


def noted(rows: pa.Table, tally: Tally) -> pa.Table:
    """Count `rows` for the line of progress, log the failed ones, and return them as they are."""
    tally.add(count(rows))
    log_failures(rows, tally.stage)
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
        rows = answered(ray.data.from_items(chosen), recipe, engines, Tally("preview")).take_all()
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
            run(recipe, workspace, flags.overwrite)


if __name__ == "__main__":
    main()
