import random
from collections import Counter
from dataclasses import replace

import pytest

from ip2p.miniature.edits import (
    EDIT_KINDS,
    Edit,
    apply_edit,
    consistent,
    draw_edit,
    draw_scene_for,
    draw_triplet,
    parse_instruction,
    phrase,
    possible_kinds,
    read_slots,
)
from ip2p.miniature.language import INSTRUCTIONS, read_caption, split_words, template_words, vocabulary
from ip2p.miniature.scene import Scene, Thing, draw_scene, held_out

RED_STAR = Thing("star", "red", "large", "top left")
BLUE_STAR = Thing("star", "blue", "small", "bottom right")
STARS = Scene((RED_STAR, BLUE_STAR), "gray", "fog")


@pytest.mark.parametrize("kind", EDIT_KINDS)
@pytest.mark.parametrize("unseen", [False, True])
def test_instructions_read_back_as_their_edits(kind: str, unseen: bool):
    rng, words = random.Random(0), set(vocabulary())
    for _ in range(100):
        scene = draw_scene_for(kind, rng)
        edit = draw_edit(scene, rng, kind)
        assert apply_edit(edit, scene) != scene
        instruction = phrase(edit, scene, rng, unseen)
        assert parse_instruction(instruction, scene) == edit
        assert set(split_words(instruction)) <= words
        assert instruction == instruction.lower()


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


@pytest.mark.parametrize(
    ("instruction", "reason"),
    [
        ("please do something", "no edit is said like this"),
        ("make the star green", "means 2 things"),
        ("remove the square", "means 0 things"),
        ("make the red star crimson", "changes nothing"),
        ("move the red star to the bottom right", "share a place"),
        ("turn on the light", "there is no night"),
        ("have two of them", "cannot be counted"),
        ("put a small red star in the top left", "share a place"),
    ],
)
def test_a_wrong_instruction_is_refused_with_the_reason(instruction: str, reason: str):
    with pytest.raises(ValueError, match=reason):
        parse_instruction(instruction, STARS)


def test_number_and_noun_agree():
    one = Scene((RED_STAR,), "gray", "fog")
    for instruction in ("make it three star", "make it two circles"):
        with pytest.raises(ValueError, match=r"disagree|no circles to count"):
            parse_instruction(instruction, one)


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


def test_triplets_are_consistent_balanced_and_keep_to_their_split():
    rng = random.Random(2)
    kinds, unsaid = Counter(), Counter()
    for index in range(1200):
        kept_out = index % 2 == 0
        drawn = draw_triplet(rng, unseen=index % 3 == 0, held_out=kept_out)
        assert consistent(drawn.caption, drawn.instruction, drawn.edited_caption) is None
        assert held_out(drawn.scene) == kept_out
        assert kept_out or not held_out(drawn.edited_scene)
        assert read_caption(drawn.caption).unsaid == drawn.unsaid
        assert read_caption(drawn.edited_caption).unsaid == drawn.unsaid - {drawn.edit.kind}
        kinds[drawn.edit.kind] += 1
        unsaid[drawn.unsaid] += 1
    assert min(kinds.values()) > 60
    assert len(unsaid) == 4
    assert min(unsaid.values()) > 50
    assert set(kinds) == set(EDIT_KINDS)


def test_inconsistency_names_the_part_that_is_wrong():
    caption = "a large red star in the top left on a gray background"
    edited = "a large blue star in the top left on a gray background"
    assert consistent(caption, "make the star blue", edited) is None
    assert "top left.colour should be green, is blue" in str(consistent(caption, "make the star green", edited))
    assert str(consistent("a mauve star", "make the star blue", edited)).startswith("caption: ")
    assert str(consistent(caption, "make the box blue", edited)).startswith("instruction: ")
    assert str(consistent(caption, "make the star blue", "a blue star")).startswith("edited caption: ")
    some = "a large red star in the top left on a gray background, at night"
    assert "look should be plain, is night" in str(
        consistent(caption, "make the star blue", some.replace("red", "blue"))
    )


@pytest.mark.parametrize(
    ("caption", "instruction", "edited", "wrong"),
    [
        ("a large red star", "make the star blue", "a large blue star", ""),
        ("a large red star", "make the background white", "a large red star on a white background", ""),
        ("a large red star", "make the background white", "a large red star", "background should be said"),
        (
            "a large red star",
            "make the star blue",
            "a large blue star on a white background",
            "background should be unsaid",
        ),
        ("a large red star", "make the star blue", "a large blue star in the top left", "places should be unsaid"),
        ("a large red star", "move the star to the top left", "a large red star in the top left", "is not known"),
        ("a large red star", "make the thing in the top left blue", "a large blue star", "is not known"),
        ("a large red star and a small red star", "delete the large star", "a small red star", ""),
        ("a large red star and a small red star", "delete the large star", "a large red star", "number of large red"),
    ],
)
def test_what_a_caption_leaves_unsaid_stays_so(caption: str, instruction: str, edited: str, wrong: str):
    found = consistent(caption, instruction, edited)
    assert (found is None) == (wrong == "")
    assert wrong in (found or "")


def test_a_thing_may_be_named_in_full():
    rng = random.Random(0)
    for _ in range(200):
        drawn = draw_triplet(rng, "recolour")
        said = phrase(drawn.edit, drawn.scene, rng, unsaid=drawn.unsaid, in_full=True)
        assert parse_instruction(said, drawn.scene, drawn.unsaid) == drawn.edit
        named = read_slots(said)["thing"]
        assert set(named) == {"size", "colour", "shape"} or set(named) == {"place"}, said


def test_slots_say_what_an_instruction_says_without_its_scene():
    assert read_slots("swap the tiny red star with the object in the upper left corner") == {
        "edit": {"wording": "swap"},
        "thing": {"size": "small", "colour": "red", "shape": "star"},
        "other": {"place": "top left"},
        "new": {},
    }
    assert read_slots("add a huge jade ball at the lower right")["new"] == {
        "size": "large",
        "colour": "green",
        "shape": "circle",
        "place": "bottom right",
    }
    assert read_slots("make it two stars")["new"] == {"count": "2"}
    with pytest.raises(ValueError, match="no edit is said like this: 'sing'"):
        read_slots("sing")


def test_unseen_instructions_use_words_of_the_seen_ones():
    seen = template_words([template for wording in INSTRUCTIONS.values() for template in wording.seen])
    unseen = [template for wording in INSTRUCTIONS.values() for template in wording.unseen]
    assert template_words(unseen) <= seen
    assert not set(unseen) & {template for wording in INSTRUCTIONS.values() for template in wording.seen}
