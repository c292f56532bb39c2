"""BenchmarkScorer: sessions of a benchmark in, the same sessions out, edited by every model and measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from ip2p import images
from ip2p.clip_similarity import ClipSimilarity
from ip2p.edit.editor import Editor, EditRequest
from ip2p.edit.editors import load_editor
from ip2p.errors import UserError
from ip2p.evaluate.benchmark.layouts import CAPTIONS, RESULTS, SINGLE
from ip2p.evaluate.edit_metrics import Picture, embed_by_dino, measure
from ip2p.evaluate.scorer import embed_images
from ip2p.evaluate.sweep import UNCHANGED
from ip2p.models import load_clip, load_dino
from ip2p.recipe import Recipe
from ip2p.records import digest
from ip2p.workspace import Workspace


@dataclass(eq=False)
class _Turn:
    """A turn of a session, read. `reason` says why it can't be edited or measured; then its images may be None."""

    session: int
    number: int | None
    instruction: str
    seed: int
    source: Picture | None
    target: Picture | None
    before: Tensor | None  # of the captions, as embedded by CLIP
    after: Tensor | None
    reason: str


@dataclass(eq=False)
class _Edit:
    """What became of a turn: the image it was made of and the edited one, or the reason why not."""

    source: Picture | None
    edited: Picture | None
    reason: str = ""


class BenchmarkScorer:
    """Edits and measures sessions; all models are held at a time, so that an image is read and embedded once.

    Args:
        workspace: where this run's editor lies.
        editors: names of the editors; the unchanged input, the baseline, comes with them.
        modes: SINGLE, and MULTI where sessions have turns.
    """

    def __init__(self, recipe: Recipe, workspace: Workspace, editors: Sequence[str], modes: Sequence[str]):
        self.recipe, self.modes = recipe, modes
        self.clip = ClipSimilarity(load_clip(recipe.models.clip, recipe.device))
        self.dino = load_dino(recipe.models.dino, recipe.device) if recipe.models.dino else None
        size, side = recipe.evaluate.batch_size, recipe.sampling.max_side
        self.editors = {name: Editor(load_editor(recipe, workspace, name), size, side) for name in editors}

    def __call__(self, batch: pa.Table) -> pa.Table:
        """SESSIONS -> RESULTS, one row for each row."""
        rows = batch.to_pylist()
        turns = self._read(rows)
        results: list[dict[str, Any]] = [{"id": row["id"], "edits": [], "images": []} for row in rows]
        for model in (*self.editors, UNCHANGED):
            single = self._edit(model, turns, [turn.source for turn in turns])
            for mode in self.modes:
                edits = single if mode == SINGLE else self._iterate(model, turns, single)
                for turn, edit in zip(turns, edits, strict=True):
                    result = results[turn.session]
                    result["edits"].append({"model": model, "mode": mode} | _measured(turn, edit))
                    made = edit.edited if model != UNCHANGED else None
                    result["images"].append(images.encode(made.pixels) if made else None)
        return pa.Table.from_pylist(results, schema=RESULTS)

    def _read(self, rows: list[dict[str, Any]]) -> list[_Turn]:
        """All turns of SESSIONS with their images decoded and everything embedded."""
        read = [(n, row["id"], turn, *_decode(turn)) for n, row in enumerate(rows) for turn in row["turns"]]
        pairs = [(source, target) for *_, source, target, _ in read]
        pictures = iter(self._embed([image for pair in pairs for image in pair if image is not None]))
        texts = sorted({turn[key] for _, _, turn, *_ in read for key in CAPTIONS if turn[key]})
        embedded = dict(zip(texts, self.clip.embed_texts(texts).cpu())) if texts else {}
        return [
            _Turn(
                session=session,
                number=turn["turn"],
                instruction=turn["instruction"],
                seed=digest("benchmark", self.recipe.seed, id_, turn["turn"] or 0),
                source=next(pictures) if source is not None else None,
                target=next(pictures) if target is not None else None,
                before=embedded.get(turn["input_caption"]),
                after=embedded.get(turn["output_caption"]),
                reason=reason,
            )
            for session, id_, turn, source, target, reason in read
        ]

    def _embed(self, pixels: list[np.ndarray]) -> list[Picture]:
        if not pixels:
            return []
        by_clip = embed_images(self.clip, pixels).cpu()
        by_dino = embed_by_dino(self.dino, pixels).cpu() if self.dino else [None] * len(pixels)
        return [Picture(*found) for found in zip(pixels, by_clip, by_dino, strict=True)]

    def _edit(self, model: str, turns: list[_Turn], sources: Sequence[Picture | None]) -> list[_Edit]:
        """Each turn on the source beside it; a turn with a reason is not edited."""
        edits = [_Edit(source, None, turn.reason) for turn, source in zip(turns, sources, strict=True)]
        to_do = [(turn, edit) for turn, edit in zip(turns, edits, strict=True) if not edit.reason]
        if model == UNCHANGED:
            for _, edit in to_do:
                edit.edited = edit.source
            return edits
        sampling, requests = self.recipe.sampling, []
        for turn, edit in to_do:
            assert edit.source is not None
            requests.append(
                EditRequest(
                    image=edit.source.pixels,
                    instruction=turn.instruction,
                    guidance_scale=sampling.guidance_scale,
                    image_guidance_scale=sampling.image_guidance_scale,
                    steps=sampling.steps,
                    seed=turn.seed,
                    solver=sampling.solver,
                )
            )
        for (_, edit), edited in zip(to_do, self._embed(self.editors[model].edit(requests)), strict=True):
            edit.edited = edited
        return edits

    def _iterate(self, model: str, turns: list[_Turn], single: list[_Edit]) -> list[_Edit]:
        """Each turn on what was made of the turn before it. The first turns are as in `single`: same source, same seed.

        All sessions take their turns together, so that they share UNet calls.
        """
        edits = [
            edit if turn.number == 1 or turn.reason else _Edit(None, None, "no edited image of the turn before it")
            for turn, edit in zip(turns, single, strict=True)
        ]
        made = {(turn.session, turn.number): edit.edited for turn, edit in zip(turns, edits, strict=True)}
        for number in sorted({turn.number for turn in turns if turn.number is not None and turn.number > 1}):
            ready = [
                n
                for n, turn in enumerate(turns)
                if turn.number == number and not turn.reason and made.get((turn.session, number - 1))
            ]
            sources = [made[turns[n].session, number - 1] for n in ready]
            for n, edit in zip(ready, self._edit(model, [turns[n] for n in ready], sources), strict=True):
                edits[n] = edit
                made[turns[n].session, number] = edit.edited
        return edits


def _decode(turn: dict[str, Any]) -> tuple[np.ndarray | None, np.ndarray | None, str]:
    """(source, target, reason) of a TURN; the target is None where there is none, both where one can't be read."""
    if turn["reason"]:
        return None, None, turn["reason"]
    read = []
    for name in ("source_img", "target_img"):
        try:
            read.append(images.decode(turn[name]) if turn[name] is not None else None)
        except UserError as error:
            return None, None, f"{name}: {error}"
    return read[0], read[1], ""


def _measured(turn: _Turn, edit: _Edit) -> dict[str, Any]:
    """The rest of a row of EDIT."""
    facts = {"turn": turn.number, "instruction": turn.instruction, "seed": turn.seed}
    if edit.source is None or edit.edited is None:
        return facts | {"status": "failed", "reason": edit.reason}
    metrics = measure(edit.source, edit.edited, turn.target, turn.before, turn.after)
    return facts | metrics | {"status": "ok", "reason": ""}
