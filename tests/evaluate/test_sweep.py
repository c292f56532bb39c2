import random
from collections import Counter

import pyarrow.compute as pc
import pytest

from ip2p.evaluate.sweep import (
    EDITS,
    SDEDIT,
    SDEDIT_INSTRUCTION,
    SHIPPED,
    UNCHANGED,
    WORKSPACE,
    curve_scales,
    plan_edits,
)
from ip2p.evaluate.truth import KINDS, dataset_cases, judge, rendered_cases
from ip2p.images import decode
from ip2p.miniature.render import render
from ip2p.miniature.triplets import draw_triplet, edit_kind
from ip2p.workspace import Workspace
from tests.evaluate.synthetic import make_recipe, make_workspace

SWEEP = {
    "images": 14,
    "seeds": 2,
    "grid_images": 1,
    "guidance_scale": [1, 4],
    "image_guidance_scale": [1, 2, 3],
    "fixed_guidance_scale": 4,
    "fixed_image_guidance_scale": 2,
    "sdedit_strengths": [0.5],
}


@pytest.fixture(scope="module")
def recipe():
    return make_recipe(evaluate=SWEEP, sampling={"guidance_scale": 5, "image_guidance_scale": 1.5})


def test_only_the_kinds_that_are_asked_for_are_tested():
    some = make_recipe(evaluate={"images": 7, "kinds": ["look", "recolour"]})
    assert rendered_cases(some)["edit_kind"].to_pylist() == ["look", "recolour"] * 3 + ["look"]
    with pytest.raises(ValueError, match=r"evaluate\.kinds: 'colour' is no kind of edit; choose of recolour"):
        rendered_cases(make_recipe(evaluate={"kinds": ["colour"]}))


def test_every_image_is_edited_along_both_scales_and_one_on_the_whole_grid(recipe):
    test = rendered_cases(recipe)
    edits = plan_edits(recipe, test, [WORKSPACE, SHIPPED])
    assert edits.schema == EDITS
    assert len(curve_scales(recipe)) == 3 + 2 - 1 + 1
    grid_only = 6 - 4
    per_model = (14 * len(curve_scales(recipe)) + grid_only) * 2
    assert Counter(edits["model"].to_pylist()) == {
        WORKSPACE: per_model, SHIPPED: per_model, UNCHANGED: 14, SDEDIT: 14 * 2, SDEDIT_INSTRUCTION: 14 * 2,
    }  # fmt: skip
    assert len(set(edits["edit_id"].to_pylist())) == edits.num_rows, "the checkpoint needs unique ids"


def test_an_image_has_the_same_noise_everywhere_and_others_have_other(recipe):
    edits = plan_edits(recipe, rendered_cases(recipe), [WORKSPACE, SHIPPED])
    seeds = (
        edits.filter(pc.not_equal(edits["model"], UNCHANGED)).group_by("caption_id").aggregate([("seed", "distinct")])
    )
    every = [tuple(sorted(found)) for found in seeds["seed_distinct"].to_pylist()]
    assert all(len(found) == 2 for found in every)
    assert len(set(every)) == 14


def test_the_plan_is_the_same_every_time(recipe):
    test = rendered_cases(recipe)
    assert plan_edits(recipe, test, [WORKSPACE]).equals(plan_edits(recipe, rendered_cases(recipe), [WORKSPACE]))
    other = recipe.model_copy(update={"seed": 1})
    assert set(rendered_cases(other)["caption_id"].to_pylist()).isdisjoint(test["caption_id"].to_pylist())


def test_rendered_cases_are_true(recipe):
    cases = rendered_cases(recipe).to_pylist()
    assert [case["edit_kind"] for case in cases] == [*KINDS, *KINDS[:2]]
    for case in cases:
        assert edit_kind(case["original_prompt"], case["instruction"]) == case["edit_kind"]
    sources, targets = ([decode(case[key]) for case in cases] for key in ("original_image", "edited_image"))
    instructions = [case["instruction"] for case in cases]
    assert all(truth.success for truth in judge(sources, instructions, targets))
    assert not any(truth.success for truth in judge(sources, instructions, sources))


def test_pairs_are_right_when_the_instruction_turns_one_image_into_the_other():
    drawn = draw_triplet(random.Random(0), "background")
    before, after = render(drawn.scene), render(drawn.edited_scene)
    instructions = [drawn.instruction, drawn.instruction, "delete the seventh star"]
    right, unchanged, senseless = judge([before] * 3, instructions, [after, before, after])
    assert right.success
    assert not unchanged.success
    assert not senseless.carried_out


def test_cases_of_a_dataset_are_one_held_out_pair_of_each_caption(recipe, tmp_path):
    workspace = make_workspace(tmp_path, recipe)
    cases = dataset_cases(recipe, workspace).to_pylist()
    held_out = workspace.read_table("dataset", "validation")
    best = held_out.sort_by([("clip_sim_dir", "descending")]).to_pylist()
    assert len(cases) == len(set(held_out["caption_id"].to_pylist()))
    for case in cases:
        pair = next(pair for pair in best if pair["caption_id"] == case["caption_id"])
        assert case["original_image"] == pair["original_image"]["bytes"]
        assert case["instruction"] == pair["edit_prompt"]


def test_without_held_out_pairs_the_way_out_is_named(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"dataset\.validation_fraction"):
        dataset_cases(recipe, Workspace(tmp_path))
