"""English for the miniature world: all wording, scene -> caption, caption -> scene.

A caption says everything about its scene, or leaves the background or all places unsaid, as people do. All choices of
wording come from a `style` number hashed with the value or the slot that is worded, so that describing an edited scene
in the same style changes only the words that the edit touches. A word means one value of one attribute, so captions are
read by their words, whatever the order of the sentence.

Wordings in `Wording.unseen` are kept out of training. They combine words that training has seen in new ways: a model
trained from scratch cannot know a wholly new word, but it should understand a new sentence.
"""

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ip2p.miniature.scene import BACKGROUNDS, PLACES, Scene, Thing, alike

T = TypeVar("T")


@dataclass(frozen=True)
class Wording:
    """Templates of one phrase: those used in training and those kept for testing."""

    seen: tuple[str, ...]
    unseen: tuple[str, ...]

    def options(self, unseen: bool) -> tuple[str, ...]:
        """Return the templates of one kind; there is at least one of each."""
        return self.unseen if unseen else self.seen


# Synonyms: the first is the plain word. No word may occur twice, here or in FILLERS.
COLOUR_WORDS = {
    "red": ("red", "crimson", "scarlet"),
    "green": ("green", "emerald", "jade"),
    "blue": ("blue", "azure", "cobalt"),
    "yellow": ("yellow", "gold", "lemon"),
    "purple": ("purple", "violet", "plum"),
    "orange": ("orange", "tangerine", "apricot"),
}
SHAPE_WORDS = {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle", "pyramid", "wedge"),
    "star": ("star", "pentagram", "asterisk"),
    "cross": ("cross", "plus"),
}
SIZE_WORDS = {"small": ("small", "tiny", "little"), "large": ("large", "big", "huge")}
BACKGROUND_WORDS = {
    "white": ("white", "pearl", "ivory"),
    "gray": ("gray", "grey", "silver"),
    "pink": ("pink", "rose", "salmon"),
    "brown": ("brown", "chocolate", "coffee"),
    "teal": ("teal", "turquoise", "cyan"),
}
LOOK_WORDS = {
    "plain": ("daylight", "clear", "daytime"),
    "night": ("night", "dark", "nighttime"),
    "fog": ("fog", "mist", "foggy", "misty", "haze"),
}
COUNT_WORDS = {1: ("one",), 2: ("two",), 3: ("three",)}
ROW_WORDS = {"top": ("top", "upper"), "bottom": ("bottom", "lower")}
COLUMN_WORDS = {"left": ("left",), "right": ("right",)}

# Words of captions that carry no attribute of their own.
FILLERS = {"a", "an", "the", "in", "at", "on", "by", "of", "against", "and", "with", "one", "corner", "weather"}
FILLERS |= {"background", "backdrop", "picture", "drawing", "image", "showing"}

PLACE_PHRASES = Wording(
    seen=("in the {place}", "at the {place}", "in the {place} corner"),
    unseen=("at the {place} corner",),
)
BACKGROUND_PHRASES = Wording(
    seen=("on {a} {background} background", "against {a} {background} backdrop"),
    unseen=("against {a} {background} background", "on {a} {background} backdrop"),
)
# The empty wording leaves a plain look unsaid.
LOOK_PHRASES = {
    "plain": Wording(seen=("", "", "in daylight", "in clear weather", "in the daytime"), unseen=("by daylight",)),
    "night": Wording(seen=("at night", "by night", "in the dark", "at nighttime"), unseen=("in the night",)),
    "fog": Wording(
        seen=("in fog", "in the mist", "in foggy weather", "in misty weather", "in the haze"), unseen=("in the fog",)
    ),
}
# How a thing is said: place last, and place first. A scene keeps to one of the two.
PLACE_LAST = Wording(
    seen=("{a} {size} {colour} {shape} {place}", "{a} {size} {shape} in {colour} {place}"),
    unseen=("{a} {size} {shape} {place} in {colour}",),
)
PLACE_FIRST = Wording(seen=("{place} {a} {size} {colour} {shape}",), unseen=("{place} {a} {size} {shape} in {colour}",))
ALIKE = Wording(
    seen=("{count} {size} {colour} {shapes}, {places}",), unseen=("{count} {size} {shapes} in {colour}, {places}",)
)
LAYOUTS = Wording(
    seen=(
        "{things}, {background}, {look}",
        "{things} {background}, {look}",
        "{look}, {things} {background}",
        "{background}, {things}, {look}",
    ),
    unseen=("{look}, {background}, {things}",),
)
# Only before things that say their place last.
TITLED_LAYOUTS = Wording(
    seen=(
        "a picture of {things}, {background}, {look}",
        "a drawing of {things} {background}, {look}",
        "an image showing {things}, {background}, {look}",
    ),
    unseen=("an image of {things} {background}, {look}", "{look}, a drawing of {things} {background}"),
)

