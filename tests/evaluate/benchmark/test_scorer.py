import numpy as np
import pyarrow as pa
import pytest

from ip2p.clip_similarity import ClipSimilarity, similarities
from ip2p.edit.editor import Editor, EditRequest
from ip2p.edit.editors import load_editor
from ip2p.edit.names import SHIPPED
from ip2p.evaluate.benchmark.layouts import (
    EMU_EDIT,
    MAGICBRUSH,
    MULTI,
    RESULTS,
    SESSIONS,
    SINGLE,
    benchmark_files,
    read_sessions,
)
from ip2p.evaluate.benchmark.scorer import BenchmarkScorer
from ip2p.evaluate.edit_metrics import embed_by_dino, l1, l2
from ip2p.evaluate.sweep import UNCHANGED
from ip2p.images import decode
from ip2p.models import load_clip, load_dino
from ip2p.workspace import Workspace
from tests.evaluate.benchmark import synthetic_benchmarks as synthetic
from tests.evaluate.synthetic import make_recipe

BROKEN = {"bytes": b"not an image", "path": None}
TURNS = [
    *(synthetic.magicbrush_row("1", turn) for turn in (2, 1, 3)),
    synthetic.magicbrush_row("2", 1, target_img=BROKEN),
    synthetic.magicbrush_row("2", 2),
    *(synthetic.magicbrush_row("3", turn) for turn in (1, 3)),
]


@pytest.fixture(scope="module")
def recipe(tiny_sd, tiny_editor, tiny_clip, tiny_dino):
    models = {
        "text_to_image": {"path": str(tiny_sd)},
        "clip": {"name": f"local-dir:{tiny_clip}"},
        "dino": {"path": str(tiny_dino)},
        "llm": {"path": str(tiny_sd)},
        "editor": {"path": str(tiny_editor)},
    }
    return make_recipe(device="cpu", models=models, sampling={"steps": 2, "max_side": 64, "guidance_scale": 3})


def sessions(folder, layout) -> pa.Table:
    source = Workspace(folder)
    return pa.Table.from_pylist(list(read_sessions(source, benchmark_files(source), layout)), schema=SESSIONS)


@pytest.fixture(scope="module")
def magicbrush(tmp_path_factory) -> pa.Table:
    return sessions(synthetic.write(tmp_path_factory.mktemp("magicbrush"), TURNS), MAGICBRUSH)


@pytest.fixture(scope="module")
def scorer(recipe, tmp_path_factory) -> BenchmarkScorer:
    return BenchmarkScorer(recipe, Workspace(tmp_path_factory.mktemp("w")), [SHIPPED], (SINGLE, MULTI))


@pytest.fixture(scope="module")
def found(scorer, magicbrush) -> dict[tuple, dict]:
    """(model, mode, id, turn) -> the row of the edit, with its image."""
    results = scorer(magicbrush)
    assert results.schema == RESULTS
    assert results["id"].equals(magicbrush["id"])
    return by_key(results)


def by_key(results: pa.Table) -> dict[tuple, dict]:
    return {
        (edit["model"], edit["mode"], row["id"], edit["turn"]): edit | {"image": image}
        for row in results.to_pylist()
        for edit, image in zip(row["edits"], row["images"], strict=True)
    }


def test_every_turn_has_a_row_for_every_model_and_mode(found):
    turns = {(row["img_id"], row["turn_index"]) for row in TURNS}
    wanted = {(model, mode, *turn) for model in (SHIPPED, UNCHANGED) for mode in (SINGLE, MULTI) for turn in turns}
    assert set(found) == wanted


@pytest.mark.parametrize("model", [SHIPPED, UNCHANGED])
def test_what_cannot_be_edited_says_why(found, model):
    reasons = {key[1:]: row["reason"] for key, row in found.items() if key[0] == model and row["status"] == "failed"}
    assert {key: reason.split(" (")[0] for key, reason in reasons.items()} == {
        (SINGLE, "2", 1): "target_img: not an image that can be read",
        (MULTI, "2", 1): "target_img: not an image that can be read",
        (MULTI, "2", 2): "no edited image of the turn before it",
        (MULTI, "3", 3): "no edited image of the turn before it",
    }
    for row in found.values():
        assert (row["l1"] is None) == (row["image"] is None and row["status"] == "failed") == (row["status"] != "ok")


