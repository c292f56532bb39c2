"""Captions that the grammar draws."""

import pytest

from ip2p.miniature.captions import grammar_captions
from ip2p.miniature.edits import EDIT_KINDS, possible_kinds
from ip2p.miniature.language import read_caption
from ip2p.miniature.scene import held_out
from ip2p.recipe import GrammarCaptions


def grammar(count: int, seed: int = 0) -> list[str]:
    return list(grammar_captions(GrammarCaptions(count=count), seed))


def test_grammar_captions_differ_and_allow_every_kind_of_edit_equally():
    captions = grammar(240)
    assert len(set(captions)) == 240
    assert captions == grammar(240), "the same seed gives the same captions"
    assert not set(captions) & set(grammar(240, seed=1))
    for k, described in enumerate(read_caption(caption) for caption in captions):
        assert EDIT_KINDS[k % 12] in possible_kinds(described.scene, described.unsaid)
        assert described.unsaid or not held_out(described.scene)


def test_only_the_kinds_that_are_asked_for():
    captions = grammar_captions(GrammarCaptions(count=20, kinds=["count"]), 0)
    for described in map(read_caption, captions):
        assert "count" in possible_kinds(described.scene, described.unsaid)


def test_places_may_stay_unsaid():
    unplaced = GrammarCaptions(count=30, kinds=["recolour", "look"], say_places=False)
    for described in map(read_caption, grammar_captions(unplaced, 0)):
        assert "places" in described.unsaid
    with pytest.raises(ValueError, match=r"captions.say_places: false, but add, move, swap, count of captions.kinds"):
        list(grammar_captions(GrammarCaptions(say_places=False), 0))
