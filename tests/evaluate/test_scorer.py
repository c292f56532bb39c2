import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from ip2p.clip_similarity import ClipSimilarity, similarities
from ip2p.edit.names import SHIPPED
from ip2p.evaluate.pair_truth import PAIR_TRUTH, PairTruth, sample_captions
from ip2p.evaluate.scorer import EditScorer
from ip2p.evaluate.sdedit import SDEdit, SDEditRequest
from ip2p.evaluate.sweep import METRICS, SDEDIT, SDEDITS, UNCHANGED, plan_edits
from ip2p.evaluate.truth import rendered_cases
from ip2p.images import decode
from ip2p.models import load_clip, load_text_to_image
from ip2p.pairs.candidates import draw_candidate
from ip2p.workspace import Workspace
from tests.evaluate.synthetic import make_recipe, make_workspace

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def recipe(tiny_sd, tiny_editor, tiny_clip):
    return make_recipe(
        models={
            "text_to_image": {"path": str(tiny_sd)},
            "clip": {"name": f"local-dir:{tiny_clip}"},
            "llm": {"path": str(tiny_sd)},
            "editor": {"path": str(tiny_editor)},
        },
        pairs={"height": 32, "width": 32, "steps": 2, "solver": "ddim", "batch_size": 4},
        sampling={"steps": 2, "max_side": 64, "guidance_scale": 3},
        evaluate={
            "images": 3,
            "grid_images": 1,
            "guidance_scale": [1, 3],
            "image_guidance_scale": [1, 2],
            "fixed_guidance_scale": 3,
            "sdedit_strengths": [0.5, 1],
            "pair_captions": 3,
            "pair_candidates": 2,
        },
    )


@pytest.fixture(scope="module")
def scored(recipe, tmp_path_factory):
    test = rendered_cases(recipe)
    scorer = EditScorer(recipe, Workspace(tmp_path_factory.mktemp("w")), test)
    return test, scorer(plan_edits(recipe, test, [SHIPPED]))


def test_every_planned_edit_becomes_one_row(recipe, scored):
    test, metrics = scored
    assert metrics.schema == METRICS
    assert metrics["edit_id"].equals(plan_edits(recipe, test, [SHIPPED])["edit_id"])
    assert all(decode(image).shape == (32, 32, 3) for image in metrics["image"].to_pylist())
    for name in ("clip_sim_image", "clip_sim_dir", "clip_sim_1", "success"):
        assert metrics[name].null_count == 0


def test_rows_say_what_the_images_show(recipe, scored):
    test, metrics = scored
    clip = ClipSimilarity(load_clip(recipe.models.clip, "cpu"))
    cases = {row["caption_id"]: row for row in test.to_pylist()}
    row = metrics.filter(pc.equal(metrics["model"], SHIPPED)).to_pylist()[3]
    case = cases[row["caption_id"]]
    images = (clip.embed_images(decode(data)[None]) for data in (case["original_image"], row["image"]))
    texts = (clip.embed_texts([case[key]]) for key in ("original_prompt", "edited_prompt"))
    expected = similarities(*images, *texts)
    for name in ("clip_sim_image", "clip_sim_dir", "clip_sim_1"):
        assert row[name] == pytest.approx(expected[name].item(), abs=1e-5)


def test_the_unchanged_input_keeps_everything_and_does_nothing(scored):
    _, metrics = scored
    for row in metrics.filter(pc.equal(metrics["model"], UNCHANGED)).to_pylist():
        assert row["clip_sim_image"] == pytest.approx(1, abs=1e-5)
        assert row["clip_sim_dir"] == pytest.approx(0, abs=1e-5)
        assert (row["carried_out"], row["preserved"], row["valid"], row["success"]) == (False, True, True, False)


def test_an_edit_does_not_depend_on_its_batch(recipe, scored, tmp_path):
    test, metrics = scored
    scorer = EditScorer(recipe, Workspace(tmp_path), test)
    for model in (SDEDIT, SHIPPED):
        some = metrics.filter(pc.equal(metrics["model"], model)).slice(2, 1)
        again = scorer(some.select(plan_edits(recipe, test, [SHIPPED]).column_names))
        before, after = (decode(table["image"][0].as_py()).astype(int) for table in (some, again))
        assert np.abs(before - after).max() <= 1


def test_sdedit_is_told_the_edited_caption_or_the_instruction(scored):
    _, metrics = scored
    told = [metrics.filter(pc.equal(metrics["model"], model))["image"].to_pylist() for model in SDEDITS]
    assert len(told[0]) == len(told[1]) > 0
    assert all(caption != instruction for caption, instruction in zip(*told, strict=True))


def test_sdedit_keeps_more_of_the_image_at_less_strength(recipe, scored):
    case = scored[0].to_pylist()[0]
    image = decode(case["original_image"])
    model = load_text_to_image(recipe.models.text_to_image, None, "cpu")
    editor = SDEdit(model, recipe.sampling.model_copy(update={"steps": 10, "solver": "ddim"}), batch_size=2)
    requests = [SDEditRequest(image, "a red square", strength, 1.0, seed=5) for strength in (0.1, 1.0)]
    latents = [
        editor.model.encode_image(torch.from_numpy(np.array(x)).permute(2, 0, 1)[None] / 127.5 - 1, True)
        for x in [image, *editor.edit(requests)]
    ]
    assert (latents[1] - latents[0]).norm() < (latents[2] - latents[0]).norm()
    with pytest.raises(ValueError, match="strength"):
        editor.edit([SDEditRequest(image, "a red square", 0.0, 1.0, seed=5)])


def test_sdedit_results_have_the_size_of_their_inputs(recipe):
    model = load_text_to_image(recipe.models.text_to_image, None, "cpu")
    images = [np.zeros((h, w, 3), np.uint8) for h, w in ((33, 70), (64, 64), (100, 20))]
    requests = [SDEditRequest(image, "x", 0.5, 2.0, seed=1) for image in images]
    results = SDEdit(model, recipe.sampling, batch_size=4).edit(requests)
    assert [result.shape for result in results] == [image.shape for image in images]


def test_pairs_are_drawn_as_the_pipeline_draws_them_with_and_without_sharing(recipe, tmp_path):
    rows = sample_captions(recipe, make_workspace(tmp_path, recipe, captions=12))
    assert rows.num_rows == 3
    judged = PairTruth(recipe)(rows)
    assert judged.schema == PAIR_TRUTH
    for row in judged.to_pylist():
        ks = [draw_candidate(recipe.pairs, recipe.seed, row["caption_id"], k) for k in range(2)]
        seeds = {candidate.seed for candidate in ks}
        by_shared = {s: {c["seed"]: c for c in row["candidates"] if c["shared"] is s} for s in (False, True)}
        assert set(by_shared[False]) == set(by_shared[True]) == seeds
        for seed in seeds:
            without, with_ = by_shared[False][seed], by_shared[True][seed]
            assert without["original_image"] == with_["original_image"], "the source shares nothing with anyone"
            assert without["edited_image"] != with_["edited_image"]
            assert isinstance(with_["success"], bool)


def test_rows_without_an_instruction_are_not_sampled(recipe, tmp_path):
    workspace = make_workspace(tmp_path, recipe, captions=12)
    many = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"pair_captions": 100})})
    instructions = workspace.read_table("instructions")
    ok = instructions.filter(pc.equal(instructions["status"], "ok"))
    sampled = sample_captions(many, workspace)
    assert isinstance(sampled, pa.Table)
    assert set(sampled["caption_id"].to_pylist()) == set(ok["caption_id"].to_pylist())
