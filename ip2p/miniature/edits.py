"""Twelve kinds of edit: drawn, applied to scenes, said as instructions, and read back from instructions.

An instruction refers to a thing by what distinguishes it in its scene ("the red star", "the object in the top left"),
so reading one back needs the scene.
"""

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, TypeVar

from ip2p.miniature import language
from ip2p.miniature.language import ALL_SAID, INSTRUCTIONS, Description, describe, draw_unsaid, plural, read_caption
from ip2p.miniature.scene import (
    BACKGROUNDS,
    COLOURS,
    LOOKS,
    MAX_THINGS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    alike,
    attributes,
    draw_scene,
    draw_scene_of,
    free_places,
    thing_at,
)
from ip2p.miniature.scene import (
    held_out as is_held_out,
)

T = TypeVar("T")

EDIT_KINDS = (
    "recolour",
    "reshape",
    "resize",
    "replace",
    "add",
    "remove",
    "background",
    "look",
    "move",
    "swap",
    "isolate",
    "count",
)


@dataclass(frozen=True)
class Edit:
    """One edit. `kind` says which of the other fields are set, see `FIELDS`.

    `place` is where the thing in question is (for add: will be), `to` where it moves or with whom it swaps, `count` how
    many things there are afterwards. Raises ValueError when the fields do not fit the kind.
    """

    kind: str
    place: str | None = None
    to: str | None = None
    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    background: str | None = None
    look: str | None = None
    count: int | None = None

    def __post_init__(self) -> None:
        _check_kind(self.kind)
        given = {name for name, value in vars(self).items() if name != "kind" and value is not None}
        if given != set(FIELDS[self.kind]):
            raise ValueError(f"{self.kind} takes {', '.join(FIELDS[self.kind])}, got {', '.join(sorted(given))}")
        if self.to and self.to == self.place:
            raise ValueError(f"{self.kind} needs two different places, got {self.to!r} twice")


FIELDS: dict[str, tuple[str, ...]] = {
    "recolour": ("place", "colour"),
    "reshape": ("place", "shape"),
    "resize": ("place", "size"),
    "replace": ("place", "shape", "colour"),
    "add": ("place", "shape", "colour", "size"),
    "remove": ("place",),
    "background": ("background",),
    "look": ("look",),
    "move": ("place", "to"),
    "swap": ("place", "to"),
    "isolate": ("place",),
    "count": ("count",),
}


def apply_edit(edit: Edit, scene: Scene) -> Scene:
    """Return the edited scene; raises ValueError with the reason when the edit is impossible or changes nothing."""
    edited = _apply(edit, scene)
    if edited == scene:
        raise ValueError(f"{edit} changes nothing in {scene}")
    return edited


def _apply(edit: Edit, scene: Scene) -> Scene:
    if edit.background or edit.look:
        return replace(scene, background=edit.background or scene.background, look=edit.look or scene.look)
    if edit.count is not None:
        return replace(scene, things=_recount(scene, edit.count))
    if edit.kind == "add":
        new = Thing(str(edit.shape), str(edit.colour), str(edit.size), str(edit.place))
        return replace(scene, things=(*scene.things, new))
    thing = _thing_at(scene, edit.place)
    others = tuple(other for other in scene.things if other != thing)
    if edit.kind == "isolate":
        return replace(scene, things=(thing,))
    if edit.kind == "remove":
        return replace(scene, things=others)
    if edit.kind == "move":
        return replace(scene, things=(*others, replace(thing, place=edit.to)))
    if edit.kind == "swap":
        partner = _thing_at(scene, edit.to)
        rest = tuple(other for other in others if other != partner)
        return replace(scene, things=(*rest, replace(thing, place=edit.to), replace(partner, place=edit.place)))
    changes = {name: getattr(edit, name) for name in ("shape", "colour", "size") if getattr(edit, name)}
    return replace(scene, things=(*others, replace(thing, **changes)))