# Slots: thing and other are references, corner is a bare place ("the top left"), place has its preposition.
INSTRUCTIONS: dict[str, Wording] = {
    "recolour": Wording(
        seen=(
            "make {thing} {colour}",
            "turn {thing} {colour}",
            "paint {thing} {colour}",
            "change the colour of {thing} to {colour}",
            "give {thing} {a} {colour} colour",
        ),
        unseen=("change {thing} to {colour}", "turn the colour of {thing} to {colour}"),
    ),
    "reshape": Wording(
        seen=(
            "turn {thing} into {a} {shape}",
            "make {thing} {a} {shape}",
            "change {thing} into {a} {shape}",
            "change the shape of {thing} to {a} {shape}",
        ),
        unseen=("change {thing} to {a} {shape}", "turn the shape of {thing} into {a} {shape}"),
    ),
    "resize": Wording(
        seen=(
            "make {thing} {size}",
            "make {thing} {comparative}",
            "{resizing} {thing}",
            "change the size of {thing} to {size}",
        ),
        unseen=("change {thing} to {size}", "turn {thing} {comparative}"),
    ),
    "replace": Wording(
        seen=(
            "replace {thing} with {a} {colour} {shape}",
            "swap {thing} for {a} {colour} {shape}",
            "put {a} {colour} {shape} in place of {thing}",
            "turn {thing} into {a} {colour} {shape}",
        ),
        unseen=("change {thing} into {a} {colour} {shape}", "change {thing} for {a} {colour} {shape}"),
    ),
    "add": Wording(
        seen=(
            "add {a} {size} {colour} {shape} {place}",
            "put {a} {size} {colour} {shape} {place}",
            "draw {a} {size} {colour} {shape} {place}",
            "{place} add {a} {size} {colour} {shape}",
        ),
        unseen=("{place} draw {a} {size} {colour} {shape}", "place {a} {size} {colour} {shape} {place}"),
    ),
    "remove": Wording(
        seen=("remove {thing}", "delete {thing}", "erase {thing}", "take away {thing}", "get rid of {thing}"),
        unseen=("take {thing} away",),
    ),
    "background": Wording(
        seen=(
            "make the background {background}",
            "change the background to {background}",
            "paint the backdrop {background}",
            "use {a} {background} background",
            "put it on {a} {background} backdrop",
        ),
        unseen=("change the backdrop to {background}", "turn the background {background}"),
    ),
    "look.plain": Wording(
        seen=("make it daylight", "turn it into day", "make it a clear day", "let it be daytime"),
        unseen=("change it to daylight", "turn it into a clear day"),
    ),
    "look.night": Wording(
        seen=("make it night", "turn it into night", "make it dark", "let night fall", "turn off the light"),
        unseen=("change it to night", "let it be dark"),
    ),
    "look.fog": Wording(
        seen=("add fog", "make it foggy", "cover it in mist", "fill it with fog", "turn it into a misty day"),
        unseen=("cover it in fog", "let it be foggy"),
    ),
    # Two ways back to plain, by what is there now.
    "clear.night": Wording(
        seen=("turn on the light", "turn night into day", "let night be over"), unseen=("change night into day",)
    ),
    "clear.fog": Wording(
        seen=("clear the fog", "remove the fog", "take away the mist"), unseen=("clear the mist", "get rid of the fog")
    ),
    "move": Wording(
        seen=(
            "move {thing} to {corner}",
            "shift {thing} to {corner}",
            "put {thing} {place}",
            "move {thing} into {corner}",
        ),
        unseen=("shift {thing} into {corner}", "move {thing}, put it {place}"),
    ),
    "swap": Wording(
        seen=(
            "swap {thing} and {other}",
            "swap {thing} with {other}",
            "exchange {thing} and {other}",
            "let {thing} and {other} trade places",
            "switch the places of {thing} and {other}",
        ),
        unseen=("exchange {thing} with {other}", "swap the places of {thing} and {other}"),
    ),
    "isolate": Wording(
        seen=(
            "keep only {thing}",
            "leave only {thing}",
            "remove everything but {thing}",
            "delete everything except {thing}",
            "show just {thing}",
        ),
        unseen=("keep just {thing}", "remove everything except {thing}"),
    ),
    "count": Wording(
        seen=(
            "make it {counted}",
            "have {count} of them",
            "show {counted}",
            "change the number of {shapes} to {count}",
            "there should be {counted}",
        ),
        unseen=("have {counted}", "there should be {count} of them"),
    ),
}
COMPARATIVE_WORDS = {"small": ("smaller", "tinier"), "large": ("bigger", "larger")}
RESIZING_WORDS = {"small": ("shrink", "reduce"), "large": ("enlarge", "grow")}
OBJECT_WORDS = ("object", "thing")


