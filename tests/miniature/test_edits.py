import random
from dataclasses import replace

import pytest

from ip2p.miniature.edits import EDIT_KINDS, Edit, apply_edit, draw_edit, possible_kinds
from ip2p.miniature.instructions import parse_instruction
from ip2p.miniature.scene import Scene, Thing, draw_scene

RED_STAR = Thing("star", "red", "large", "top left")
BLUE_STAR = Thing("star", "blue", "small", "bottom right")
STARS = Scene((RED_STAR, BLUE_STAR), "gray", "fog")


@pytest.mark.parametrize(
    ("instruction", "things"),
    [
        ("make the blue star green", (RED_STAR, replace(BLUE_STAR, colour="green"))),
        ("turn the small star into a box", (RED_STAR, replace(BLUE_STAR, shape="square"))),
        ("shrink the large star", (replace(RED_STAR, size="small"), BLUE_STAR)),
        (
            "turn the object in the top left into a yellow box",
            (replace(RED_STAR, shape="square", colour="yellow"), BLUE_STAR),
        ),
        ("add a tiny red ball at the upper right", (RED_STAR, Thing("circle", "red", "small", "top right"), BLUE_STAR)),
        ("remove the tiny star", (RED_STAR,)),
        ("keep only the tiny star", (BLUE_STAR,)),
        ("move the red star to the lower left corner", (replace(RED_STAR, place="bottom left"), BLUE_STAR)),
        (
            "swap the red star and the blue star",
            (replace(BLUE_STAR, place="top left"), replace(RED_STAR, place="bottom right")),
        ),
    ],
)
def test_what_edits_of_things_do(instruction: str, things: tuple[Thing, ...]):
    assert apply_edit(parse_instruction(instruction, STARS), STARS) == replace(STARS, things=things)


def test_what_edits_of_the_setting_do():
    assert apply_edit(parse_instruction("clear the fog", STARS), STARS) == replace(STARS, look="plain")
    edit = parse_instruction("Change the background to ivory.", STARS)
    assert apply_edit(edit, STARS) == replace(STARS, background="white")


def test_counting_fills_the_first_free_places_and_takes_the_last_things():
    one = Scene((Thing("star", "red", "small", "top right"),), "gray", "fog")
    three = apply_edit(parse_instruction("make it three stars", one), one)
    assert [thing.place for thing in three.things] == ["top left", "top right", "bottom left"]
    assert [thing.place for thing in apply_edit(Edit("count", count=1), three).things] == ["top left"]


def test_an_edit_has_the_fields_of_its_kind():
    with pytest.raises(ValueError, match="recolour takes place, colour, got place, shape"):
        Edit("recolour", "top left", shape="star")
    with pytest.raises(ValueError, match=r"kind must be one of.*'paint'"):
        Edit("paint")
    with pytest.raises(ValueError, match="two different places"):
        Edit("swap", "top left", to="top left")


def test_possible_kinds_are_those_that_can_be_drawn():
    rng = random.Random(1)
    for _ in range(100):
        scene = draw_scene(rng)
        for kind in EDIT_KINDS:
            if kind in possible_kinds(scene):
                assert draw_edit(scene, rng, kind).kind == kind
            else:
                with pytest.raises(ValueError, match="impossible"):
                    draw_edit(scene, rng, kind)
