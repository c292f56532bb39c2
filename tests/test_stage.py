"""The contract of a stage, over every key of the recipe and every stage."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from ip2p import stage as contract
from ip2p.errors import UserError
from ip2p.recipe import REPOSITORY, Recipe
from ip2p.stage import PLANS, Stage, covers, made_from, remove
from ip2p.workspace import Workspace

HUB = {"path": "someone/model", "revision": "1"}
# Every optional section is there, so that each of their keys can be changed.
FULL: dict[str, Any] = {
    "name": "full",
    "truth": "oracle",
    "models": {
        "text_to_image": HUB, "vae": HUB, "clip": {"name": "ViT-L-14", "pretrained": "openai"}, "dino": HUB,
        "llm": HUB, "editor": HUB,
    },
    "captions": {"kind": "grammar", "kinds": ["add"]},
    "instructions": {"same_meaning": 0.9, "quotas": {"add": 0.5}, "engine": {"seed": 1}, "unsafe": {"words": ["x"]}},
    "tune": {"triplets": "x.jsonl"},
    "pairs": {
        "adaptive": {}, "early_look": {"drop_below": 0.1}, "sharing": {"modes": ["replace", "refine"], "blend": {}},
        "quality": dict.fromkeys(
            ["intercept", "image", "direction", "agreement_before", "agreement_after", "at_least"], 0.5
        ),
    },
    "dataset": {"test_fraction": 0.1},
    "train": {
        "base": HUB, "dataset": "somewhere", "random_resize": [256, 288], "crops": 2, "micro_batch": 8, "lora_rank": 4,
        "min_snr_gamma": 5, "mlflow": {"tracking_uri": "http://localhost"}, "workers": 2,
    },
    "evaluate": {
        "kinds": ["add"], "chosen": {"image": "a.png", "instruction": "b"}, "judge": {"model": HUB},
        "models": {"other": {"path": "someone/editor"}},
    },
    "serve": {"version": "shipped", "canary": {"version": "x"}},
}  # fmt: skip


def keys_of(section: BaseModel, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path, mark) of every key, found in the schema alone."""
    for name, field in type(section).model_fields.items():
        value, extra = getattr(section, name), field.json_schema_extra
        if isinstance(value, BaseModel):
            inside = list(keys_of(value, (*path, name)))
            outer = extra["decides"] if isinstance(extra, dict) else ""
            yield from ((one, "how" if outer == "how" else mark) for one, mark in inside)
        else:
            assert isinstance(extra, dict), f"{'.'.join((*path, name))} is declared neither what, how nor how_much"
            yield (*path, name), str(extra["decides"])


RECIPE = Recipe.model_validate(FULL)
KEYS = dict(keys_of(RECIPE))
del KEYS["captions", "kind"]  # another kind has other keys, too
WORDS = [
    "cpu", "none", "float16", "ddim", "few_shot", "fsdp", "best", "other", "another/model", "local-dir:somewhere",
    ["refine"], ["move"], [1.5], [0.5], [0.2, 0.3], [9.0, 10.0], [300.0, 310.0], {"move": 0.25}, {"seed": 2}, (1, 2),
    {"mine": {"path": "another/editor"}},
]  # fmt: skip


def changed(path: tuple[str, ...]) -> Recipe:
    """RECIPE with another valid value of one key, larger where it is a number."""
    old: Any = RECIPE
    for part in path:
        old = getattr(old, part)
    candidates: list[Any] = WORDS
    if isinstance(old, bool):
        candidates = [not old]
    elif isinstance(old, int | float):
        candidates = [old * 2, old + 8, old + 0.01, old / 2]
    elif old == HUB["path"]:
        candidates = ["another/model"]
    for value in candidates:
        tree = RECIPE.model_dump(mode="json")
        tree["captions"] = dict(tree["captions"])
        *sections, last = path
        section = tree
        for name in sections:
            section = section[name]
        section[last] = value
        try:
            result = Recipe.model_validate(tree)
        except ValidationError:
            continue
        if result != RECIPE:
            return result
    raise AssertionError(f"no other value for {'.'.join(path)}")


