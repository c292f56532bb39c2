"""EditScorer: planned edits in, the same rows with the edited image, its CLIP similarities and the truth out."""

from itertools import groupby

import numpy as np
import pyarrow as pa
import torch

from ip2p import images
from ip2p.clip_similarity import ClipSimilarity, similarities
from ip2p.edit.editor import Editor, EditRequest
from ip2p.edit.editors import load_editor
from ip2p.evaluate.sdedit import SDEdit, SDEditRequest
from ip2p.evaluate.sweep import METRICS, SDEDIT, SDEDITS, TRUTHS, UNCHANGED
from ip2p.evaluate.truth import judge
from ip2p.models import load_clip, load_text_to_image
from ip2p.recipe import Recipe
from ip2p.workspace import Workspace


class EditScorer:
    """Makes and judges edits. One model is held at a time: rows of one model should come together.

    Args:
        workspace: where this run's editor lies.
        test: the test cases, columns sweep.TEST. Those without captions have no direction and no truth; all of them
            have captions, or none.
    """

    def __init__(self, recipe: Recipe, workspace: Workspace, test: pa.Table):
        self.recipe, self.workspace = recipe, workspace
        self.cases = {row["caption_id"]: row for row in test.to_pylist()}
        for case in self.cases.values():
            case["image"] = images.decode(case["original_image"])
        self.clip = ClipSimilarity(load_clip(recipe.models.clip, recipe.device))
        self.loaded: tuple[str, Editor | SDEdit] | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """EDITS -> METRICS, one row for each row."""
        scored = []
        for model, rows in groupby(batch.to_pylist(), key=lambda row: row["model"]):
            scored += self._score(model, list(rows))
        return pa.Table.from_pylist(scored, schema=METRICS)

    def _score(self, model: str, rows: list[dict]) -> list[dict]:
        cases = [self.cases[row["caption_id"]] for row in rows]
        results = self._edit(model, rows, cases)
        pictures = embed_images(self.clip, [case["image"] for case in cases]), embed_images(self.clip, results)
        told = cases[0]["edited_prompt"] is not None  # of a chosen image nobody knows captions
        texts = [
            self.clip.embed_texts([case[key] or "" for case in cases]) for key in ("original_prompt", "edited_prompt")
        ]
        scores = similarities(*pictures, *texts)
        wanted = ("clip_sim_image", "clip_sim_dir", "clip_sim_1") if told else ("clip_sim_image",)
        scored = [
            row | {name: scores[name][n].item() for name in wanted} | {"image": images.encode(results[n])}
            for n, row in enumerate(rows)
        ]
        if self.recipe.truth == "oracle" and told:
            truths = judge([case["image"] for case in cases], [row["instruction"] for row in rows], results)
            scored = [
                row
                | {name: getattr(truth, name) for name in TRUTHS}
                | {f"preserved_{name}": kept for name, kept in truth.kept.items()}
                for row, truth in zip(scored, truths, strict=True)
            ]
        return scored

    def _edit(self, model: str, rows: list[dict], cases: list[dict]) -> list[np.ndarray]:
        if model == UNCHANGED:
            return [case["image"] for case in cases]
        editor = self._load(model)
        if isinstance(editor, SDEdit):
            return editor.edit(
                [
                    SDEditRequest(
                        case["image"],
                        case["edited_prompt"] if model == SDEDIT else row["instruction"],
                        row["strength"],
                        row["guidance_scale"],
                        row["seed"],
                    )
                    for row, case in zip(rows, cases, strict=True)
                ]
            )
        sampling = self.recipe.sampling
        return editor.edit(
            [
                EditRequest(
                    image=case["image"],
                    instruction=row["instruction"],
                    guidance_scale=row["guidance_scale"],
                    image_guidance_scale=row["image_guidance_scale"],
                    steps=sampling.steps,
                    seed=row["seed"],
                    solver=sampling.solver,
                )
                for row, case in zip(rows, cases, strict=True)
            ]
        )

    def _load(self, model: str) -> Editor | SDEdit:
        if self.loaded is not None and self.loaded[0] == model:
            return self.loaded[1]
        self.loaded = None  # frees the memory of the one before
        recipe, size = self.recipe, self.recipe.evaluate.batch_size
        if model in SDEDITS:
            base = load_text_to_image(recipe.models.text_to_image, recipe.models.vae, recipe.device)
            editor = SDEdit(base, recipe.sampling, size)
        else:
            editor = Editor(load_editor(recipe, self.workspace, model), size, recipe.sampling.max_side)
        self.loaded = (model, editor)
        return editor


def embed_images(clip: ClipSimilarity, pictures: list[np.ndarray]) -> torch.Tensor:
    """uint8 images (H, W, 3) of any sizes -> normalised embeddings (B, D)."""
    if len({picture.shape for picture in pictures}) == 1:
        return clip.embed_images(np.stack(pictures))
    return torch.cat([clip.embed_images(picture[None]) for picture in pictures])
