import random
from collections import Counter
from dataclasses import replace

import pytest

from ip2p.miniature.scene import PLACES, Scene, Thing, alike, attributes, draw_scene, held_out

RED_STAR = Thing("star", "red", "large", "bottom right")
BLUE_BOX = Thing("square", "blue", "small", "top left")
SCENE = Scene((RED_STAR, BLUE_BOX), "pink", "night")


def test_things_are_kept_in_the_order_of_places():
    assert Scene((BLUE_BOX, RED_STAR), "pink", "night") == SCENE
    assert [thing.place for thing in SCENE.things] == ["top left", "bottom right"]


@pytest.mark.parametrize(
    ("field", "value"), [("shape", "cube"), ("colour", "mauve"), ("size", "medium"), ("place", "middle")]
)
def test_a_thing_refuses_unknown_words_by_name(field: str, value: str):
    with pytest.raises(ValueError, match=f"{field}.*{value}"):
        replace(RED_STAR, **{field: value})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"background": "black"}, "background.*black"),
        ({"look": "rain"}, "look.*rain"),
        ({"things": ()}, "1 to 3 things, got 0"),
        ({"things": tuple(replace(RED_STAR, place=place) for place in PLACES)}, "1 to 3 things, got 4"),
        ({"things": (RED_STAR, RED_STAR)}, "share a place"),
    ],
)
def test_a_scene_refuses_what_it_cannot_be(changes: dict, reason: str):
    with pytest.raises(ValueError, match=reason):
        replace(SCENE, **changes)


def test_dict_round_trip():
    assert Scene.from_dict(SCENE.to_dict()) == SCENE


def test_attributes_count_an_empty_cell_once():
    flat = attributes(SCENE)
    assert flat["top left.shape"] == "square"
    assert flat["look"] == "night"
    assert flat["top right.occupied"] is False
    assert len(flat) == 2 + 4 + 2 * 3


def test_draws_are_reproducible_and_spread_as_promised():
    scenes = [draw_scene(random.Random(seed)) for seed in range(4000)]
    assert scenes[7] == draw_scene(random.Random(7))
    counts = Counter(len(scene.things) for scene in scenes)
    assert [counts[n] / 4000 for n in (1, 2, 3)] == pytest.approx([0.35, 0.45, 0.2], abs=0.03)
    assert 0.08 < sum(map(held_out, scenes)) / 4000 < 0.13
    assert any(alike(scene) for scene in scenes if len(scene.things) == 3)
