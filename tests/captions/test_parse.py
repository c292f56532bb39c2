import json

import pytest

from ip2p.captions.parse import names_other_things, parse
from ip2p.captions.prompt import answer
from ip2p.captions.triplets import TRIPLETS

CAPTION = "a brown dog on a sofa"


def test_a_good_answer_is_read_back():
    edited = 'a brown "dog", asleep — on a sofa'
    assert parse(answer("make it sleep", edited), CAPTION) == ("make it sleep", edited, "", "")


def test_line_breaks_and_spaces_are_made_single_spaces():
    assert parse(answer(" make\nit  sleep ", "a dog\tasleep"), CAPTION)[:2] == ("make it sleep", "a dog asleep")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not json"),
        ('{"instruction": "make it sleep", "edited_cap', "not json"),
        ("make it sleep", "not json"),
        ('["make it sleep"]', "not an object"),
        ("null", "not an object"),
        (json.dumps({"edited_caption": "a dog"}), "missing instruction"),
        (json.dumps({"instruction": "make it sleep"}), "missing edited_caption"),
        (json.dumps({"instruction": 1, "edited_caption": "a dog"}), "instruction is not text"),
        (json.dumps({"instruction": "sleep", "edited_caption": None}), "edited_caption is not text"),
        (answer("", "a dog"), "empty instruction"),
        (answer("make it sleep", " \n"), "empty edited_caption"),
        (answer("please " * 31, "a dog"), "instruction too long"),
        (answer("make it sleep", "dog " * 61), "edited caption too long"),
        (answer("make it sleep", "A brown  dog on a Sofa"), "caption unchanged"),
        (answer("a brown dog asleep on a sofa", "a sleeping dog on a sofa"), "instruction describes"),
        (answer("The image shows a dog", "a dog"), "instruction describes"),
        (answer("dog, asleep", "Dog, asleep"), "instruction describes"),
        (answer("make it sleep", "two cats under the big table"), "another scene"),
        (answer("keep the sofa", "sofa and three chairs"), "another scene"),
        (answer("make the lighthouse striped", "a black dog on a sofa"), "instruction and caption disagree"),
        (answer("move the red car to the garage", "a brown dog under a sofa"), "instruction and caption disagree"),
    ],
)
def test_every_fault_has_its_own_reason(text, reason):
    assert parse(text, CAPTION).reason == reason


@pytest.mark.parametrize(
    ("instruction", "edited_caption"),
    [
        ("another dog, please", "a black dog on a sofa"),
        ("item by item, remove everything but the sofa", "a sofa"),
        ("there should be snow", "a brown dog on a sofa in the snow"),
        ("photograph it from above", "a brown dog on a sofa from above"),
        ("put it in a kennel", "a brown dog in a kennel"),
        ("remove the dogs", "a sofa"),
        ("let the sleeping dog wake up", "a brown dog awake on a sofa"),
        ("change the animal's colour", "a black dog on a sofa"),
        ("put the collar on it", "a brown dog with a collar on a sofa"),
    ],
)
def test_what_is_nearly_a_fault_is_none(instruction, edited_caption):
    assert parse(answer(instruction, edited_caption), CAPTION).reason == ""


def test_none_of_our_triplets_is_refused():
    found = [parse(answer(t.instruction, t.edited_caption), t.caption) for t in TRIPLETS]
    assert not [parsed for parsed in found if parsed.reason]


def test_only_readable_faults_keep_their_texts():
    assert parse(answer("make it sleep", CAPTION), CAPTION)[:2] == ("make it sleep", CAPTION)
    assert parse('{"instruction": "make it sl', CAPTION)[:2] == ("", "")


def test_most_instructions_to_other_captions_are_found():
    found = [
        names_other_things(other.instruction, triplet.caption, triplet.edited_caption)
        for triplet in TRIPLETS
        for other in TRIPLETS[::7]
        if other.caption != triplet.caption
    ]
    assert 0.55 < sum(found) / len(found) < 0.75