@pytest.fixture
def begun(tmp_path) -> Workspace:
    """A workspace in which every stage was started with RECIPE and has written something."""
    workspace = Workspace(tmp_path)
    for name, plan in PLANS.items():
        with workspace.open_out((plan.folders or (name,))[0], "data") as file:
            file.write(b"x")
        stage = Stage(workspace, name, RECIPE)
        assert stage.begin()
        stage.finish({plan.size: 1} if plan.size else {})
    return workspace


@pytest.mark.parametrize("path", KEYS, ids=".".join)
def test_a_changed_what_is_refused_and_a_changed_how_is_accepted(begun, path):
    key, mark, other = ".".join(path), KEYS[path], changed(path)
    for name, plan in PLANS.items():
        read = any(covers(one, key) for one in plan.keys)
        read &= not any(covers(one, key) for one in contract.NOT_READ.get(name, ()))
        stage = Stage(begun, name, other)
        if mark == "what" and read:
            with pytest.raises(UserError, match="--overwrite") as refused:
                stage.begin()
            assert f"{key}: " in str(refused.value) and " before, " in str(refused.value)
        else:
            counts = begun.counts(stage.folders[0])
            assert stage.begin() == (mark == "how_much" and read), f"{name} with another {key}"
            begun.mark_done(stage.folders[0], **counts)  # an extended stage is an input of the next ones


def test_every_key_that_decides_what_is_made_is_read_by_a_stage():
    read = [key for plan in PLANS.values() for key in plan.keys]
    unread = [".".join(path) for path, mark in KEYS.items() if mark != "how"]
    assert [key for key in unread if not any(covers(one, key) for one in read)] == []


@pytest.mark.parametrize(
    ("stage", "key", "value"), [("dataset", "validation_fraction", 0.3), ("train", "learning_rate", 0.5)]
)
def test_a_complete_stage_does_not_take_another_recipe_for_its_own(begun, stage, key, value):
    section = getattr(RECIPE, stage).model_copy(update={key: value})
    name = {"dataset": "dataset", "train": "model"}[stage]
    old = getattr(getattr(RECIPE, stage), key)
    with pytest.raises(UserError, match=rf"{stage}\.{key}: {old:g} before, {value:g} now"):
        Stage(begun, name, RECIPE.model_copy(update={stage: section})).begin()


def test_nothing_is_refused_before_anything_is_written(tmp_path):
    workspace = Workspace(tmp_path)
    assert Stage(workspace, "instructions", RECIPE).begin()
    assert Stage(workspace, "instructions", changed(("seed",))).begin()


def test_an_input_must_be_complete(tmp_path):
    with pytest.raises(UserError, match=r"instructions is not complete: run jobs\.edit_captions first"):
        Stage(Workspace(tmp_path), "pairs", RECIPE)


def test_a_complete_stage_outlives_its_input(begun):
    """pairs/ may be removed to save storage; dataset/ stays complete, and stays itself."""
    begun.fs.delete_dir(begun.path("pairs"))
    assert not Stage(begun, "dataset", RECIPE).begin()
    with pytest.raises(UserError, match=r"dataset\.validation_fraction: "):
        Stage(begun, "dataset", changed(("dataset", "validation_fraction"))).begin()
    with pytest.raises(UserError, match=r"pairs is not complete: run jobs\.generate_pairs first"):
        Stage(begun, "dataset", RECIPE).begin(overwrite=True)
    assert begun.exists("dataset", "data")
    begun.fs.delete_file(begun.path("dataset", "_SUCCESS"))
    with pytest.raises(UserError, match=r"pairs is not complete: run jobs\.generate_pairs first"):
        Stage(begun, "dataset", RECIPE)


def test_a_grown_input_extends_what_is_made_row_by_row_and_is_refused_elsewhere(begun):
    begun.mark_done("instructions", captions=2)
    assert Stage(begun, "pairs", RECIPE).begin() and not begun.done("pairs")
    begun.mark_done("pairs", captions=2)
    with pytest.raises(UserError, match="captions in pairs/: 1 before, 2 now"):
        Stage(begun, "dataset", RECIPE).begin()


def test_a_complete_stage_does_not_shrink(begun):
    fewer = RECIPE.captions.model_copy(update={"count": 7})
    with pytest.raises(UserError, match=r"captions\.count: 200 before, 7 now: .* grow and not shrink"):
        Stage(begun, "instructions", RECIPE.model_copy(update={"captions": fewer})).begin()
    assert begun.done("instructions")