def plural(noun: str) -> str:
    """Return the plural of a shape word."""
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def article(following: str) -> str:
    """Return "a" or "an" for the word that follows."""
    return "an" if following[0] in "aeiou" else "a"


def with_articles(text: str) -> str:
    """Put "a" or "an" for every "{a}", by the word after it."""
    return re.sub(r"\{a\} (\w)", lambda match: f"{article(match[1])} {match[1]}", text)


def place_words(place: str) -> tuple[str, ...]:
    """Return the bare names of a place: "top left", "upper left"."""
    row, column = place.split()
    return tuple(f"{row_word} {column}" for row_word in ROW_WORDS[row])


def _pick(style: int, slot: str, options: Sequence[T]) -> T:
    digest = hashlib.blake2b(f"{style}/{slot}".encode(), digest_size=4).digest()
    return options[int.from_bytes(digest, "big") % len(options)]


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _place_phrase(place: str, style: int, unseen: bool) -> str:
    template = _pick(style, f"place.{place}", PLACE_PHRASES.options(unseen))
    return template.format(place=_pick(style, f"name.{place}", place_words(place)))


def _thing_words(thing: Thing, style: int) -> dict[str, str]:
    # Keyed by value and not by place: a thing that moves keeps its words, and red things are all "crimson" together.
    return {
        "shape": _pick(style, thing.shape, SHAPE_WORDS[thing.shape]),
        "colour": _pick(style, thing.colour, COLOUR_WORDS[thing.colour]),
        "size": _pick(style, thing.size, SIZE_WORDS[thing.size]),
    }


def _say_things(scene: Scene, style: int, form: str, unseen: bool, placed: bool) -> str:
    # The order belongs to the places, so that an edit does not shuffle what it leaves alone.
    things = sorted(scene.things, key=lambda thing: _pick(style, f"order.{thing.place}", range(1 << 32)))
    phrases = [_place_phrase(thing.place, style, unseen) for thing in things]
    if len(things) > 1 and alike(scene) and _pick(style, "count", (True, False)):
        words = _thing_words(things[0], style)
        template = _pick(style, "alike", ALIKE.options(unseen))
        return (template if placed else template.removesuffix(", {places}")).format(
            **words,
            count=COUNT_WORDS[len(things)][0],
            shapes=plural(words["shape"]),
            places=_join([f"one {phrase}" for phrase in phrases]),
        )
    if not placed:
        form = " ".join(form.replace("{place}", "").split())
    said = [
        form.format(a="{a}", place=phrase, **_thing_words(thing, style))
        for thing, phrase in zip(things, phrases, strict=True)
    ]
    return _join(said)