def _thing_at(scene: Scene, place: str | None) -> Thing:
    thing = thing_at(scene, place) if place else None
    if thing is None:
        raise ValueError(f"there is nothing at {place!r} in {scene}")
    return thing


def _recount(scene: Scene, count: int) -> tuple[Thing, ...]:
    """New things take the first free places; the last ones go."""
    if not alike(scene):
        raise ValueError(f"things that differ cannot be counted: {scene}")
    kept = scene.things[:count]
    new = [replace(scene.things[0], place=place) for place in free_places(scene)[: max(0, count - len(scene.things))]]
    return (*kept, *new)


# Kinds that make no sense to one who does not know where things are.
PLACED_KINDS = ("add", "move", "swap", "count")


def possible_kinds(scene: Scene, unsaid: frozenset[str] = ALL_SAID) -> list[str]:
    """Return the kinds of edit that can change this scene, in the order of EDIT_KINDS, where `unsaid` is not known."""
    several = len(scene.things) > 1
    differ = len({(thing.shape, thing.colour, thing.size) for thing in scene.things}) > 1
    impossible = {
        "add": len(scene.things) == MAX_THINGS,
        "remove": not several,
        "swap": not differ,
        "isolate": not several,
        "count": not alike(scene),
    }
    if "places" in unsaid:
        impossible |= dict.fromkeys(PLACED_KINDS, True)
    return [kind for kind in EDIT_KINDS if not impossible.get(kind)]


def draw_edit(scene: Scene, rng: random.Random, kind: str | None = None) -> Edit:
    """Draw an edit that changes the scene, of `kind` or of a kind drawn evenly from the possible ones.

    Raises ValueError when the kind is unknown or impossible in this scene.
    """
    kind = kind or rng.choice(possible_kinds(scene))
    _check_kind(kind)
    if kind not in possible_kinds(scene):
        raise ValueError(f"{kind} is impossible in {scene}")

    def another(values: Iterable[T], current: object = None) -> T:
        return rng.choice([value for value in values if value != current])

    here, free = [thing.place for thing in scene.things], free_places(scene)
    place = rng.choice(free if kind == "add" else here)
    thing = thing_at(scene, place)
    draws: dict[str, Callable[[], Any]] = {
        "place": lambda: place,
        "to": lambda: another(free if kind == "move" else here, place),
        "shape": lambda: another(SHAPES, thing and thing.shape),
        "colour": lambda: another(COLOURS, thing and thing.colour),
        "size": lambda: another(SIZES, thing and thing.size),
        "background": lambda: another(BACKGROUNDS, scene.background),
        "look": lambda: another(LOOKS, scene.look),
        "count": lambda: another(range(1, MAX_THINGS + 1), len(scene.things)),
    }
    edit = Edit(kind, **{name: draws[name]() for name in FIELDS[kind]})
    # Only a swap of two things that are alike changes nothing: then draw again.
    return edit if _apply(edit, scene) != scene else draw_edit(scene, rng, kind)


def _check_kind(kind: str) -> None:
    if kind not in EDIT_KINDS:
        raise ValueError(f"kind must be one of {', '.join(EDIT_KINDS)}, got {kind!r}")


def draw_scene_for(kind: str, rng: random.Random) -> Scene:
    """Draw a scene in which an edit of `kind` is possible; raises ValueError for an unknown kind."""
    _check_kind(kind)
    if kind == "count":
        return draw_scene_of(rng, rng.randint(1, MAX_THINGS), all_alike=True)
    while kind not in possible_kinds(scene := draw_scene(rng)):
        pass
    return scene


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
    thing = _thing_at(scene, place)
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


