import io
import json
from collections import Counter

import pytest

from ip2p.captions.triplets import (
    EDIT_TYPES,
    EXEMPLARS,
    PATH,
    SPELLINGS,
    TRIPLETS,
    Triplet,
    duplicates,
    problems,
    read_triplets,
)

GOOD = Triplet("a brown dog on a sofa", "make it a cat", "a brown cat on a sofa", "replace")


def line(**changes) -> str:
    """One line of our JSONL: GOOD with `changes`; a key that is changed to `...` is left out."""
    values = GOOD._asdict() | changes
    return json.dumps({key: value for key, value in values.items() if value is not ...}) + "\n"


@pytest.mark.parametrize("triplet", TRIPLETS, ids=lambda triplet: triplet.caption[:40])
def test_what_we_ship_passes_the_checker(triplet):
    assert problems(triplet) == []
    assert triplet.edit_type in EDIT_TYPES
    assert 3 <= len(triplet.caption.split()) <= 30
    assert len(triplet.instruction.split()) <= 15, "short"


def test_what_we_ship_is_many_of_every_type_and_nothing_twice():
    assert len(TRIPLETS) >= 150
    counts = Counter(triplet.edit_type for triplet in TRIPLETS)
    assert set(counts) == set(EDIT_TYPES)
    assert min(counts.values()) >= 8, counts
    assert duplicates(TRIPLETS) == []
    assert len({triplet.caption.casefold() for triplet in TRIPLETS}) == len(TRIPLETS)


def test_what_we_ship_keeps_to_our_columns():
    for text in PATH.read_text(encoding="utf-8").splitlines():
        assert list(json.loads(text)) == [*SPELLINGS, "edit_type"]


def test_the_exemplars_are_shipped_triplets_of_many_types():
    assert set(EXEMPLARS) <= set(TRIPLETS)
    assert len(EXEMPLARS) == 12
    assert len({triplet.edit_type for triplet in EXEMPLARS}) >= 11


@pytest.mark.parametrize(
    "keys",
    [
        ("caption", "instruction", "edited_caption"),
        ("input", "edit", "output"),
        ("caption", "edit", "output"),
    ],
)
def test_both_spellings_load_and_the_type_is_optional(keys, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({**dict(zip(keys, GOOD)), "url": "https://example.org"}) + "\n\n" + line())
    assert read_triplets(path) == read_triplets(str(path)) == [GOOD._replace(edit_type=None), GOOD]


def test_open_files_load_too():
    assert read_triplets(io.StringIO(line())) == read_triplets(io.BytesIO(line().encode())) == [GOOD]


def test_texts_become_one_line_and_keep_their_letters():
    text = json.dumps({**GOOD._asdict(), "caption": " café\n  – night\t"}, ensure_ascii=False)
    assert read_triplets(io.BytesIO(text.encode()))[0].caption == "café – night"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("a dog\n", "not JSON"),
        ("[1]\n", r"\[1\] is not an object"),
        (line(caption=...), "caption is missing; give one of caption, input"),
        (line(instruction=...), "instruction is missing; give one of instruction, edit"),
        (line(edited_caption=...), "edited_caption is missing; give one of edited_caption, output"),
        (line(input="a dog"), "caption and input say the same"),
        (line(caption=..., input=7), "input is 7"),
        (line(edited_caption=None), "edited_caption is None"),
        (line(edit_type=["add"]), r"edit_type is \['add'\]"),
    ],
)
def test_a_bad_line_is_refused_by_file_line_and_key(bad, message, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(line() + "\n" + bad + line())
    with pytest.raises(ValueError, match=f"prompts.jsonl:3: {message}"):
        read_triplets(path)


def test_a_line_that_is_not_utf8_is_refused_by_file_and_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(line().encode() + '{"caption": "café"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"prompts.jsonl:2: not JSON"):
        read_triplets(path)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"instruction": " "}, ["instruction is empty"]),
        ({"caption": ""}, ["caption is empty"]),
        ({"edited_caption": ""}, ["edited_caption is empty"]),
        ({"edited_caption": "A brown  dog on a Sofa"}, ["edited_caption is the caption unchanged"]),
        ({"instruction": "very " * 31}, ["instruction has 31 words; say it in 30"]),
        (
            {"edited_caption": "A castle above the clouds"},
            ["edited_caption shares 1 of 5 words with the caption; keep the rest"],
        ),
        ({"edit_type": "recolor"}, [f"edit_type is 'recolor'; choose one of {', '.join(EDIT_TYPES)}"]),
        (
            {"instruction": "", "edit_type": ""},
            ["instruction is empty", f"edit_type is ''; choose one of {', '.join(EDIT_TYPES)}"],
        ),
    ],
)
def test_the_checker_finds_each_problem(changes, found):
    assert problems(GOOD._replace(**changes)) == found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"edit_type": None},
        {"instruction": "very " * 30},
        {"edited_caption": "dog, white background"},  # a third of its words is the caption's
        {"edited_caption": "a brown sofa on a dog"},  # the same words in another order
    ],
)
def test_the_nearest_that_is_fine(changes):
    assert problems(GOOD._replace(**changes)) == []


def test_duplicates_are_of_caption_and_instruction():
    again = GOOD._replace(caption="A  brown dog on a sofa", edited_caption="a cat")
    other = GOOD._replace(instruction="make it asleep")
    assert duplicates([GOOD, other, again]) == [again]
