"""Reads and checks what the language model answered: answers in, rows of instructions/ out, each with its reason."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from ip2p.captions.parse import parse
from ip2p.captions.safety import unsafe
from ip2p.clip_similarity import ClipSimilarity
from ip2p.models import load_clip, load_tokenizer
from ip2p.recipe import Recipe
from ip2p.records import INSTRUCTIONS, Answer

EditType = Callable[[str, str], str | None]
Row = dict[str, Any]


class AnswerReader:
    """Reads and checks answers, a batch at a time.

    Args:
        edit_type: (caption, instruction) -> type of the edit, for captions of which a grammar can tell it. Without it,
            the answer names the type.
        device: of the CLIP model that compares captions, where the recipe sets `same_meaning`.
    """

    def __init__(self, recipe: Recipe, edit_type: EditType | None = None, device: str = "cpu"):
        self.settings, self.edit_type = recipe.instructions, edit_type
        self.names_type = names_type(recipe)
        self.tokenizer = load_tokenizer(recipe.models.text_to_image)
        self.clip = None
        if self.settings.same_meaning is not None:
            self.clip = ClipSimilarity(load_clip(recipe.models.clip, device))

    def read(self, asked: list[Row], answers: list[Answer], attempt: int, settled: list[Row]) -> list[Row]:
        """Return a row of INSTRUCTIONS for each row of CAPTIONS that was asked, in the same order.

        Args:
            attempt: which one this is, from 1.
            settled: the rows of the batch that earlier attempts settled; quotas hold for all of the batch.
        """
        rows = [self._read(caption, answer, attempt) for caption, answer in zip(asked, answers, strict=True)]
        for check in (self._long, self._unsafe, self._same):
            check([row for row in rows if row["status"] == "ok"])
        reject_over_quota([*settled, *rows], self.settings.quotas)
        return rows

    def settled(self, row: Row) -> bool:
        """Return whether a row is good, or refused without being asked; any other is worth another attempt."""
        return row["status"] == "ok" or not row["attempts"]

    def _read(self, caption: Row, answer: Answer, attempt: int) -> Row:
        row = dict.fromkeys(INSTRUCTIONS.names, "") | {
            "caption_id": caption["caption_id"],
            "original_prompt": caption["caption"],
            "attempts": attempt,
        }
        if caption["refusal"]:
            return row | {"attempts": 0, "status": "rejected", "reason": caption["refusal"]}
        if answer.error:
            return row | {"status": "failed", "reason": answer.error}
        parsed = parse(answer.text, caption["caption"], self.settings.max_caption_words, self.names_type)
        reason = "answer cut at max_tokens" if parsed.reason == "not json" and answer.cut else parsed.reason
        edit_type = parsed.edit_type
        if self.edit_type is not None and not reason:
            edit_type = self.edit_type(caption["caption"], parsed.instruction) or ""
        return row | {
            "edit_prompt": parsed.instruction,
            "edited_prompt": parsed.edited_caption,
            "edit_type": edit_type,
            "status": "rejected" if reason else "ok",
            "reason": reason,
        }

    def _long(self, rows: list[Row]) -> None:
        for row in rows:
            if too_long(self.tokenizer, row["edit_prompt"]) or too_long(self.tokenizer, row["edited_prompt"]):
                reject(row, f"longer than {self.tokenizer.model_max_length} tokens")

    def _unsafe(self, rows: list[Row]) -> None:
        if self.settings.unsafe is None:
            return
        texts = ["\n".join(row[key] for key in ("original_prompt", "edit_prompt", "edited_prompt")) for row in rows]
        for row, found in zip(rows, unsafe(texts, self.settings.unsafe), strict=True):
            if found:
                reject(row, "unsafe text")

    def _same(self, rows: list[Row]) -> None:
        """Reject edits of nothing but the words ("a plum box", "a purple box"): there is nothing to be seen."""
        if self.clip is None or not rows:
            return
        before, after = (
            self.clip.embed_texts([row[key] for row in rows]) for key in ("original_prompt", "edited_prompt")
        )
        for row, likeness in zip(rows, (before * after).sum(dim=1).tolist(), strict=True):
            if likeness >= self.settings.same_meaning:
                reject(row, "same meaning")


def names_type(recipe: Recipe) -> bool:
    """Return whether answers begin with their type. The miniature's do not: its grammar tells the type."""
    return recipe.truth == "none" or recipe.instructions.prompt == "few_shot"


def too_long(tokenizer: Any, text: str) -> bool:
    """Return whether the model that draws would read only the beginning of `text` (CLIP's: 77 tokens)."""
    return len(tokenizer(text, verbose=False).input_ids) > tokenizer.model_max_length


def reject(row: Row, reason: str) -> None:
    row.update(status="rejected", reason=reason)


def reject_over_quota(rows: list[Row], quotas: dict[str, float]) -> None:
    """Reject the good rows of each type beyond its share of all `rows`, but not the first of the type.

    Since the share holds in every batch it holds in the whole, in any order and on any number of engines.
    """
    found: Counter[str] = Counter()
    for row in rows:
        edit_type = row["edit_type"]
        if row["status"] == "ok" and edit_type in quotas:
            found[edit_type] += 1
            if found[edit_type] > max(1, int(quotas[edit_type] * len(rows))):
                reject(row, f"enough of {edit_type}")
