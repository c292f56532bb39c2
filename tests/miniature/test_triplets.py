import random
from collections import Counter

import pytest

from ip2p.miniature.edits import EDIT_KINDS
from ip2p.miniature.language import read_caption
from ip2p.miniature.scene import held_out
from ip2p.miniature.triplets import consistent, draw_triplet


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