def test_a_turn_begins_with_its_source_or_with_what_was_made_of_the_turn_before(recipe, magicbrush, found, tmp_path):
    editor = Editor(load_editor(recipe, Workspace(tmp_path), SHIPPED), max_side=64)
    turns = magicbrush.to_pylist()[0]["turns"]
    assert [turn["turn"] for turn in turns] == [1, 2, 3]

    def edited(image: bytes, turn: dict) -> np.ndarray:
        seed = found[SHIPPED, SINGLE, "1", turn["turn"]]["seed"]
        request = EditRequest(decode(image), turn["instruction"], 3, 1.5, steps=2, seed=seed)
        return editor.edit([request])[0].astype(int)

    for turn in turns:
        single, multi = (found[SHIPPED, mode, "1", turn["turn"]] for mode in (SINGLE, MULTI))
        before = found.get((SHIPPED, MULTI, "1", turn["turn"] - 1), {"image": turn["source_img"]})["image"]
        assert np.abs(edited(turn["source_img"], turn) - decode(single["image"])).max() <= 1
        assert np.abs(edited(before, turn) - decode(multi["image"])).max() <= 1
        assert multi["seed"] == single["seed"]
        assert (multi["image"] == single["image"]) == (turn["turn"] == 1)
    assert len({found[SHIPPED, SINGLE, "1", turn]["seed"] for turn in (1, 2, 3)}) == 3


def test_rows_say_what_the_images_show(recipe, magicbrush, found):
    clip, dino = ClipSimilarity(load_clip(recipe.models.clip, "cpu")), load_dino(recipe.models.dino, "cpu")
    turn, row = magicbrush.to_pylist()[0]["turns"][1], found[SHIPPED, MULTI, "1", 2]
    source = decode(found[SHIPPED, MULTI, "1", 1]["image"])
    edited, target = decode(row["image"]), decode(turn["target_img"])
    by_clip = clip.embed_images(np.stack([source, edited, target]))
    by_dino = embed_by_dino(dino, [source, edited, target])
    assert {name: row[name] for name in ("l1", "l2", "clip_i", "dino", "input_l1", "input_clip_i", "input_dino")} == (
        pytest.approx(
            {
                "l1": l1(edited, target),
                "l2": l2(edited, target),
                "clip_i": (by_clip[1] @ by_clip[2]).item(),
                "dino": (by_dino[1] @ by_dino[2]).item(),
                "input_l1": l1(edited, source),
                "input_clip_i": (by_clip[1] @ by_clip[0]).item(),
                "input_dino": (by_dino[1] @ by_dino[0]).item(),
            },
            abs=1e-5,
        )
    )
    assert row["clip_t"] is row["clip_dir"] is None, "MagicBrush has no captions"


def test_the_unchanged_input_stays_the_first_image(magicbrush, found):
    turns = magicbrush.to_pylist()[0]["turns"]
    for turn in turns:
        single, multi = (found[UNCHANGED, mode, "1", turn["turn"]] for mode in (SINGLE, MULTI))
        assert single["l1"] == pytest.approx(l1(decode(turn["source_img"]), decode(turn["target_img"])))
        assert multi["l1"] == pytest.approx(l1(decode(turns[0]["source_img"]), decode(turn["target_img"])))
        for row in (single, multi):
            assert (row["input_l1"], row["input_clip_i"], row["input_dino"]) == pytest.approx((0, 1, 1), abs=1e-5)
            assert row["image"] is None


def test_a_session_does_not_depend_on_its_batch(scorer, magicbrush, found):
    alone = by_key(scorer(magicbrush.slice(0, 1)))
    assert len(alone) == 12
    for key, row in alone.items():
        assert row["l1"] == pytest.approx(found[key]["l1"], abs=1e-2)
        assert row["seed"] == found[key]["seed"]


def test_emu_edit_is_measured_by_captions_and_against_the_input(recipe, tmp_path):
    rows = [
        synthetic.emu_edit_row(1),
        synthetic.emu_edit_row(2, image=BROKEN),
        synthetic.emu_edit_row(3, input_caption=None),
    ]
    table = sessions(synthetic.write(tmp_path / "emu", rows, schema=synthetic.EMU_EDIT), EMU_EDIT)
    models = recipe.models.model_copy(update={"dino": None})
    plain = recipe.model_copy(update={"models": models})
    found = by_key(BenchmarkScorer(plain, Workspace(tmp_path), [SHIPPED], (SINGLE,))(table))
    assert len(found) == 6
    row = found[SHIPPED, SINGLE, "1-color-h1", 1]
    assert all(row[name] is None for name in ("l1", "l2", "clip_i", "dino", "input_dino"))
    clip = ClipSimilarity(load_clip(recipe.models.clip, "cpu"))
    pictures = [decode(table.to_pylist()[0]["turns"][0]["source_img"]), decode(row["image"])]
    expected = similarities(
        *(clip.embed_images(picture[None]) for picture in pictures),
        *(clip.embed_texts([text]) for text in ("a red square", "1 blue squares")),
    )
    for name, same in (("clip_t", "clip_sim_1"), ("clip_dir", "clip_sim_dir"), ("input_clip_i", "clip_sim_image")):
        assert row[name] == pytest.approx(expected[same].item(), abs=1e-5)
    assert found[SHIPPED, SINGLE, "2-color-h2", 1]["reason"].startswith("source_img: not an image")
    half = found[SHIPPED, SINGLE, "3-color-h3", 1]
    assert half["clip_t"] is not None and half["clip_dir"] is None
