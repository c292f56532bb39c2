import random
from dataclasses import replace

import numpy as np
import pytest

from ip2p.miniature.edits import EDIT_KINDS, Edit, apply_edit, draw_edit, draw_scene_for
from ip2p.miniature.instructions import parse_instruction, phrase
from ip2p.miniature.oracle import Judgement, attribute_accuracy, judge_edit, judge_images, read_scenes
from ip2p.miniature.render import render, render_batch
from ip2p.miniature.scene import Scene, Thing, draw_scene

SCENE = Scene((Thing("star", "red", "large", "top left"), Thing("circle", "blue", "small", "top right")), "gray", "fog")


def _draw(count: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [draw_scene(rng) for _ in range(count)]


@pytest.mark.parametrize("noise", [0, 10])
def test_renders_are_read_exactly(noise: int):
    scenes = _draw(2000)
    images = render_batch(scenes).astype(float) + np.random.default_rng(0).normal(0, noise, (2000, 32, 32, 3))
    readings = read_scenes(np.clip(np.round(images), 0, 255).astype(np.uint8))
    assert [reading.scene for reading in readings] == scenes
    assert all(reading.valid and reading.residual < (0.05 if noise else 0.003) for reading in readings)


def test_what_is_no_scene_is_not_valid():
    noise = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    assert not any(reading.valid for reading in read_scenes(noise))
    empty = np.broadcast_to(render(SCENE)[-1, -1], (1, 32, 32, 3))
    (reading,) = read_scenes(empty)
    assert reading.scene is None
    assert not reading.valid
    assert reading.residual < 0.003
    quarter = render(replace(SCENE, things=(SCENE.things[0],)))[:16, :16]
    (reading,) = read_scenes(np.tile(quarter, (2, 2, 1))[None])
    assert reading.scene is None
    assert not reading.valid
    assert read_scenes(np.zeros((0, 32, 32, 3), np.uint8)) == []


@pytest.mark.parametrize(
    "images", [np.zeros((1, 64, 64, 3), np.uint8), np.zeros((32, 32, 3), np.uint8), np.zeros((1, 32, 32, 3))]
)
def test_other_sizes_and_types_are_refused(images: np.ndarray):
    with pytest.raises(ValueError, match=r"uint8 \(B, 32, 32, 3\)"):
        read_scenes(images)


def _draw_edits(count: int) -> list[tuple[Scene, Edit, str]]:
    rng, cases = random.Random(3), []
    for index in range(count):
        scene = draw_scene_for(EDIT_KINDS[index % len(EDIT_KINDS)], rng)
        edit = draw_edit(scene, rng, EDIT_KINDS[index % len(EDIT_KINDS)])
        cases.append((scene, edit, phrase(edit, scene, rng)))
    return cases


def judged(sources: np.ndarray, instructions: list[str], results: np.ndarray) -> list[Judgement]:
    judgements = judge_images(sources, instructions, results)
    assert not [reason for reason in judgements if isinstance(reason, str)]
    return [judgement for judgement in judgements if isinstance(judgement, Judgement)]


def test_perfect_edits_succeed_and_others_fail():
    cases = _draw_edits(300)
    sources = render_batch([scene for scene, _, _ in cases])
    results = render_batch([apply_edit(edit, scene) for scene, edit, _ in cases])
    instructions = [instruction for _, _, instruction in cases]
    assert all(judgement.success for judgement in judged(sources, instructions, results))
    unedited = judged(sources, instructions, sources)
    assert not any(judgement.carried_out for judgement in unedited)
    assert all(judgement.preserved and judgement.preserved_fraction == 1 for judgement in unedited)
    rng = random.Random(4)
    for scene, edit, _ in cases:
        other = apply_edit(draw_edit(scene, rng), scene)
        if other != apply_edit(edit, scene):
            (reading,) = read_scenes(render(other)[None])
            assert not judge_edit(scene, edit, reading).success


def test_side_effects_are_seen():
    edit = parse_instruction("make the star green", SCENE)
    edited = apply_edit(edit, SCENE)
    added = replace(edited, things=(*edited.things, Thing("cross", "red", "small", "bottom left")))
    for wrong, fraction in ((replace(edited, background="pink"), 10 / 11), (added, 10 / 11)):
        judgement = judge_edit(SCENE, edit, read_scenes(render(wrong)[None])[0])
        assert judgement.carried_out
        assert not judgement.preserved
        assert judgement.valid
        assert not judgement.success
        assert judgement.preserved_fraction == pytest.approx(fraction)


def test_what_cannot_be_judged_has_a_reason_and_spoils_nothing():
    sources = np.stack([render(SCENE), render(SCENE), np.zeros((32, 32, 3), np.uint8)])
    edited = render(apply_edit(parse_instruction("make the star green", SCENE), SCENE))
    instructions = ["make the star green", "make the square green", "make the star green"]
    right, nothing_meant, no_scene = judge_images(sources, instructions, np.stack([edited] * 3))
    assert isinstance(right, Judgement)
    assert right.success
    assert nothing_meant == f"'the square' means 0 things in {SCENE}"
    assert str(no_scene).startswith("the source image is no scene (residual ")


def test_attribute_accuracy_counts_each_attribute():
    scenes = _draw(200)
    assert set(attribute_accuracy(scenes, render_batch(scenes)).values()) == {1.0}
    wrong = replace(SCENE, things=(replace(SCENE.things[0], colour="green"), SCENE.things[1]))
    accuracy = attribute_accuracy([SCENE], render_batch([wrong]))
    assert accuracy["colour"] == 0.5
    assert accuracy["shape"] == accuracy["place"] == 1
    assert accuracy["exact"] == 0
    assert accuracy["attributes"] == pytest.approx(11 / 12)
    missing = attribute_accuracy([SCENE], render_batch([replace(SCENE, things=(SCENE.things[0],))]))
    assert missing["place"] == 0.75
    assert missing["shape"] == 0.5
    with pytest.raises(ValueError, match="1 scenes and 2 images"):
        attribute_accuracy([SCENE], render_batch([SCENE, SCENE]))


def test_what_is_kept_of_each_attribute():
    night = parse_instruction("make it night", SCENE)

    def kept(result: Scene) -> dict:
        return dict(judge_edit(SCENE, night, read_scenes(render(result)[None])[0]).kept)

    star, circle = SCENE.things
    everything = dict.fromkeys(("shape", "colour", "size", "place", "background"), True) | {"look": None}
    assert kept(replace(SCENE, look="night")) == everything, "the edit leaves no look alone"
    green = (replace(star, colour="green"), circle)
    assert kept(replace(SCENE, look="night", things=green)) == everything | {"colour": False}
    lost = kept(replace(SCENE, look="night", things=(star,)))
    assert [name for name, same in lost.items() if same is False] == ["shape", "colour", "size", "place"]