# What a caption may leave unsaid. A look that is not mentioned is plain.
UNSAID = ("places", "background")
ALL_SAID: frozenset[str] = frozenset()


def draw_unsaid(rng: random.Random, places: float = 0.5, background: float = 0.5) -> frozenset[str]:
    """Draw what a caption leaves unsaid, each with its own probability."""
    chances = {"places": places, "background": background}
    return frozenset(what for what in UNSAID if rng.random() < chances[what])


def describe(scene: Scene, style: int, unseen: bool = False, unsaid: frozenset[str] = ALL_SAID) -> str:
    """Return a caption that says everything about the scene but `unsaid`: lower case words and commas, at most 44.

    `style` is any integer and fixes all wording; `unseen` takes the sentences that training never uses.
    """
    place_last = PLACE_LAST.options(unseen)
    form = _pick(style, "form", place_last + PLACE_FIRST.options(unseen))
    titled = TITLED_LAYOUTS.options(unseen) if form in place_last else ()
    layout = _pick(style, "layout", LAYOUTS.options(unseen) + titled)
    look = _pick(style, f"look.{scene.look}", LOOK_PHRASES[scene.look].options(unseen))
    background = _pick(style, "background", BACKGROUND_PHRASES.options(unseen))
    if not look:
        layout = layout.removesuffix(", {look}").removeprefix("{look}, ")
    if "background" in unsaid:
        layout = re.sub(r",? \{background\}|\{background\}, ", "", layout)
    text = layout.format(
        things=_say_things(scene, style, form, unseen, placed="places" not in unsaid),
        background=background.format(
            a="{a}", background=_pick(style, scene.background, BACKGROUND_WORDS[scene.background])
        ),
        look=look,
    )
    return with_articles(text)


def _meanings() -> dict[str, tuple[str, str]]:
    tables: Mapping[str, Mapping[str, tuple[str, ...]]] = {
        "shape": SHAPE_WORDS,
        "colour": COLOUR_WORDS,
        "size": SIZE_WORDS,
        "row": ROW_WORDS,
        "column": COLUMN_WORDS,
        "background": BACKGROUND_WORDS,
        "look": LOOK_WORDS,
    }
    meanings = {
        word: (name, value) for name, table in tables.items() for value, words in table.items() for word in words
    }
    return meanings | {plural(word): ("shapes", shape) for shape, words in SHAPE_WORDS.items() for word in words}


# What each attribute word means: word -> (attribute, value).
MEANINGS = _meanings()
_NUMBERS = {word: number for number, words in COUNT_WORDS.items() for word in words if number > 1}


def _set_once(values: dict[str, str], name: str, value: str, what: str) -> None:
    if name in values:
        raise ValueError(f"{what} has two values of {name}: {values[name]} and {value}")
    values[name] = value


