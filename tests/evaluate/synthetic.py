"""A workspace as the five stages leave it, made of rendered scenes and a known random success, without any model."""

import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ip2p import images
from ip2p.edit.names import EDITORS
from ip2p.evaluate.pair_truth import PAIR_TRUTH
from ip2p.evaluate.sweep import METRICS, SDEDIT, SDEDIT_INSTRUCTION, UNCHANGED, plan_edits
from ip2p.evaluate.truth import rendered_cases
from ip2p.miniature.oracle import ATTRIBUTES
from ip2p.miniature.render import render
from ip2p.miniature.triplets import draw_triplet
from ip2p.recipe import Recipe
from ip2p.records import DATASET, INSTRUCTIONS, PAIRS, caption_id
from ip2p.workspace import Workspace

SKILL = {"workspace": 0.3, "shipped": 0.8, UNCHANGED: 0.0, SDEDIT: 0.2, SDEDIT_INSTRUCTION: 0.1}


def make_recipe(**sections) -> Recipe:
    models = {
        "text_to_image": {"path": "nowhere/t2i"},
        "clip": {"name": "local-dir:nowhere"},
        "llm": {"path": "nowhere/llm"},
        "editor": {"path": "nowhere/editor"},
    }
    base = {"name": "synthetic", "truth": "oracle", "models": models, "captions": {"kind": "grammar"}}
    return Recipe.model_validate(base | sections)


def write(workspace: Workspace, table: pa.Table, *parts: str) -> None:
    with workspace.open_out(*parts) as file:
        pq.write_table(table, file)


def make_workspace(root, recipe: Recipe, captions: int = 40) -> Workspace:
    """Captions, instructions, pairs, dataset and evaluation, all tables with the real schemas."""
    workspace, rng = Workspace(str(root)), random.Random(0)
    rows = [draw_triplet(rng) for _ in range(captions)]
    _write_pairs(workspace, rows, rng)
    _write_pair_truth(workspace, rows, rng)
    _write_metrics(workspace, recipe, rng)
    curve = [
        {"step": k, "loss": 0.3 / k**0.3, "validation_loss": 0.3 / k**0.3 if k % 100 == 0 else None}
        for k in range(10, 410, 10)
    ]
    write(workspace, pa.Table.from_pylist(curve), "model", "training.parquet")
    for stage, seconds in {"edit_captions": 55.2, "generate_pairs": 301.0, "train": 240.0, "evaluate": 199.9}.items():
        workspace.record(stage, seconds=seconds)
    return workspace


def noisy(image: np.ndarray, rng: random.Random, sigma: float = 6) -> bytes:
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, sigma, image.shape)
    return images.encode(np.clip(image + noise, 0, 255).astype(np.uint8))


def scores(rng: random.Random, verdict: str) -> dict:
    return {
        "seed": rng.getrandbits(62),
        "shared_attention_fraction": rng.uniform(0.1, 0.9),
        "guidance_scale": rng.uniform(2, 5),
        "clip_sim_0": rng.uniform(0.4, 0.8),
        "clip_sim_1": rng.uniform(0.4, 0.8),
        "clip_sim_dir": rng.uniform(0.2, 0.7),
        "clip_sim_image": rng.uniform(0.5, 0.9),
        "verdict": verdict,
    }


