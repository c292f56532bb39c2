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

# "the brown dog", "its collar": what an instruction takes for granted, up to the word that ends the phrase.
GIVEN = re.compile(
    r"\b(?:the|its|his|her|their)\s+(?P<phrase>(?:(?!(?:a|an|and|as|at|but|by|except|for|from|in|into|look|looks|more|of|on"
    r"|so|than|that|to|with)\b)[\w'-]+\s*)+)",
    re.IGNORECASE,
)
# Things go by many names: these need not be found in a caption that has them.
GENERAL_WORDS = (
    "animal background backdrop bird building child colour color everything flower food image letter lettering light "
    "man mood number object one order other people person photo picture place plant position rest scene season size "
    "sky style subject surrounding text thing time tree vehicle weather woman word"
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
    unchanged, another scene, instruction and caption disagree, unknown edit_type.
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
    if shared < shorter * MIN_SHARED_WORDS:
        return "another scene"
    return "instruction and caption disagree" if names_other_things(instruction, caption, edited_caption) else ""


def names_other_things(instruction: str, caption: str, edited_caption: str) -> bool:
    """Whether an instruction takes things for granted ("the dog"), and neither caption has a word of any of them.

    Of the instructions to other captions two in three are found, of our triplets' none.
    """
    given = [match["phrase"].casefold().split() for match in GIVEN.finditer(instruction)]
    words = re.findall(r"\w+", f"{caption} {edited_caption}".casefold())
    return bool(given) and not any(_is_found(word, words) for phrase in given for word in phrase)


def _is_found(word: str, words: list[str]) -> bool:
    """Whether a word, but for its ending, is in one of `words`, or so general that it could be any of them."""
    if word.rstrip("s") in GENERAL_WORDS.split():
        return True
    stem = word[:5] if len(word) > 5 else word.rstrip("s")
    return any(stem in other if len(stem) > 2 else word == other for other in words)


def shared_words(caption: str, edited_caption: str) -> tuple[int, int]:
    """How many words two captions have in common, and how many the shorter one has."""
    before, after = (set(re.findall(r"\w+", text.casefold())) for text in (caption, edited_caption))
    return len(before & after), min(len(before), len(after))
