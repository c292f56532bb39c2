"""AnswerReader: what the language model answered in, rows of instructions/ out, each checked and with its reason."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from ip2p.captions.parse import parse
from ip2p.captions.safety import unsafe
from ip2p.clip_similarity import ClipSimilarity
from ip2p.models import load_clip, load_tokenizer
from ip2p.recipe import Recipe
from ip2p.records import INSTRUCTIONS

# text: what the model wrote; cut: whether it would have gone on; error: why there is no text, "" where there is one.
ANSWERS = pa.schema(
    {
        "caption_id": pa.string(),
        "caption": pa.string(),
        "refusal": pa.string(),
        "text": pa.string(),
        "cut": pa.bool_(),
        "error": pa.string(),
    }
)

EditType = Callable[[str, str], str | None]


class AnswerReader:
    """Reads and checks answers, a batch at a time.

    Args:
        attempt: which one this is, from 1. Before the last (`instructions.attempts`) only what is settled is returned:
            good answers and refused captions; the other captions are to be asked again.
        edit_type: (caption, instruction) -> type of the edit, for captions of which a grammar can tell it; without, the
            answer names it.
    """

    def __init__(self, recipe: Recipe, attempt: int = 1, edit_type: EditType | None = None):
        self.settings, self.attempt, self.edit_type = recipe.instructions, attempt, edit_type
        self.last = attempt >= self.settings.attempts
        self.names_type = names_type(recipe)
        self.tokenizer = load_tokenizer(recipe.models.text_to_image)
        self.clip = None
        if self.settings.same_meaning is not None:
            self.clip = ClipSimilarity(load_clip(recipe.models.clip, "cpu"))

    def __call__(self, batch: pa.Table) -> pa.Table:
        """ANSWERS -> INSTRUCTIONS, in the same order."""
        answers = batch.to_pylist()
        rows = [self._read(answer) for answer in answers]
        for check in (self._long, self._unsafe, self._same):
            check([row for row in rows if row["status"] == "ok"])
        reject_over_quota(rows, self.settings.quotas)
        settled = [
            row
            for answer, row in zip(answers, rows, strict=True)
            if self.last or row["status"] == "ok" or answer["refusal"]
        ]
        return pa.Table.from_pylist(settled, schema=INSTRUCTIONS)

    def _read(self, answer: dict[str, Any]) -> dict[str, Any]:
        row = dict.fromkeys(INSTRUCTIONS.names, "") | {
            "caption_id": answer["caption_id"],
            "original_prompt": answer["caption"],
            "attempts": self.attempt,
        }
        if answer["refusal"]:
            return row | {"attempts": 0, "status": "rejected", "reason": answer["refusal"]}
        if answer["error"]:
            return row | {"status": "failed", "reason": answer["error"]}
        parsed = parse(answer["text"], answer["caption"], self.settings.max_caption_words, self.names_type)
        reason = "answer cut at max_tokens" if parsed.reason == "not json" and answer["cut"] else parsed.reason
        edit_type = parsed.edit_type
        if self.edit_type is not None and not reason:
            edit_type = self.edit_type(answer["caption"], parsed.instruction) or ""
        return row | {
            "edit_prompt": parsed.instruction,
            "edited_prompt": parsed.edited_caption,
            "edit_type": edit_type,
            "status": "rejected" if reason else "ok",
            "reason": reason,
        }

    def _long(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if too_long(self.tokenizer, row["edit_prompt"]) or too_long(self.tokenizer, row["edited_prompt"]):
                reject(row, f"longer than {self.tokenizer.model_max_length} tokens")

    def _unsafe(self, rows: list[dict[str, Any]]) -> None:
        if self.settings.unsafe is None:
            return
        texts = ["\n".join(row[key] for key in ("original_prompt", "edit_prompt", "edited_prompt")) for row in rows]
        for row, found in zip(rows, unsafe(texts, self.settings.unsafe), strict=True):
            if found:
                reject(row, "unsafe text")

    def _same(self, rows: list[dict[str, Any]]) -> None:
        """Where only the words changed ("a plum box", "a purple box") there is nothing to be seen."""
        if self.clip is None or not rows:
            return
        before, after = (
            self.clip.embed_texts([row[key] for row in rows]) for key in ("original_prompt", "edited_prompt")
        )
        for row, likeness in zip(rows, (before * after).sum(dim=1).tolist(), strict=True):
            if likeness >= self.settings.same_meaning:
                reject(row, "same meaning")


def names_type(recipe: Recipe) -> bool:
    """Whether answers begin with their type: the miniature's model was trained without, its grammar tells the type."""
    return recipe.truth == "none" or recipe.instructions.prompt == "few_shot"


def too_long(tokenizer: Any, text: str) -> bool:
    """Whether the model that draws would read only the beginning of `text` (77 tokens with CLIP's text encoder)."""
    return len(tokenizer(text, verbose=False).input_ids) > tokenizer.model_max_length


def reject(row: dict[str, Any], reason: str) -> None:
    row.update(status="rejected", reason=reason)


def reject_over_quota(rows: list[dict[str, Any]], quotas: dict[str, float]) -> None:
    """Of each type, let the first through, as many as its share of all `rows`, one at least; reject the others.

    Since the share holds in every batch it holds in the whole, whatever runs where.
    """
    found: Counter[str] = Counter()
    for row in rows:
        edit_type = row["edit_type"]
        if row["status"] == "ok" and edit_type in quotas:
            found[edit_type] += 1
            if found[edit_type] > max(1, int(quotas[edit_type] * len(rows))):
                reject(row, f"enough of {edit_type}")
