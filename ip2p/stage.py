"""The contract of a stage: start it, refuse another recipe, resume it, complete it, start it over.

    stage = Stage(workspace, "pairs", recipe)
    if stage.begin(overwrite):
        ...  # write what is missing
        stage.finish(counts)

A stage is complete when its first folder holds `_SUCCESS`. `made_with/<stage>.json` holds what it was started with:
the keys of the recipe that decide *what* is made (`recipe.what`), the content of its models and the fingerprints of
its inputs. No path of a machine is among them, so a workspace can be resumed from anywhere.

| the rerun has | an unfinished stage | a complete stage |
|---|---|---|
| the same values | resumes | has nothing to do |
| another `what` | is refused | is refused |
| another `how` | resumes | has nothing to do |
| a larger `how_much` | resumes | is extended |
| `overwrite` | starts over | starts over, without what was made from it |
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ip2p.errors import UserError
from ip2p.recipe import LOCAL_CLIP, ClipRef, ModelRef, OtherEditor, Recipe, locate
from ip2p.workspace import Workspace


@dataclass(frozen=True)
class Plan:
    """What a stage reads and writes.

    Args:
        job: the module that runs it.
        keys: sections and keys of the recipe that it depends on.
        inputs: stages that must be complete before it begins.
        optional: stages that it reads where they are complete.
        size: the count in `_SUCCESS` that grows when a complete stage is extended; "" when it never is.
        by_row: whether a row depends on its own input row alone, so that a grown input extends the stage.
        folders: what it writes; default: the folder of its name.
    """

    job: str
    keys: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    size: str = ""
    by_row: bool = False
    folders: tuple[str, ...] = ()


ENCODING = ("train.base", "train.resolution", "train.flip", "train.random_resize", "train.crops")
GENERATORS = ("models.text_to_image", "models.vae", "models.clip")
PLANS = {
    "instructions": Plan(
        "jobs.edit_captions", ("seed", "truth", "models.llm", "captions", "instructions"), size="captions", by_row=True
    ),
    "pairs": Plan(
        "jobs.generate_pairs", ("seed", *GENERATORS, "pairs"), ("instructions",), size="captions", by_row=True
    ),
    "dataset": Plan("jobs.export_dataset", ("dataset",), ("pairs",)),
    # The split of somebody else's dataset is made while it is encoded.
    "latents": Plan("jobs.train", ("models.vae", "dataset.validation_fraction", *ENCODING), optional=("dataset",)),
    "model": Plan("jobs.train", ("seed", "train"), ("latents",), size="steps"),
    "evaluation": Plan(
        "jobs.evaluate",
        ("seed", "truth", *GENERATORS, "models.editor", "pairs", "sampling", "evaluate"),
        optional=("instructions", "model"),
    ),
    "judge": Plan(
        "jobs.judge_edits",
        ("seed", "evaluate.judge"),
        ("evaluation",),
        by_row=True,
        folders=("evaluation/judge", "evaluation/judged.parquet"),
    ),
    "benchmark": Plan(
        "jobs.evaluate_benchmark",
        ("seed", "sampling", "models.clip", "models.dino", "models.editor", "evaluate.models"),
        optional=("model",),
    ),
    "ablations": Plan(
        "jobs.ablate",
        ("seed", "truth", *GENERATORS, "pairs", "dataset", "train", "sampling", "evaluate"),
        ("pairs",),
        size="seeds",
    ),
    "language_model": Plan("jobs.tune_caption_editor", ("seed", "truth", "models.llm", "tune", "captions.kinds")),
}
# Keys inside a section above that a stage does not read.
NOT_READ = {"evaluation": ("evaluate.judge",), "ablations": ("evaluate.judge",)}


class Stage:
    """One stage of one workspace.

    Args:
        inputs_in: the workspace that holds its inputs, where that is another one.
        also: further values that decide what is made, by the name that a refusal shows.
        amount: further values that decide how much is made.

    Raises `UserError` when an input is not complete, or a model is not there.
    """

    def __init__(
        self,
        workspace: Workspace,
        name: str,
        recipe: Recipe,
        inputs_in: Workspace | None = None,
        also: Mapping[str, Any] | None = None,
        amount: Mapping[str, float] | None = None,
    ):
        self.workspace, self.name, self.recipe, self.plan = workspace, name, recipe, PLANS[name]
        self.folders = self.plan.folders or (name,)
        self.what = decisive(recipe, name, "what") | jsonable(also or {})
        self.how_much = decisive(recipe, name, "how_much") | dict(amount or {})
        self.started_at = time.perf_counter()
        self._missing = ""
        for stage in (*self.plan.inputs, *self.plan.optional):
            self._read_input(inputs_in or workspace, stage)
        if self._missing and not workspace.done(self.folders[0]):
            raise UserError(self._missing)

    def _read_input(self, source: Workspace, stage: str) -> None:
        """Note what an input was made with and how large it is."""
        growing = self.how_much if self.plan.by_row else self.what
        key, size = f"{stage}/", PLANS[stage].size
        if source.done(stage):
            self.what[key] = fingerprint(source, stage, by_row=self.plan.by_row)
            if size:
                growing[f"{size} in {key}"] = source.counts(stage)[size]
        elif stage in self.plan.inputs:
            self._missing = f"{source.uri(stage)} is not complete: run {PLANS[stage].job} first"
            # The input may have been removed after this stage was complete, to save storage for example.
            before = self._made_with()
            for values, made in ((self.what, "what"), (self.how_much, "how_much")):
                values |= {name: value for name, value in before.get(made, {}).items() if name.endswith(key)}

    def begin(self, overwrite: bool = False, retry_failed: bool = False) -> bool:
        """Start or resume the stage; returns whether there is anything to do.

        With `retry_failed` a complete stage is opened again: the caller removes its failed rows.

        Raises `UserError`, naming keys and values, when it was started with others or would have to shrink.
        """
        if self._missing and (overwrite or retry_failed):
            raise UserError(self._missing)
        if overwrite or self._made_with().get("removing"):
            remove(self.workspace, self.name)
        elif changed := self.changes():
            raise UserError(
                f"{self.workspace.uri(self.folders[0])} was made with another recipe ({'; '.join(changed)}): use that "
                "one, or another workspace, or --overwrite to remove it, with all that was made from it"
            )
        if self.workspace.done(self.folders[0]):
            before = self._made_with().get("how_much", self.how_much)
            if before == self.how_much and not retry_failed:
                return False
            self._reopen(before)
        self._write({"what": self.what})
        return True

    def finish(self, counts: Mapping[str, Any], rows: int = 0, failed: int = 0, example: str = "") -> None:
        """Complete the stage with what it counted, unless more than `max_failed` of its rows have failed.

        Raises `UserError` then, with `example`, the reason of one of them.
        """
        if failed > self.recipe.max_failed * rows:
            again = " with --retry-failed" if self.plan.by_row else ""
            raise UserError(
                f"{failed} of {rows} rows of {self.workspace.uri(self.folders[0])} failed, more than max_failed "
                f"{self.recipe.max_failed:g} of them ({example}): mend the cause and run the same command{again}, or "
                "raise max_failed"
            )
        self._write({"what": self.what, "how_much": self.how_much})
        self.workspace.mark_done(self.folders[0], **counts)
        seconds = round(time.perf_counter() - self.started_at, 3)
        job = self.plan.job.removeprefix("jobs.")
        self.workspace.record(job, recipe=self.recipe.model_dump(mode="json"), seconds=seconds, **counts)

    def changes(self) -> list[str]:
        """The values that decide what is made and differ from those that the stage was started with."""
        before = self._made_with().get("what")
        if before is None or not started(self.workspace, self.name):
            return []
        return [
            f"{key}: {json.dumps(before.get(key))} before, {json.dumps(self.what.get(key))} now"
            for key in sorted(before.keys() | self.what.keys())
            if before.get(key) != self.what.get(key)
        ]

    def _reopen(self, before: Mapping[str, float | None]) -> None:
        """Take the mark of completion back. Raises `UserError` when the stage would have to shrink."""
        for key, value in self.how_much.items():
            if limit(value) < limit(before.get(key, value)):
                raise UserError(
                    f"{key}: {before[key]} before, {value} now: a complete stage can grow and not shrink; use another "
                    "workspace, or --overwrite to start it over"
                )
        self.workspace.fs.delete_file(self.workspace.path(self.folders[0], "_SUCCESS"))

    def _made_with(self) -> dict[str, Any]:
        return made_with(self.workspace, self.name)

    def _write(self, content: dict[str, Any]) -> None:
        self.workspace.write(json.dumps(content, indent=2), *made_with_path(self.name))


def remove(workspace: Workspace, name: str) -> None:
    """Remove a stage and all that was made from it.

    Safe to interrupt: a note that the stage is being removed comes first, then the marks of completion, so that
    nothing half removed counts as complete, then the checkpoints, then the data. The next `begin` continues.
    """
    stages = [name, *made_from(name)]
    folders = [folder for stage in stages for folder in PLANS[stage].folders or (stage,)]
    workspace.write(json.dumps({"removing": True}), *made_with_path(name))
    for folder in folders:
        if workspace.done(folder):
            workspace.fs.delete_file(workspace.path(folder, "_SUCCESS"))
    for folder in (*(f"checkpoints/{stage}" for stage in stages), *folders):
        if workspace.exists(folder):
            print(f"overwrite: removing {workspace.uri(folder)}", flush=True)
            workspace.fs.delete_dir(workspace.path(folder))
    for stage in reversed(stages):
        if workspace.exists(*made_with_path(stage)):
            workspace.fs.delete_file(workspace.path(*made_with_path(stage)))


def made_from(name: str) -> list[str]:
    """All stages that are made from `name`, directly or not."""
    found = {name}
    for stage, plan in PLANS.items():  # in order: a stage comes after its inputs
        if found & {*plan.inputs, *plan.optional}:
            found.add(stage)
    return [stage for stage in PLANS if stage in found - {name}]


def started(workspace: Workspace, name: str) -> bool:
    """Whether a stage has written anything."""
    folders = PLANS[name].folders or (name,)
    return any(workspace.exists(folder) for folder in (*folders, f"checkpoints/{name}"))


def fingerprint(workspace: Workspace, name: str, by_row: bool = False) -> str:
    """Return 12 hex digits that change with what a complete stage was made with and with what it counted.

    For a stage that depends on it row by row the counts do not matter.
    """
    return short_digest([made_with(workspace, name).get("what"), {} if by_row else workspace.counts(name)])


def made_with_path(name: str) -> tuple[str, str]:
    return "made_with", f"{name}.json"


def made_with(workspace: Workspace, name: str) -> dict[str, Any]:
    """{what, how_much} that a stage was started with; empty when it was not."""
    if not workspace.exists(*made_with_path(name)):
        return {}
    with workspace.open_in(*made_with_path(name)) as file:
        return json.loads(file.read())


def decisive(recipe: Recipe, stage: str, mark: str) -> dict[str, Any]:
    """The keys of a recipe that a stage reads and that are declared by `mark`, dotted, with their JSON values.

    A model counts by its content: a directory by its files, a hub id by its revision.
    """
    plan, left_out = PLANS[stage], NOT_READ.get(stage, ())

    def reads(key: str) -> bool:
        return any(covers(one, key) for one in plan.keys) and not any(covers(one, key) for one in left_out)

    return {key: value for key, decides, value in leaves(recipe, reads) if decides == mark}


def leaves(section: BaseModel, reads: Callable[[str], bool], prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield (dotted key, mark, JSON value) of the keys that `reads` accepts; keys of a `how` section count as `how`."""
    for name, field in type(section).model_fields.items():
        key, value = f"{prefix}{name}", getattr(section, name)
        extra = field.json_schema_extra
        decides = str(extra["decides"]) if isinstance(extra, dict) else "section"
        if isinstance(value, BaseModel) and not isinstance(value, ModelRef | ClipRef) and decides != "how":
            yield from leaves(value, reads, f"{key}.")
        elif not reads(key):
            continue
        elif isinstance(value, ModelRef | ClipRef):
            yield from ((f"{key}.{part}", "what", one) for part, one in model_content(value, key).items())
        elif isinstance(value, dict) and all(isinstance(one, OtherEditor) for one in value.values()):
            yield key, decides, {one: editor_content(other, f"{key}.{one}") for one, other in value.items()}
        else:
            yield key, decides, jsonable(value)


