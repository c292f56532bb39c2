"""The language model's text -> (instruction, edited caption), or the reason why not."""

import json
import re
from typing import NamedTuple

from ip2p.captions.edit_types import EDIT_TYPES

MAX_INSTRUCTION_WORDS = 30
# Of the shorter caption: removing and isolating keep few words of a long one, but nearly all that is left is old.
MIN_SHARED_WORDS = 1 / 3
# How a text begins that tells what is to be seen, not what to do.
DESCRIPTION = re.compile(
    r"(?:an?|here(?:'s| is)|this is|it(?:'s| is)|there (?:is|are)|(?:the |a )?(?:image|picture|photo|painting) "
    r"(?:of|shows))\b",
    re.IGNORECASE,
)


class Parsed(NamedTuple):
    """What the model wrote. `reason` is empty when it can be used; else the other two hold what could be read."""

    instruction: str
    edited_caption: str
    reason: str
    edit_type: str = ""


def parse(text: str, caption: str, max_caption_words: int = 60, names_type: bool = False) -> Parsed:
    """Read the JSON object that `prompt.schema(names_type)` describes and check it against `caption`.

    Every check has its own reason, so that reasons can be counted: not json, not an object, missing <key>,
    <key> is not text, empty <key>, instruction too long, instruction describes, edited caption too long, caption
    unchanged, another scene, unknown edit_type.
    """
    try:
        values = json.loads(text)
    except ValueError:
        return Parsed("", "", "not json")
    if not isinstance(values, dict):
        return Parsed("", "", "not an object")
    keys = ("instruction", "edited_caption", "edit_type") if names_type else ("instruction", "edited_caption")
    for key in keys:
        if key not in values:
            return Parsed("", "", f"missing {key}")
        if not isinstance(values[key], str):
            return Parsed("", "", f"{key} is not text")
    instruction, edited_caption = (" ".join(values[key].split()) for key in ("instruction", "edited_caption"))
    reason = _reason(instruction, edited_caption, caption, max_caption_words)
    edit_type = values["edit_type"] if names_type else ""
    if edit_type and edit_type not in EDIT_TYPES:
        edit_type, reason = "", reason or "unknown edit_type"
    return Parsed(instruction, edited_caption, reason, edit_type)


def _reason(instruction: str, edited_caption: str, caption: str, max_caption_words: int) -> str:
    if not instruction:
        return "empty instruction"
    if not edited_caption:
        return "empty edited_caption"
    if len(instruction.split()) > MAX_INSTRUCTION_WORDS:
        return "instruction too long"
    if DESCRIPTION.match(instruction) or instruction.casefold() == edited_caption.casefold():
        return "instruction describes"
    if len(edited_caption.split()) > max_caption_words:
        return "edited caption too long"
    if edited_caption.casefold() == " ".join(caption.split()).casefold():
        return "caption unchanged"
    shared, shorter = shared_words(caption, edited_caption)
    return "another scene" if shared < shorter * MIN_SHARED_WORDS else ""


def shared_words(caption: str, edited_caption: str) -> tuple[int, int]:
    """How many words two captions have in common, and how many the shorter one has."""
    before, after = (set(re.findall(r"\w+", text.casefold())) for text in (caption, edited_caption))
    return len(before & after), min(len(before), len(after))
