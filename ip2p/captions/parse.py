"""The language model's text -> (instruction, edited caption), or the reason why not."""

import json
import re
from typing import NamedTuple

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


def parse(text: str, caption: str, max_caption_words: int = 60) -> Parsed:
    """Read the JSON object that `prompt.SCHEMA` describes and check it against `caption`.

    Every check has its own reason, so that reasons can be counted: not json, not an object, missing <key>,
    <key> is not text, empty <key>, instruction too long, instruction describes, edited caption too long, caption
    unchanged, another scene.
    """
    try:
        values = json.loads(text)
    except ValueError:
        return Parsed("", "", "not json")
    if not isinstance(values, dict):
        return Parsed("", "", "not an object")
    for key in ("instruction", "edited_caption"):
        if key not in values:
            return Parsed("", "", f"missing {key}")
        if not isinstance(values[key], str):
            return Parsed("", "", f"{key} is not text")
    instruction, edited_caption = (" ".join(values[key].split()) for key in ("instruction", "edited_caption"))
    return Parsed(instruction, edited_caption, _reason(instruction, edited_caption, caption, max_caption_words))


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
