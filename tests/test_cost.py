"""The cost model, against values computed by hand."""

import pyarrow as pa
import pytest

from ip2p.cost import (
    Assumptions,
    Protocol,
    Stage,
    caption_tflop,
    edits,
    evaluate_tflop,
    gpu_types,
    pair_tflop,
    protocols,
    stages,
    train_gb,
    train_tflop,
)
from ip2p.edit.names import EDITORS
from ip2p.evaluate.sweep import SDEDITS, TEST, plan_edits
from ip2p.recipe import Adaptive, Pairs, Recipe
from tests.evaluate.synthetic import make_recipe

ROUND = Assumptions(
    unet_tflop=1,
    vae_decode_tflop=2,
    vae_encode_tflop=1,
    clip_tflop=0.5,
    unet_parameters=1e9,
    llm_parameters=5e9,
    prompt_tokens=100,
    prompt_cached=0.5,
    answer_tokens=50,
    asked=2,
    instruction_share=0.5,
    fixed_pairs=2,
    adaptive_pairs=4,
    adaptive_candidates=8,
    views=2,
    png_bytes=1,
    candidate_bytes=100,
)


@pytest.fixture
def recipe() -> Recipe:
    return make_recipe(
        pairs={"candidates": 100, "steps": 50, "max_pairs": 4, "height": 256, "width": 512},
        train={"steps": 10, "batch_size": 4, "resolution": 256},
        sampling={"steps": 20, "max_side": 512},
        evaluate={
            "images": 3,
            "guidance_scale": [2, 7.5],
            "image_guidance_scale": [1, 1.5, 2],
            "sdedit_strengths": [0.5, 1],
            "grid_images": 2,
        },
    )


def test_a_stage_takes_its_operations_over_what_the_gpu_does():
    assert Stage("any", tflop=3.6e6, utilization=0.5, gigabytes=0).gpu_hours(peak_tflops=200) == 10


def test_a_caption_costs_two_operations_for_each_parameter_and_token():
    assert caption_tflop(ROUND) == pytest.approx(2 * (100 * 0.5 + 50) * 2 * 5e9 / 1e12)  # 2


def test_candidates_cost_their_unet_samples_two_images_and_their_judge():
    protocol = Protocol("", candidates=10, steps=50, samples_per_step=4, pairs_per_caption=2)
    # Half the pixels of 512 x 512: 50 x 4 samples of 0.5, two images decoded for 1 and judged for 0.5.
    assert pair_tflop(Pairs(height=256, width=512), protocol, ROUND) == 10 * (100 + 3)
    assert protocol.unet_samples_per_pair == 1000


def test_training_encodes_once_and_passes_thrice(recipe):
    # A quarter of the pixels: 100 pairs x 2 views x 2 images x 0.25, and 10 steps of 4 x 3 passes x 0.25.
    assert train_tflop(recipe, 100, ROUND) == 100 + 30
    # Latents: 100 x 2 x 2 x 4 x 32 x 32 x 2 bytes; 4 GB of weights, four times that in each of two checkpoints.
    assert train_gb(recipe, 100, ROUND) == pytest.approx(0.0032768 + 2 * 16 + 4)
    crops = {"steps": 10, "batch_size": 4, "resolution": 256, "random_resize": (256, 288), "crops": 3}
    assert train_tflop(make_recipe(train=crops), 100, ROUND) == 3 * 100 + 30


def test_counts_the_edits_that_the_sweep_plans(recipe):
    cases = [("id", "", f"instruction {n}", "", "", b"", b"") for n in range(3)]
    test = pa.table([pa.array(column) for column in zip(*cases)], schema=TEST)
    models = plan_edits(recipe, test, list(EDITORS))["model"].to_pylist()
    by_sdedit = sum(model in SDEDITS for model in models)
    by_editor = sum(model in EDITORS for model in models)
    assert edits(recipe) == (by_editor, by_sdedit) == (32, 12)
    # 32 edits of 20 steps x 3, and 12 of 20 x 2 at a mean strength of 0.75; each read, written and judged for 3.5.
    assert evaluate_tflop(recipe, ROUND) == 32 * 60 + 12 * 30 + 44 * 3.5


def test_a_pipeline_is_as_large_as_its_pairs_need(recipe):
    _, fixed, _ = protocols(recipe, ROUND)
    by_name = {stage.name: stage for stage in stages(recipe, fixed, 1000, ROUND)}
    assert list(by_name) == ["edit_captions", "generate_pairs", "export_dataset", "train", "evaluate"]
    # 1,000 pairs at 2 of a caption pair: 500 caption pairs, of 1,000 captions with an answer to half.
    assert by_name["edit_captions"].tflop == pytest.approx(1000 * caption_tflop(ROUND))
    assert by_name["generate_pairs"].tflop == pytest.approx(500 * 100 * 103)
    assert by_name["generate_pairs"].gigabytes == pytest.approx(1000 * 2 * 256 * 512 / 1e9 + 500 * 100 * 100 / 1e9)
    assert by_name["export_dataset"].tflop == 0


def test_protocols(recipe):
    paper, fixed, adaptive = protocols(recipe, ROUND)
    assert (paper.candidates, paper.steps, paper.samples_per_step, paper.unet_samples_per_pair) == (100, 100, 4, 20_000)
    assert (fixed.steps, fixed.unet_samples_per_pair) == (50, 10_000)
    assert (adaptive.candidates, adaptive.pairs_per_caption, adaptive.unet_samples_per_pair) == (8, 4, 400)


def with_pairs(recipe: Recipe, **changes) -> Recipe:
    return recipe.model_copy(update={"pairs": recipe.pairs.model_copy(update=changes)})


def test_a_recipe_like_the_paper_is_shown_once(recipe):
    names = [p.name for p in protocols(with_pairs(recipe, steps=100), ROUND)]
    assert names[0].startswith("paper, and synthetic: 100 candidates")
    assert len(names) == 2


def test_an_adaptive_recipe_is_not_shown_without_its_rounds(recipe):
    few = with_pairs(recipe, adaptive=Adaptive(), candidates=6, max_pairs=2, guidance_scale=(1.0, 1.0))
    _, adaptive = protocols(few, ROUND)
    # No more candidates and pairs than the recipe allows, and no unconditional half.
    assert (adaptive.candidates, adaptive.pairs_per_caption, adaptive.samples_per_step) == (6, 2, 2)


def test_prices_are_added_to_those_known():
    assert gpu_types(Assumptions(prices={"h100": 2.5}))["h100"] == (989, 2.5)  # pyright: ignore[reportCallIssue]
    assert gpu_types(Assumptions())["l4"] == (121, 0.8)


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"prices": {"mi300x": 3}}, "peak_tflops: nothing is said of 'mi300x'"),
        ({"peak_tflops": {"b200": 2250}}, "prices: nothing is said of 'b200'"),
    ],
)
def test_a_gpu_of_which_half_is_known_is_refused(known, message):
    with pytest.raises(ValueError, match=message):
        gpu_types(Assumptions(**known))


@pytest.mark.parametrize("wrong", [{"unet_utilization": 0}, {"train_utilization": 1.5}, {"prices": {"h100": -1}}])
def test_impossible_assumptions_are_refused(wrong):
    with pytest.raises(ValueError):
        Assumptions(**wrong)


def test_every_assumption_names_its_source():
    for name, field in Assumptions.model_fields.items():
        words = ("guess", "card", "RESULTS.md", "price", "NVIDIA", "added", "SD 1.5", "that everything is kept")
        assert any(word in (field.description or "") for word in words), name
