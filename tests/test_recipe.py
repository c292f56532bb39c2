from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from ip2p.cli import read_recipe, read_yaml
from ip2p.errors import UserError
from ip2p.recipe import REPOSITORY, GrammarCaptions, Recipe, Sharing

MINIMAL: dict[str, Any] = {
    "name": "x",
    "models": {
        "text_to_image": {"path": "a/b"},
        "clip": {"name": "ViT-L-14", "pretrained": "openai"},
        "llm": {"path": "a/b"},
        "editor": {"path": "a/b"},
    },
    "captions": {"kind": "grammar"},
}
RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))


def refusal(**changes: Any) -> str:
    with pytest.raises(ValidationError) as error:
        Recipe.model_validate({**MINIMAL, **changes})
    return str(error.value)


def test_a_minimal_recipe_has_defaults_of_the_paper():
    recipe = Recipe.model_validate(MINIMAL)
    assert isinstance(recipe.captions, GrammarCaptions)
    assert recipe.pairs.candidates == 100
    assert recipe.pairs.thresholds.direction == 0.2
    assert recipe.train.drop_text == recipe.train.drop_image == recipe.train.drop_both == 0.05
    assert (recipe.sampling.guidance_scale, recipe.sampling.image_guidance_scale) == (7.5, 1.5)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_shipped_recipes_are_valid_and_survive_a_round_trip(path):
    recipe = read_recipe(path)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_there_are_recipes_for_both_families():
    assert {"miniature", "miniature_full", "sd15"} <= {path.stem for path in RECIPES}


def test_the_real_recipe_pins_every_hub_model_and_keeps_upstreams_protocol():
    recipe = read_recipe("recipes/sd15.yaml")
    for ref in (recipe.models.text_to_image, recipe.models.vae, recipe.models.llm, recipe.models.editor):
        assert ref is not None
        assert len(ref.revision or "") == 40
    assert recipe.pairs.solver == "euler_ancestral"
    assert (recipe.pairs.sharing.modes, recipe.pairs.sharing.self_attention) == (["self"], 1)
    assert recipe.pairs.guidance_scale == (7.5, 15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": {"candidatez": 3}}, "candidatez"),
        ({"pairs": {"candidates": 0}}, "greater than 0"),
        ({"pairs": {"guidance_scale": [4, 2]}}, "low <= high"),
        ({"pairs": {"height": 500}}, "multiples of 8, not 500: e.g. 496"),
        ({"pairs": {"thresholds": {"image": 0.9, "image_max": 0.8}}}, "nothing could pass"),
        ({"pairs": {"thresholds": {"image": float("nan")}}}, "finite"),
        ({"train": {"drop_text": 0.6, "drop_image": 0.6}}, "must be <= 1"),
        ({"train": {"batch_size": 1, "workers": 2}}, "at least workers 2"),
        ({"train": {"batch_size": 5, "workers": 2, "parallel": "fsdp"}}, "multiple of workers"),
        ({"dataset": {"validation_fraction": 0.5, "test_fraction": 0.5}}, "nothing is left to train on"),
        ({"instructions": {"max_tokens": 512, "max_model_len": 512}}, "prompts need room"),
        ({"evaluate": {"guidance_scale": []}}, "at least 1 item"),
        ({"captions": {"kind": "files"}}, "path"),
        ({"captions": {"kind": "hub", "path": "a/b", "near_duplicates": 0}}, "greater than 0"),
        ({"train": {"random_resize": [200, 288]}}, "random_resize begins at 200, below resolution 256"),
        ({"train": {"crops": 2}}, "all be the same without random_resize"),
        ({"captions": {"kind": "csv", "path": "a.csv"}}, "'grammar', 'files', 'hub'"),
        ({"captions": {"kind": "grammar", "path": "x"}}, "Extra inputs"),
        ({"models": {**MINIMAL["models"], "clip": {"name": "ViT-L-14"}}}, "needs pretrained"),
        ({"models": {**MINIMAL["models"], "clip": {"name": "local-dir:x", "pretrained": "openai"}}}, "leave out"),
        ({"device": "tpu"}, "'auto', 'cpu' or 'cuda'"),
    ],
)
def test_what_is_impossible_is_refused(changes, message):
    assert message in refusal(**changes)


def test_a_recipe_does_not_change_under_a_job():
    with pytest.raises(ValidationError, match="frozen"):
        Recipe.model_validate(MINIMAL).pairs.candidates = 3


def test_every_key_is_described():
    def bare(model: type[BaseModel], path: str = "") -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            sections = [
                a for a in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(a, type)
            ]
            sections = [a for a in sections if issubclass(a, BaseModel)]
            if not sections and not field.description:
                found.append(path + name)
            for section in sections:
                assert section.__doc__, section
                found += bare(section, f"{path}{name}.")
        return found

    assert bare(Recipe) == []


def test_a_key_that_is_there_twice_is_refused(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("pairs:\n  steps: 3\n  steps: 4\n")
    with pytest.raises(ValueError, match="duplicate key 'steps'"):
        read_yaml(file)


MERGED = """
base: &base {steps: 3, guidance_scale: 2}
other: &other {steps: 9, candidates: 4}
pairs: {<<: *base, steps: 5}
both: {<<: [*base, *other]}
deep: {pairs: {<<: *base}}
"""


def test_merge_keys_are_merged_and_own_keys_win(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(MERGED)
    found = read_yaml(file)
    assert found["pairs"] == {"steps": 5, "guidance_scale": 2}
    assert found["both"] == {"steps": 3, "guidance_scale": 2, "candidates": 4}
    assert found["deep"]["pairs"] == found["base"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: &b {steps: 3}\npairs: {<<: *b, steps: 4, steps: 5}\n", "duplicate key 'steps'"),
        ("base: &b {steps: 3}\npairs: {<<: *b, <<: *b}\n", "duplicate key '<<'"),
        ("base: &b 3\npairs: {<<: *b}\n", "not YAML"),
        ("pairs: {<<: *nothing}\n", "not YAML"),
    ],
)
def test_wrong_merges_are_refused(tmp_path, text, message):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        read_yaml(file)


@pytest.mark.parametrize(("text", "message"), [("- a\n", "not list"), ("a: [", "not YAML"), ("", "not NoneType")])
def test_what_is_no_recipe_is_refused(tmp_path, text, message):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_yaml(file)


@pytest.mark.parametrize(
    ("sharing", "reason"),
    [
        ({"modes": ["replace"]}, "must end with self or refine"),
        ({"modes": ["refine", "self"], "emphasis": 2}, "emphasis is for the modes"),
        ({"modes": []}, "at least 1 item"),
        ({"modes": ["blend"]}, "'self', 'replace' or 'refine'"),
    ],
)
def test_modes_of_sharing_that_make_no_sense_are_refused(sharing, reason):
    with pytest.raises(ValueError, match=reason):
        Sharing.model_validate(sharing)
