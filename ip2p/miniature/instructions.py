"""Edits said as instructions, and instructions read back.

An instruction refers to a thing by what distinguishes it in its scene ("the red star", "the object in the top left"),
so reading one back needs the scene.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from ip2p.miniature import language
from ip2p.miniature.edits import EDIT_KINDS, PLACED_KINDS, Edit, apply_edit, the_thing_at
from ip2p.miniature.language import ALL_SAID, INSTRUCTIONS, plural
from ip2p.miniature.scene import BACKGROUNDS, Scene, Thing

# Slots of instructions that are one word of a table: slot -> value -> synonyms.
_WORD_SLOTS: dict[str, Mapping[str, tuple[str, ...]]] = {
    "colour": language.COLOUR_WORDS,
    "shape": language.SHAPE_WORDS,
    "size": language.SIZE_WORDS,
    "background": language.BACKGROUND_WORDS,
    "comparative": language.COMPARATIVE_WORDS,
    "resizing": language.RESIZING_WORDS,
}
_SIZE_SLOTS = ("comparative", "resizing")
_WORD_VALUES = {
    slot: {word: value for value, words in table.items() for word in words} for slot, table in _WORD_SLOTS.items()
}
_NUMBERS = {word: number for number, words in language.COUNT_WORDS.items() for word in words}


def _templates(edit: Edit, scene: Scene, unseen: bool) -> tuple[str, ...]:
    if edit.kind != "look":
        return INSTRUCTIONS[edit.kind].options(unseen)
    clearing = INSTRUCTIONS[f"clear.{scene.look}"].options(unseen) if edit.look == "plain" else ()
    return INSTRUCTIONS[f"look.{edit.look}"].options(unseen) + clearing


def _matches(scene: Scene, features: Mapping[str, str]) -> list[Thing]:
    return [thing for thing in scene.things if all(getattr(thing, name) == value for name, value in features.items())]


_REFERENCES = (("shape",), ("colour", "shape"), ("size", "shape"), ("size", "colour", "shape"), ("colour",), ("place",))


_IN_FULL = ("size", "colour", "shape")


def _refer(scene: Scene, place: str, rng: random.Random, unsaid: frozenset[str], in_full: bool) -> str:
    """Name the thing at `place` so that no other thing can be meant; the place itself only where it is said."""
    thing = the_thing_at(scene, place)
    unambiguous = [
        names
        for names in _REFERENCES
        if len(_matches(scene, {name: getattr(thing, name) for name in names})) == 1
        and not ("place" in names and "places" in unsaid)
    ]
    if not unambiguous:
        raise ValueError(f"nothing but its place distinguishes the thing at {place!r} in {scene}")
    names = _IN_FULL if in_full and _IN_FULL in unambiguous else rng.choice(unambiguous)
    words = [rng.choice(_WORD_SLOTS[name][getattr(thing, name)]) for name in names if name != "place"]
    noun = [] if "shape" in names else [rng.choice(language.OBJECT_WORDS)]
    where = [_place_phrase(place, rng)] if "place" in names else []
    return " ".join(["the", *words, *noun, *where])


def _place_phrase(place: str, rng: random.Random, unseen: bool = False) -> str:
    return rng.choice(language.PLACE_PHRASES.options(unseen)).format(place=rng.choice(language.place_words(place)))


def _corner(place: str, rng: random.Random) -> str:
    return f"the {rng.choice(language.place_words(place))}{rng.choice(('', ' corner'))}"


def phrase(
    edit: Edit,
    scene: Scene,
    rng: random.Random,
    unseen: bool = False,
    unsaid: frozenset[str] = ALL_SAID,
    in_full: bool = False,
) -> str:
    """Say an edit of a scene as an instruction, in lower case and without a full stop; `unseen` as in `describe`.

    What is `unsaid` is not referred to; `in_full` says "the small red star" where "the star" would do. Raises
    ValueError when the edit cannot be applied to the scene or said.
    """
    apply_edit(edit, scene)
    template = rng.choice(_templates(edit, scene, unseen))
    noun = rng.choice(language.SHAPE_WORDS[scene.things[0].shape])
    slots: dict[str, Callable[[], str]] = {
        "thing": lambda: _refer(scene, str(edit.place), rng, unsaid, in_full),
        "other": lambda: _refer(scene, str(edit.to), rng, unsaid, in_full),
        # Where an added thing goes, or where a moved one does.
        "place": lambda: _place_phrase(str(edit.to or edit.place), rng, unseen),
        "corner": lambda: _corner(str(edit.to), rng),
        "count": lambda: language.COUNT_WORDS[int(edit.count or 0)][0],
        "shapes": lambda: plural(noun),
        "counted": lambda: (
            f"{language.COUNT_WORDS[int(edit.count or 0)][0]} {noun if edit.count == 1 else plural(noun)}"
        ),
        "a": lambda: "{a}",
    }
    for slot, table in _WORD_SLOTS.items():
        value = getattr(edit, "size" if slot in _SIZE_SLOTS else slot)
        slots[slot] = lambda table=table, value=value: rng.choice(table[value])
    said = {slot: slots[slot]() for slot in re.findall(r"\{(\w+)\}", template)}
    return language.with_articles(template.format(**said))


def _either(words: Sequence[str]) -> str:
    return f"(?:{'|'.join(sorted(words, key=len, reverse=True))})"


@cache
def _patterns() -> list[tuple[str, re.Pattern[str]]]:
    """All instruction templates as patterns with one named group per slot, each with its key in INSTRUCTIONS."""
    nouns = [word for words in language.SHAPE_WORDS.values() for word in words]
    corner = (
        rf"the {_either(list(language.ROW_WORDS['top'] + language.ROW_WORDS['bottom']))} (?:left|right)(?: corner)?"
    )
    place = f"(?:in|at) {corner}"
    adjectives = _either([*_WORD_VALUES["size"], *_WORD_VALUES["colour"]])
    reference = f"the (?:{adjectives} ){{0,2}}{_either([*nouns, *language.OBJECT_WORDS])}(?: {place})?"
    plurals = _either([plural(noun) for noun in nouns])
    slots = {slot: _either(list(values)) for slot, values in _WORD_VALUES.items()}
    slots |= {"thing": reference, "other": reference, "corner": corner, "place": place}
    slots |= {"count": _either(list(_NUMBERS)), "shapes": plurals}
    slots |= {"counted": f"{slots['count']} (?:{plurals}|{_either(nouns)})"}
    groups = {"a": "an?"} | {slot: f"(?P<{slot}>{pattern})" for slot, pattern in slots.items()}
    return [
        (key, re.compile(re.sub(r"\{(\w+)\}", lambda slot: groups[slot[1]], template.replace(",", ""))))
        for key, wording in INSTRUCTIONS.items()
        for template in wording.seen + wording.unseen
    ]


def _read_place(words: Sequence[str]) -> str:
    values = [
        language.MEANINGS[word][1] for word in words if language.MEANINGS.get(word, ("",))[0] in ("row", "column")
    ]
    return " ".join(values)


def _features(reference: str) -> dict[str, str]:
    """What a reference says of the thing it means."""
    words = reference.split()
    meanings = [language.MEANINGS[word] for word in words if word in language.MEANINGS]
    features = {name: value for name, value in meanings if name in ("shape", "colour", "size")}
    if place := _read_place(words):
        features["place"] = place
    return features


def _new_values(slots: Mapping[str, str]) -> dict[str, str]:
    """What the slots of a template say that attributes are to become."""
    return {
        ("size" if slot in _SIZE_SLOTS else slot): _WORD_VALUES[slot][word]
        for slot, word in slots.items()
        if slot in _WORD_VALUES
    }


def _target(slots: Mapping[str, str]) -> str:
    """Where a thing is to go, or ""."""
    return _read_place((slots.get("corner") or slots.get("place") or "").split())


def read_slots(text: str) -> dict[str, dict[str, str]]:
    """Return what an instruction says whatever the scene: what "edit", "thing", "other" and "new" each are said to be.

    The edit is known by its "wording", a key of INSTRUCTIONS. Raises ValueError when no template fits.
    """
    words = " ".join(language.split_words(text))
    matches = ((key, pattern.fullmatch(words)) for key, pattern in _patterns())
    key, slots = next(((key, match.groupdict()) for key, match in matches if match), ("", {}))
    if not key:
        raise ValueError(f"no edit is said like this: {text!r}")
    new = _new_values(slots)
    if place := _target(slots):
        new["place"] = place
    counted = slots.get("count") or slots.get("counted")
    if counted:
        new["count"] = str(_NUMBERS[counted.split()[0]])
    return {
        "edit": {"wording": key},
        "thing": _features(slots.get("thing", "")),
        "other": _features(slots.get("other", "")),
        "new": new,
    }


def _find(reference: str, scene: Scene) -> str:
    """The place of the one thing that a reference means."""
    features = _features(reference)
    found = _matches(scene, features)
    if len(found) != 1:
        raise ValueError(f"{reference!r} means {len(found)} things in {scene}")
    return found[0].place


def _read_edit(key: str, slots: Mapping[str, str], scene: Scene) -> Edit:
    """Build the edit that a matched template says; raises ValueError when it does not fit the scene."""
    kind, _, detail = key.partition(".")
    if kind == "clear" and scene.look != detail:
        raise ValueError(f"there is no {detail} in {scene}")
    if kind in ("look", "clear"):
        return Edit("look", look="plain" if kind == "clear" else detail)
    if kind == "count":
        _check_counted(slots, scene)
        return Edit("count", count=_NUMBERS[(slots.get("count") or slots["counted"]).split()[0]])
    values: dict[str, Any] = _new_values(slots)
    target = _target(slots)
    if kind == "add":
        return Edit(kind, target, **values)
    if kind == "background":
        return Edit(kind, **values)
    if "other" in slots:
        target = _find(slots["other"], scene)
    return Edit(kind, _find(slots["thing"], scene), to=target or None, **values)


def _check_counted(slots: Mapping[str, str], scene: Scene) -> None:
    noun = slots.get("shapes") or slots.get("counted", "").partition(" ")[2]
    if noun and language.MEANINGS[noun][1] != scene.things[0].shape:
        raise ValueError(f"there are no {noun} to count in {scene}")
    if "counted" in slots and (language.MEANINGS[noun][0] == "shape") != slots["counted"].startswith("one "):
        raise ValueError(f"number and noun disagree: {slots['counted']!r}")


def parse_instruction(text: str, scene: Scene, unsaid: frozenset[str] = ALL_SAID) -> Edit:
    """Read an instruction about a scene, of which `unsaid` is not known, back.

    Raises ValueError with the reason: no template fits, a reference means no thing or several, the edit is impossible
    or changes nothing, the words can mean different edits, or they need what is unsaid.
    """
    words = " ".join(language.split_words(text))
    if "background" in unsaid:  # whatever is asked for changes it
        named = _WORD_VALUES["background"]
        asked = {named[word] for word in words.split() if word in named}
        scene = replace(scene, background=next(name for name in BACKGROUNDS if name not in asked))
    edits: set[Edit] = set()
    reasons = [f"no edit is said like this: {text!r}"]
    for key, pattern in _patterns():
        if not (match := pattern.fullmatch(words)):
            continue
        if "places" in unsaid and (key in PLACED_KINDS or _read_place(words.split())):
            reasons.append(f"where things are is not known: {text!r}")
            continue
        try:
            edit = _read_edit(key, match.groupdict(), scene)
            apply_edit(edit, scene)
            edits.add(edit)
        except ValueError as error:
            reasons.append(str(error))
    if not edits:
        raise ValueError(reasons[-1])
    if len({apply_edit(edit, scene) for edit in edits}) > 1:
        raise ValueError(f"{text!r} can mean {' or '.join(map(str, edits))}")
    return min(edits, key=lambda edit: EDIT_KINDS.index(edit.kind))