def read_slots(text: str) -> dict[str, dict[str, str]]:
    """Return what an instruction says whatever the scene: what "edit", "thing", "other" and "new" each are said to be.

    The edit is known by its "wording", a key of INSTRUCTIONS. Raises ValueError when no template fits.
    """
    words = " ".join(language.split_words(text))
    matches = ((key, pattern.fullmatch(words)) for key, pattern in _patterns())
    key, slots = next(((key, match.groupdict()) for key, match in matches if match), ("", {}))
    if not key:
        raise ValueError(f"no edit is said like this: {text!r}")
    new = {
        ("size" if slot in _SIZE_SLOTS else slot): _WORD_VALUES[slot][word]
        for slot, word in slots.items()
        if slot in _WORD_VALUES
    }
    if place := _read_place((slots.get("corner") or slots.get("place") or "").split()):
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
    values: dict[str, Any] = {
        ("size" if slot in _SIZE_SLOTS else slot): _WORD_VALUES[slot][word]
        for slot, word in slots.items()
        if slot in _WORD_VALUES
    }
    target = _read_place((slots.get("corner") or slots.get("place") or "").split())
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


def _said(description: Description) -> dict[str, str | bool | int]:
    """What a description says, flat; things without places are counted by what they look like."""
    scene, unsaid = description.scene, description.unsaid
    flat: dict[str, str | bool | int] = {**attributes(scene)}
    if "background" in unsaid:
        del flat["background"]
    if "places" in unsaid:
        flat = {name: value for name, value in flat.items() if "." not in name}
        for thing in scene.things:
            name = f"number of {thing.size} {thing.colour} {thing.shape}"
            flat[name] = int(flat.get(name, 0)) + 1
    return flat


def consistent(caption: str, instruction: str, edited_caption: str) -> str | None:
    """Return None when the instruction turns what the caption says into exactly what the edited one says, or why not.

    What the caption leaves unsaid the edited one leaves unsaid too, unless it is what the edit sets.
    """
    try:
        before = read_caption(caption)
    except ValueError as error:
        return f"caption: {error}"
    try:
        edit = parse_instruction(instruction, before.scene, before.unsaid)
    except ValueError as error:
        return f"instruction: {error}"
    try:
        after = read_caption(edited_caption)
    except ValueError as error:
        return f"edited caption: {error}"
    unsaid = before.unsaid - {edit.kind}
    for what in sorted(unsaid ^ after.unsaid):
        return f"edited caption: {what} should be {'un' if what in unsaid else ''}said"
    expected, got = _said(Description(_apply(edit, before.scene), unsaid)), _said(after)
    differing = [name for name in sorted(expected | got) if expected.get(name) != got.get(name)]
    if differing:
        name = differing[0]
        return f"edited caption: {name} should be {expected.get(name)}, is {got.get(name)}"
    return None


class Triplet(NamedTuple):
    """What a language model sees of an edit, and the truth behind it."""

    caption: str
    instruction: str
    edited_caption: str
    edit: Edit
    scene: Scene
    edited_scene: Scene
    unsaid: frozenset[str]  # by the caption


def draw_triplet(
    rng: random.Random, kind: str | None = None, unseen: bool = False, held_out: bool | None = None
) -> Triplet:
    """Draw an edit with both captions, kinds balanced unless one is given.

    `held_out`: None draws from all scenes; False only pairs with neither scene held out (training); True only pairs
    whose first scene is held out (testing). `unseen` takes the wordings that training never uses.
    """
    kind = kind or rng.choice(EDIT_KINDS)
    while True:
        scene = draw_scene_for(kind, rng)
        edit = draw_edit(scene, rng, kind)
        edited = apply_edit(edit, scene)
        if held_out is None or (is_held_out(scene) if held_out else not (is_held_out(scene) or is_held_out(edited))):
            break
    # People seldom say where things are; but three things with free places are more than the miniature can draw well.
    unsaid = draw_unsaid(rng, places=0.8, background=0.2)
    if kind in PLACED_KINDS or len(scene.things) > 2 or (alike(scene) and len(scene.things) > 1):
        unsaid -= {"places"}
    style = rng.getrandbits(32)
    return Triplet(
        describe(scene, style, unseen, unsaid),
        phrase(edit, scene, rng, unseen, unsaid),
        describe(edited, style, unseen, unsaid - {kind}),
        edit,
        scene,
        edited,
        unsaid,
    )