def _write_pairs(workspace: Workspace, triplets, rng: random.Random) -> None:
    instructions, pairs, examples = [], [], []
    for n, triplet in enumerate(triplets):
        caption, instruction, edited = triplet[:3]
        ok = n % 8 != 0
        row = {
            "caption_id": caption_id(caption),
            "original_prompt": caption,
            "edit_prompt": instruction if ok else "",
            "edited_prompt": edited if ok else "",
            "status": "ok" if ok else "rejected",
            "reason": "" if ok else rng.choice(["the edited caption is the caption", "no JSON"]),
            "edit_type": triplet.edit.kind if ok else "",
            "attempts": 1 + n % 2,
        }
        instructions.append(row)
        verdicts = (
            rng.choices(["accepted", "image < 0.5", "direction < 0.5", "surplus"], (5, 2, 2, 1), k=6) if ok else []
        )
        before, after = render(triplet.scene), render(triplet.edited_scene)
        candidates = [scores(rng, verdict) for verdict in verdicts]
        kept, refused = (
            [
                c | {"original_image": noisy(before, rng), "edited_image": noisy(after if accepted else before, rng)}
                for c in candidates
                if (c["verdict"] == "accepted") == accepted and c["verdict"] != "surplus"
            ][:4]
            for accepted in (True, False)
        )
        status = {} if kept or not ok else {"status": "rejected", "reason": "direction < 0.5: 6"}
        made = {
            "candidates": candidates,
            "pairs": kept,
            "rejects": refused if n % 2 else [],
            "unet_samples": 960,
            "seconds": 1.5,
        }
        pairs.append(row | status | made)
        for pair in kept:
            pictures = {k: {"bytes": pair[k], "path": None} for k in ("original_image", "edited_image")}
            examples.append(
                {k: row.get(k, pair.get(k)) for k in DATASET.names} | {"pair_id": f"{pair['seed']:x}"} | pictures
            )
    write(workspace, pa.Table.from_pylist(instructions, schema=INSTRUCTIONS), "instructions", "0.parquet")
    write(workspace, pa.Table.from_pylist(pairs, schema=PAIRS), "pairs", "0.parquet")
    table = pa.Table.from_pylist(examples, schema=DATASET)
    kept = min(80, table.num_rows * 4 // 5)
    write(workspace, table.slice(0, kept), "dataset", "train", "0.parquet")
    write(workspace, table.slice(kept), "dataset", "validation", "0.parquet")


def _write_pair_truth(workspace: Workspace, triplets, rng: random.Random) -> None:
    rows = []
    for triplet in triplets:
        caption, instruction, edited = triplet[:3]
        before, after = render(triplet.scene), render(triplet.edited_scene)
        candidates = []
        for shared in (False, True):
            for _ in range(4):
                right = rng.random() < (0.6 if shared else 0.4)
                accepted = rng.random() < (0.7 if right else 0.3)
                candidates.append(
                    scores(rng, "accepted" if accepted else "direction < 0.5")
                    | {"shared": shared, "carried_out": right, "preserved": right or rng.random() < 0.5, "valid": True}
                    | {"success": right, "original_image": noisy(before, rng)}
                    | {"edited_image": noisy(after if right else before[::-1], rng)}
                )
        texts = {"original_prompt": caption, "edit_prompt": instruction, "edited_prompt": edited}
        rows.append(
            {"caption_id": caption_id(caption), "edit_kind": triplet.edit.kind, **texts, "candidates": candidates}
        )
    write(workspace, pa.Table.from_pylist(rows, schema=PAIR_TRUTH), "evaluation", "pair_truth.parquet", "0.parquet")


def _write_metrics(workspace: Workspace, recipe: Recipe, rng: random.Random) -> None:
    test = rendered_cases(recipe)
    cases = {row["caption_id"]: row for row in test.to_pylist()}
    rows = []
    for row in plan_edits(recipe, test, list(EDITORS)).to_pylist():
        case = cases[row["caption_id"]]
        right = rng.random() < SKILL[row["model"]]
        s_text, s_image = row["guidance_scale"] or 0, row["image_guidance_scale"] or 0
        result = images.decode(case["edited_image" if right else "original_image"])
        rows.append(
            row
            | {
                "clip_sim_image": 0.4 + 0.12 * s_image - 0.02 * s_text + rng.gauss(0, 0.05),
                "clip_sim_dir": 0.1 + 0.04 * s_text - 0.05 * s_image + rng.gauss(0, 0.05),
                "clip_sim_1": 0.5,
                "carried_out": right,
                "preserved": right or row["model"] == UNCHANGED,
                "valid": True,
                "success": right,
                **{f"preserved_{name}": right or rng.random() < 0.5 for name in ATTRIBUTES},
                "image": noisy(result, rng),
            }
        )
    write(workspace, test, "evaluation", "test", "0.parquet")
    write(workspace, pa.Table.from_pylist(rows, schema=METRICS), "evaluation", "metrics.parquet", "0.parquet")
