"""Triplets (caption, instruction, edited caption) written by people: their edit types, loader and checker.

Ours are `triplets.jsonl`, over captions as the web writes them; the exemplars of the few-shot prompt are some of them.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import IO, NamedTuple

from ip2p.captions.edit_types import EDIT_TYPES
from ip2p.captions.parse import MAX_INSTRUCTION_WORDS, MIN_SHARED_WORDS, shared_words
from ip2p.errors import UserError

PATH = Path(__file__).with_name("triplets.jsonl")

# The columns, ours first, and how the JSONL files of InstructPix2Pix spell them.
SPELLINGS = {
    "caption": ("caption", "input"),
    "instruction": ("instruction", "edit"),
    "edited_caption": ("edited_caption", "output"),
}


class Triplet(NamedTuple):
    """Texts of one line each. `edit_type` is a key of EDIT_TYPES, or None where nobody said."""

    caption: str
    instruction: str
    edited_caption: str
    edit_type: str | None = None


def read_triplets(source: str | Path | IO) -> list[Triplet]:
    """Read a JSONL file, ours or upstream's: each column by one of its SPELLINGS, other keys are ignored.

    Runs of white space become single spaces. Whether the triplets are any good is for `problems` to say.

    Raises:
        ValueError: a line is not such an object; the message names the file, the line and the key.
    """
    if isinstance(source, str | Path):
        with Path(source).open("rb") as file:
            return read_triplets(file)
    name = getattr(source, "name", "line")
    return [_triplet(line, f"{name}:{n}") for n, line in enumerate(source, start=1) if line.strip()]


def _triplet(line: str | bytes, where: str) -> Triplet:
    try:
        values = json.loads(line)
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise UserError(f"{where}: not JSON ({error}); write one object a line") from error
    if not isinstance(values, dict):
        raise UserError(f"{where}: {values!r} is not an object; write one with the keys {', '.join(SPELLINGS)}")
    edit_type = values.get("edit_type")
    if not isinstance(edit_type, str | None):
        raise UserError(f"{where}: edit_type is {edit_type!r}; make it a text or leave it out")
    caption, instruction, edited_caption = (_text(values, spellings, where) for spellings in SPELLINGS.values())
    return Triplet(caption, instruction, edited_caption, edit_type)


def _text(values: dict, spellings: tuple[str, ...], where: str) -> str:
    keys = [key for key in spellings if key in values]
    if len(keys) != 1:
        fault = f"{' and '.join(keys)} say the same" if keys else f"{spellings[0]} is missing"
        raise UserError(f"{where}: {fault}; give one of {', '.join(spellings)}")
    if not isinstance(values[keys[0]], str):
        raise UserError(f"{where}: {keys[0]} is {values[keys[0]]!r}; make it a text")
    return " ".join(values[keys[0]].split())


def problems(triplet: Triplet) -> list[str]:
    """Return what is wrong with `triplet`, in words; an empty list when it can be trained on."""
    found = [f"{field} is empty" for field in SPELLINGS if not getattr(triplet, field).strip()]
    length = len(triplet.instruction.split())
    if length > MAX_INSTRUCTION_WORDS:
        found.append(f"instruction has {length} words; say it in {MAX_INSTRUCTION_WORDS}")
    if _folded(triplet.caption) == _folded(triplet.edited_caption):
        found.append("edited_caption is the caption unchanged")
    shared, shorter = shared_words(triplet.caption, triplet.edited_caption)
    if shared < shorter * MIN_SHARED_WORDS:
        found.append(f"edited_caption shares {shared} of {shorter} words with the caption; keep the rest")
    if triplet.edit_type is not None and triplet.edit_type not in EDIT_TYPES:
        found.append(f"edit_type is {triplet.edit_type!r}; choose one of {', '.join(EDIT_TYPES)}")
    return found


def duplicates(triplets: Iterable[Triplet]) -> list[Triplet]:
    """Return the triplets whose caption and instruction, but for case and white space, came earlier in the list."""
    seen, repeated = set(), []
    for triplet in triplets:
        key = _folded(triplet.caption), _folded(triplet.instruction)
        if key in seen:
            repeated.append(triplet)
        seen.add(key)
    return repeated


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


TRIPLETS = tuple(read_triplets(PATH))

# By caption and in this order, so that triplets can be added without changing the prompt.
_EXEMPLAR_CAPTIONS = (
    "a wooden rowing boat on a calm lake at sunrise",
    "Portrait of an old fisherman with a gray beard, oil on canvas",
    "a brown dog asleep on a sofa",
    "Narrow street in Lisbon with yellow trams",
    "three sheep grazing on a green hill under a cloudy sky",
    "A glass vase with white tulips on a kitchen table",
    "mountain hut in summer, photograph by a hiker",
    "a lighthouse on a cliff, watercolor painting",
    "two children building a sandcastle on the beach",
    "An astronaut in a white suit riding a horse",
    "a red apple to the left of a green pear",
    "city skyline seen from the river, midday",
)
_BY_CAPTION = {triplet.caption: triplet for triplet in TRIPLETS}
EXEMPLARS = tuple(_BY_CAPTION[caption] for caption in _EXEMPLAR_CAPTIONS)