def test_too_many_failed_rows_end_a_stage_without_success(begun):
    stage = Stage(begun, "pairs", RECIPE)
    begun.fs.delete_file(begun.path("pairs", "_SUCCESS"))
    with pytest.raises(UserError, match=r"3 of 20 rows of .*pairs failed, more than max_failed 0.1 .*--retry-failed"):
        stage.finish({}, rows=20, failed=3)
    assert not begun.done("pairs")
    stage.finish({}, rows=20, failed=2)
    assert begun.done("pairs")


def test_overwriting_removes_a_stage_and_all_that_was_made_from_it(begun, capsys):
    assert made_from("dataset") == ["latents", "model", "evaluation", "judge", "benchmark"]
    assert Stage(begun, "dataset", changed(("dataset", "validation_fraction"))).begin(overwrite=True)
    gone = ("dataset", "latents", "model", "evaluation", "benchmark")
    assert not any(begun.exists(folder) for folder in gone)
    assert begun.done("instructions") and begun.done("pairs") and begun.done("ablations")
    assert f"overwrite: removing {begun.uri('dataset')}" in capsys.readouterr().out


class InterruptedWriteError(Exception):
    pass


class DyingFileSystem:
    """The real file system, whose n-th change raises."""

    def __init__(self, fs: Any, changes: int):
        self._fs, self._left = fs, changes

    def __getattr__(self, name: str) -> Any:
        if name in ("delete_dir", "delete_file", "open_output_stream", "move"):
            self._left -= 1
            if self._left < 0:
                raise InterruptedWriteError
        return getattr(self._fs, name)


def test_overwriting_can_be_interrupted_anywhere(begun):
    """What is left is never taken for complete, and the next run, without the flag, ends the removal."""
    real = begun.fs
    with begun.open_out("checkpoints", "pairs", "0.parquet") as file:
        file.write(b"x")
    for changes in itertools.count():
        begun.fs = DyingFileSystem(real, changes)
        try:
            remove(begun, "pairs")
        except InterruptedWriteError:
            begun.fs = real
            whole = begun.exists("pairs", "data") and begun.exists("checkpoints", "pairs", "0.parquet")
            assert whole or not begun.done("pairs")
            assert begun.exists("checkpoints", "pairs") <= begun.exists("pairs", "data"), "checkpoints go before data"
            if contract.made_with(begun, "pairs").get("removing"):
                continue
            assert begun.done("pairs"), "not begun to be removed"
        else:
            break
    begun.fs = real
    assert changes > 5
    begun.write('{"removing": true}', "made_with", "pairs.json")
    with begun.open_out("pairs", "data") as file:
        file.write(b"half of it")
    assert Stage(begun, "pairs", changed(("pairs", "steps"))).begin()
    assert not begun.exists("pairs")


def test_a_fingerprint_holds_content_and_no_path(tmp_path, monkeypatch):
    """The same model at another path is the same; another one at the same path is not."""
    for folder, weights in (("a/model", b"1"), ("b/model", b"1"), ("c/model", b"2")):
        Path(tmp_path, folder).mkdir(parents=True)
        Path(tmp_path, folder, "weights").write_bytes(weights)
    workspace = Workspace(tmp_path / "run")
    with workspace.open_out("latents", "data") as file:
        file.write(b"x")

    def with_base(path: str) -> Recipe:
        base = RECIPE.train.model_copy(update={"base": RECIPE.models.llm.model_copy(update={"path": path})})
        return RECIPE.model_copy(update={"train": base})

    assert Stage(workspace, "latents", with_base(f"{tmp_path}/a/model")).begin()
    monkeypatch.chdir(tmp_path / "b")
    assert Stage(workspace, "latents", with_base("model")).begin()
    assert str(tmp_path) not in str(contract.made_with(workspace, "latents"))
    with pytest.raises(UserError, match=r"train\.base\.path: .files [0-9a-f]{12}. before, .files [0-9a-f]{12}. now"):
        Stage(workspace, "latents", with_base(f"{tmp_path}/c/model")).begin()
    shipped = RECIPE.model_copy(update={"models": RECIPE.models.model_copy(update={"editor": RECIPE.models.llm})})
    assert str(REPOSITORY) not in str(contract.decisive(shipped, "evaluation", "what"))
