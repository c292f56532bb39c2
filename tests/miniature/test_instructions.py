import random

import pytest

from ip2p.miniature.edits import EDIT_KINDS, apply_edit, draw_edit, draw_scene_for
from ip2p.miniature.instructions import parse_instruction, phrase, read_slots
from ip2p.miniature.language import INSTRUCTIONS, split_words, template_words, vocabulary
from ip2p.miniature.scene import Scene, Thing
from ip2p.miniature.triplets import draw_triplet

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