def model_content(ref: ModelRef | ClipRef, key: str) -> dict[str, Any]:
    """A model's keys with its directory replaced by a hash of the files in it."""
    values = ref.model_dump(mode="json")
    if isinstance(ref, ClipRef):
        if not ref.name.startswith(LOCAL_CLIP):
            return values
        folder = locate(ref.name.removeprefix(LOCAL_CLIP), f"{key}.name")
        return values | {"name": f"files {files_digest(folder)}"}
    folder = locate(ref.path, f"{key}.path")
    if not Path(folder).is_absolute():
        return values
    return values | {"path": f"files {files_digest(folder)}", "revision": None}


def editor_content(other: OtherEditor, key: str) -> dict[str, Any]:
    """As `model_content`, of an editor that another run may have trained."""
    if other.workspace is not None:
        trained = Workspace(other.workspace)
        if not trained.done("model"):
            raise UserError(f"{key}.workspace: {other.workspace} has no trained model; run jobs.train on it")
        return {"model/": fingerprint(trained, "model"), "dtype": other.dtype}
    assert other.path is not None
    return model_content(ModelRef(path=other.path, revision=other.revision, dtype=other.dtype), key)


@cache
def files_digest(folder: str) -> str:
    """Return 12 hex digits of the names and contents of all files below a local folder."""
    whole = hashlib.sha256()
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        whole.update(f"{path.relative_to(folder)}\0".encode())
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:12]


def covers(key: str, other: str) -> bool:
    """Whether `other` is `key` or lies in the section `key`."""
    return other == key or other.startswith(f"{key}.")


def limit(value: float | None) -> float:
    """null is no limit."""
    return math.inf if value is None else value


def jsonable(value: Any) -> Any:
    """`value` as JSON gives it back."""
    return json.loads(json.dumps(value, default=lambda one: one.model_dump(mode="json")))


def short_digest(value: Any) -> str:
    """Return 12 hex digits of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
