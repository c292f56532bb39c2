"""Answers read and checked with the miniature's tokenizer, CLIP and grammar."""

from pathlib import Path

import pytest

from ip2p.captions.answers import AnswerReader, reject_over_quota
from ip2p.captions.prompt import answer
from ip2p.captions.safety import unsafe
from ip2p.captions.triplets import TRIPLETS
from ip2p.miniature import scene
from ip2p.miniature.triplets import edit_kind
from ip2p.recipe import ClipRef, GrammarCaptions, Instructions, ModelRef, Models, Recipe, Unsafe
from ip2p.records import INSTRUCTIONS, Answer

WEIGHTS = Path(scene.__file__).parent / "weights"
CAPTION = "a large red star on a white background"


def make_recipe(truth="oracle", **instructions) -> Recipe:
    ref = ModelRef(path=str(WEIGHTS / "text_to_image"))
    return Recipe(
        name="smallest",
        device="cpu",
        truth=truth,
        models=Models(text_to_image=ref, clip=ClipRef(name=f"local-dir:{WEIGHTS / 'clip'}"), llm=ref, editor=ref),
        captions=GrammarCaptions(),
        instructions=Instructions(**({"unsafe": None} | instructions)),
    )


def answered(text: str, caption: str = CAPTION, refusal: str = "", **answer) -> tuple[dict, Answer]:
    """Return a row of CAPTIONS and the answer to it."""
    return {"caption_id": "1", "caption": caption, "refusal": refusal}, Answer(text, **answer)


def read(recipe: Recipe, *answers: tuple[dict, Answer], attempt=1, settled=(), edit_type=None) -> list[dict]:
    asked, texts = zip(*answers, strict=True)
    rows = AnswerReader(recipe, edit_type).read(list(asked), list(texts), attempt, list(settled))
    assert all(list(row) == INSTRUCTIONS.names for row in rows)
    return rows


@pytest.mark.parametrize(
    ("answered_as", "status", "reason", "attempts"),
    [
        (answered(answer("make it blue", "a large blue star on a white background")), "ok", "", 1),
        (answered(answer("make it blue", CAPTION)), "rejected", "caption unchanged", 1),
        (answered('{"instruction": "ma', cut=True), "rejected", "answer cut at max_tokens", 1),
        (answered('{"instruction": "ma'), "rejected", "not json", 1),
        (answered("", error="ValueError: no"), "failed", "ValueError: no", 1),
        (answered("", caption="", refusal="empty caption"), "rejected", "empty caption", 0),
    ],
)
def test_every_answer_becomes_a_row(answered_as, status, reason, attempts):
    (row,) = read(make_recipe(), answered_as)
    assert (row["status"], row["reason"], row["attempts"]) == (status, reason, attempts)
    assert all(value is not None for value in row.values())


def test_only_other_words_for_the_same_are_no_edit():
    plum = "a large purple star on a white background"
    same = answered(answer("paint the star plum", plum.replace("purple", "plum")), plum)
    different = answered(answer("paint the star red", plum.replace("purple", "red")), plum)
    assert [row["reason"] for row in read(make_recipe(same_meaning=0.98), same, different)] == ["same meaning", ""]
    assert [row["reason"] for row in read(make_recipe(), same, different)] == ["", ""]


def test_what_the_text_encoder_would_cut_is_rejected():
    words = " ".join(["red"] * 46)  # and two tokens around them
    fits, long = (
        answered(answer("make it redder", f"a {words[4:]}{more}"), f"a {words[4:]}s") for more in ("", " red")
    )
    found = read(make_recipe(max_caption_words=60), fits, long)
    assert [row["reason"] for row in found] == ["", "longer than 48 tokens"]


def test_unsafe_texts_are_rejected_wherever_they_stand():
    good = answered(answer("make it blue", "a large blue star on a white background"))
    bad = [
        answered(answer("make it blue", "a large blue star on a nude background")),
        answered(answer("paint some porn on it", "a large blue star on a white background")),
        answered(answer("make it blue", "a large blue star on a fucking white background")),
    ]
    found = read(make_recipe(unsafe=Unsafe()), good, *bad)
    assert [row["reason"] for row in found] == ["", *["unsafe text"] * 3]
    assert {row["reason"] for row in read(make_recipe(), good, *bad)} == {""}


def test_the_words_and_the_score_can_be_replaced():
    assert unsafe(["a nude", "nudes", "a tower", "denuded hills"], Unsafe()) == [True, True, False, False]
    assert unsafe(["a nude", "a tower"], Unsafe(words=["tower"])) == [False, True]
    rude = "you fucking bitch"
    assert unsafe([rude], Unsafe(words=[])) == [True]
    assert unsafe(["a tower"], Unsafe(words=[], score=0.0001)) == [True]


def test_none_of_our_triplets_is_unsafe():
    texts = [text for triplet in TRIPLETS for text in triplet[:3]]
    assert not any(unsafe(texts, Unsafe()))


def test_the_grammar_or_the_answer_tells_the_type():
    blue = ("paint the star blue", "a large blue star on a white background")
    (row,) = read(make_recipe(), answered(answer(*blue)), edit_type=edit_kind)
    assert row["edit_type"] == "recolour"
    named = make_recipe(truth="none")
    rows = read(named, answered(answer(*blue, "colour")), answered(answer(*blue)), answered(answer(*blue, "hue")))
    assert [(row["edit_type"], row["reason"]) for row in rows] == [
        ("colour", ""),
        ("", "missing edit_type"),
        ("", "unknown edit_type"),
    ]


def test_good_answers_and_refused_captions_are_settled():
    good = answered(answer("make it blue", "a large blue star on a white background"))
    others = answered("not json"), answered("", error="ValueError: no")
    refused = answered("", caption="", refusal="empty caption")
    reader = AnswerReader(make_recipe())
    rows = read(make_recipe(), good, *others, refused, attempt=2)
    assert [(row["status"], row["attempts"]) for row in rows] == [
        ("ok", 2),
        ("rejected", 2),
        ("failed", 2),
        ("rejected", 0),
    ]
    assert [reader.settled(row) for row in rows] == [True, False, False, True]


def test_quota_holds_for_a_batch_over_all_attempts():
    blue = answered(answer("paint the star blue", "a large blue star on a white background"))
    recipe = make_recipe(quotas={"recolour": 0.5})
    first = read(recipe, *[blue] * 3, answered("not json"), edit_type=edit_kind)
    assert [row["reason"] for row in first] == ["", "", "enough of recolour", "not json"]
    second = read(recipe, blue, blue, attempt=2, settled=first[:2], edit_type=edit_kind)
    assert [row["reason"] for row in second] == ["enough of recolour"] * 2


def test_of_each_type_a_batch_lets_its_share_through():
    def rows(*types: str) -> list[dict]:
        return [{"edit_type": edit_type, "status": "ok", "reason": ""} for edit_type in types]

    found = rows(*["time"] * 6, *["add"] * 4)
    found[0].update(status="rejected", reason="not json")
    reject_over_quota(found, {"time": 0.25})
    assert [row["reason"] for row in found] == ["not json", "", "", *["enough of time"] * 3, *[""] * 4]
    few = rows("time", "time")
    reject_over_quota(few, {"time": 0.01})
    assert [row["status"] for row in few] == ["ok", "rejected"], "one at least"