class _ThingsReader:
    """Gathers attribute words into things: one is complete when it has shape, colour, size and all of its places.

    Where a caption says no places at all, things are put at PLACES in the order in which they are mentioned.
    """

    def __init__(self, placed: bool) -> None:
        self.placed = placed
        self.things: list[Thing] = []
        self._start()

    def _start(self) -> None:
        self.number, self.values, self.row = 1, {}, ""
        self.places: list[str] = []

    def begin_group(self, number: int) -> None:
        self.check_finished()
        self.number = number

    def read(self, name: str, value: str) -> None:
        if name == "row":
            if self.row:
                raise ValueError(f"{self.row!r} is not followed by left or right")
            self.row = value
        elif name == "column":
            if not self.row:
                raise ValueError(f"{value!r} is not preceded by top or bottom")
            self.places.append(f"{self.row} {value}")
            self.row = ""
        else:
            if (name == "shapes") != (self.number > 1) and name in ("shape", "shapes"):
                raise ValueError(f"number and noun disagree: {self.number} and {value}")
            _set_once(self.values, name.removesuffix("s"), value, "a thing")
        if len(self.places) > self.number:
            raise ValueError(f"{self.number} thing(s) at {len(self.places)} places: {', '.join(self.places)}")
        if len(self.values) == 3 and not self.placed:
            self.places = list(PLACES[len(self.things) :][: self.number])
        if len(self.values) == 3 and len(self.places) == self.number:
            self.things += [Thing(**self.values, place=place) for place in self.places]
            self._start()

    def check_finished(self) -> None:
        if self.values or self.places or self.row or self.number > 1:
            missing = [name for name in ("shape", "colour", "size") if name not in self.values]
            lacks = ", ".join(missing) or "a place"
            raise ValueError(f"a thing lacks {lacks}: got {[*self.values.values(), *self.places]}")


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case, without commas and full stops."""
    return re.findall(r"[^\s,.]+", text.lower())


@dataclass(frozen=True)
class Description:
    """What a caption says: all of `scene` but what is `unsaid`, which is made up there.

    Things without places stand at PLACES in the order in which they are mentioned.
    """

    scene: Scene
    unsaid: frozenset[str]


def read_caption(text: str) -> Description:
    """Read a caption back; the order of the sentence is free, the words must be known.

    Raises ValueError with the reason: an unknown word, a thing that lacks an attribute or has one twice, places of some
    things only, or whatever the Scene itself refuses. A look that is not mentioned is plain.
    """
    words = split_words(text)
    placed = any(MEANINGS[word][0] in ("row", "column") for word in words if word in MEANINGS)
    reader = _ThingsReader(placed)
    setting: dict[str, str] = {}
    for word in words:
        if word in _NUMBERS:
            reader.begin_group(_NUMBERS[word])
        elif word in MEANINGS:
            name, value = MEANINGS[word]
            if name in ("background", "look"):
                _set_once(setting, name, value, "the scene")
            else:
                reader.read(name, value)
        elif word not in FILLERS:
            raise ValueError(f"unknown word {word!r} in caption {text!r}")
    reader.check_finished()
    said = {"places": placed, "background": "background" in setting}
    made_up = {"background": next(iter(BACKGROUNDS)), "look": "plain"}
    scene = Scene(tuple(reader.things), **(made_up | setting))
    return Description(scene, frozenset(name for name, is_said in said.items() if not is_said))


def parse_caption(text: str) -> Scene:
    """Read a caption that says everything; raises ValueError as `read_caption` does and for what is unsaid."""
    description = read_caption(text)
    if description.unsaid:
        raise ValueError(f"no {' and no '.join(sorted(description.unsaid))} in caption {text!r}")
    return description.scene


def template_words(templates: Sequence[str]) -> set[str]:
    """Return the plain words of templates, without their slots."""
    return {word for template in templates for word in split_words(re.sub(r"\{\w+\}", " ", template))}


def vocabulary() -> list[str]:
    """Return all words that captions and instructions can contain, sorted."""
    wordings = [PLACE_PHRASES, BACKGROUND_PHRASES, *LOOK_PHRASES.values(), PLACE_LAST, PLACE_FIRST, ALIKE]
    wordings += [LAYOUTS, TITLED_LAYOUTS, *INSTRUCTIONS.values()]
    words = {word for wording in wordings for word in template_words(wording.seen + wording.unseen)}
    for table in (COUNT_WORDS, COMPARATIVE_WORDS, RESIZING_WORDS):
        words |= {word for synonyms in table.values() for word in synonyms}
    return sorted(words | set(MEANINGS) | FILLERS | set(OBJECT_WORDS))
