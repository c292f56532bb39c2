import random
from collections import Counter
from dataclasses import replace

import pytest

from ip2p.miniature import language
from ip2p.miniature.language import describe, draw_unsaid, parse_caption, read_caption, split_words, vocabulary
from ip2p.miniature.scene import PLACES, Scene, Thing, draw_scene

SCENE = Scene(
    (Thing("square", "green", "large", "bottom right"), Thing("star", "yellow", "small", "top left")), "pink", "night"
)


@pytest.mark.parametrize("unseen", [False, True])
def test_captions_read_back_as_their_scenes_in_known_words(unseen: bool):
    rng, words = random.Random(0), set(vocabulary())
    for _ in range(2000):
        scene, style = draw_scene(rng), rng.getrandbits(32)
        caption = describe(scene, style, unseen)
        assert parse_caption(caption) == scene
        assert len(caption.replace(",", " ,").split()) <= 44
        assert set(split_words(caption)) <= words
        assert caption == caption.lower()


def test_a_person_may_say_it_in_another_order():
    caption = (
        "At night a large green square in the bottom right and, upper left, a tiny gold star on a rose background."
    )
    assert parse_caption(caption) == SCENE
    assert parse_caption("two small red circles, one top left and one bottom right, on white").things == (
        Thing("circle", "red", "small", "top left"),
        Thing("circle", "red", "small", "bottom right"),
    )


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("a large mauve square in the top left on a pink background", "unknown word 'mauve'"),
        ("a large square in the top left on a pink background", "lacks colour"),
        ("a large red square on a pink background", "no places in caption"),
        ("a large red square", "no background and no places"),
        ("a large red square in the top left and a small blue star on pink", "lacks a place"),
        ("a large small red square in the top left on a pink background", "two values of size"),
        ("a large red square in the top left", "no background"),
        ("a large red square in the left on a pink background", "not preceded by top or bottom"),
        ("a large red square in the top on a pink background", "lacks a place"),
        ("three large red squares, one top left and one top right, on a pink background", "lacks a place"),
        ("two large red square, one top left and one top right, on a pink background", "number and noun disagree"),
        ("a large red star top left and a small blue star top left on white", "share a place"),
        ("on a pink background", "1 to 3 things, got 0"),
    ],
)
def test_a_wrong_caption_is_refused_with_the_reason(caption: str, reason: str):
    with pytest.raises(ValueError, match=reason):
        parse_caption(caption)


@pytest.mark.parametrize("unseen", [False, True])
def test_what_is_unsaid_is_read_back_as_unsaid(unseen: bool):
    rng = random.Random(1)
    for _ in range(1000):
        scene, style, unsaid = draw_scene(rng), rng.getrandbits(32), draw_unsaid(rng)
        described = read_caption(describe(scene, style, unseen, unsaid))
        assert described.unsaid == unsaid
        assert described.scene.look == scene.look
        looks = [Counter(replace(thing, place="top left") for thing in of.things) for of in (described.scene, scene)]
        assert looks[0] == looks[1]
        if "places" not in unsaid:
            assert described.scene.things == scene.things
        if "background" not in unsaid:
            assert described.scene.background == scene.background


def test_an_edit_changes_only_the_words_it_touches():
    recoloured = replace(SCENE, things=(SCENE.things[0], replace(SCENE.things[1], colour="blue")))
    for style in range(200):
        before, after = describe(SCENE, style).split(), describe(recoloured, style).split()
        assert len(before) == len(after)
        differing = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
        assert [new for _, new in differing if new not in ("a", "an")] == [
            new for _, new in differing if new in language.COLOUR_WORDS["blue"]
        ]
        assert len(differing) in (1, 2)


def test_a_thing_keeps_its_words_when_it_moves():
    moved = replace(SCENE, things=(SCENE.things[0], replace(SCENE.things[1], place="top right")))
    for style in range(50):
        gone = Counter(split_words(describe(SCENE, style))) - Counter(split_words(describe(moved, style)))
        assert set(gone) <= {"top", "upper", "bottom", "lower", "left", "right", "in", "at", "the", "corner"}


def test_wording_is_varied_and_things_alike_may_be_counted():
    assert len({describe(SCENE, style) for style in range(300)}) > 290
    stars = Scene(tuple(Thing("star", "red", "small", place) for place in PLACES[:3]), "teal", "plain")
    captions = [describe(stars, style) for style in range(100)]
    assert 20 < sum("three" in caption for caption in captions) < 80
    assert any(not set(split_words(caption)) & set(language.LOOK_WORDS["plain"]) for caption in captions)


def test_a_word_means_one_thing():
    tables = [language.COLOUR_WORDS, language.SHAPE_WORDS, language.SIZE_WORDS, language.BACKGROUND_WORDS]
    tables += [language.LOOK_WORDS, language.ROW_WORDS, language.COLUMN_WORDS]
    words = [word for table in tables for synonyms in table.values() for word in synonyms]
    assert len(words) == len(set(words))
    assert not language.FILLERS & set(language.MEANINGS)


def test_unseen_wordings_are_new_sentences_of_known_words():
    rng = random.Random(0)
    scenes = [draw_scene(rng) for _ in range(3000)]
    seen = {word for style, scene in enumerate(scenes) for word in split_words(describe(scene, style))}
    unseen = {word for style, scene in enumerate(scenes) for word in split_words(describe(scene, style, unseen=True))}
    assert unseen <= seen
    captions = {describe(scene, style) for scene in scenes[:100] for style in range(20)}
    assert not captions & {describe(scene, style, unseen=True) for scene in scenes[:100] for style in range(20)}
