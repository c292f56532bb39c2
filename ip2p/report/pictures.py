"""What the report shows as pictures: contact sheets, the grid of the two scales, models side by side."""

import base64

import pyarrow.compute as pc
import pyarrow.dataset as pads

from ip2p import images
from ip2p.evaluate.sweep import SDEDITS, editors_of, shown_editor
from ip2p.pairs.filter import ACCEPTED, SURPLUS
from ip2p.recipe import Recipe
from ip2p.records import digest
from ip2p.report.summary import Row, default_rows, name_of
from ip2p.workspace import Workspace

SHOWN_PAIRS, SHOWN_REJECTS, SHOWN_FAILURES, SHOWN_CASES = 24, 12, 12, 12
PIXEL_ART = 64  # px: images up to this size are enlarged with hard edges
LARGEST = 256  # px: larger images are shown smaller, so that the report stays a file one can mail


def picture(data: bytes) -> dict:
    """An image for the page: {uri, pixels (whether to enlarge it with hard edges)}."""
    image = images.decode(data)
    height, width = image.shape[:2]
    if max(height, width) <= LARGEST:
        return {"uri": data_uri(images.encode(image, "png"), "png"), "pixels": max(height, width) <= PIXEL_ART}
    scale = LARGEST / max(height, width)
    small = images.resize(image, round(height * scale), round(width * scale))
    return {"uri": data_uri(images.encode(small, "jpeg"), "jpeg"), "pixels": False}


def data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def read_captions(workspace: Workspace, ids: list[str], *folder: str) -> list[Row]:
    """The rows of some captions; the other rows, which hold images, are not kept in memory."""
    table = pads.dataset(workspace.path(*folder), filesystem=workspace.fs, format="parquet")
    return table.to_table(filter=pc.field("caption_id").isin(ids)).to_pylist()


def accepted_pairs(workspace: Workspace) -> list[dict]:
    """The best pair of each of SHOWN_PAIRS captions, the captions in the order of a hash."""
    if not workspace.exists("pairs"):
        return []
    table = workspace.read_table("pairs", columns=["caption_id", "status"])
    ids = table.filter(pc.equal(table["status"], "ok"))["caption_id"].to_pylist()  # pyright: ignore
    chosen = sorted(ids, key=in_order)[:SHOWN_PAIRS]
    rows = sorted(read_captions(workspace, chosen, "pairs"), key=lambda row: in_order(row["caption_id"]))
    return [pair_view(row, row["pairs"][0], tags=[]) for row in rows]


def rejected_pairs(workspace: Workspace) -> list[dict]:
    """A rejected candidate of each of SHOWN_REJECTS captions whose rejects were kept, in the order of a hash."""
    if not workspace.exists("pairs"):
        return []
    # The verdicts alone: the column holds images.
    table = workspace.read_table("pairs", columns=["caption_id", "rejects.list.element.verdict"])
    kept = table.filter(pc.greater(pc.list_value_length(table["rejects"]), 0))  # pyright: ignore
    chosen = sorted(kept["caption_id"].to_pylist(), key=in_order)[:SHOWN_REJECTS]
    rows = sorted(read_captions(workspace, chosen, "pairs"), key=lambda row: in_order(row["caption_id"]))
    return [pair_view(row, row["rejects"][0], [(row["rejects"][0]["verdict"], False)]) for row in rows]


def in_order(caption_id: str) -> int:
    return digest("shown", caption_id)


def failed_candidates(workspace: Workspace) -> list[dict]:
    """Candidates made with attention sharing that the oracle found wrong; those that the filter let through first."""
    if not workspace.exists("evaluation", "pair_truth.parquet"):
        return []
    wrong = [
        (row, candidate)
        for row in workspace.read_table("evaluation", "pair_truth.parquet").to_pylist()
        for candidate in row["candidates"]
        if candidate["shared"] and not candidate["success"]
    ]
    wrong.sort(key=lambda pair: digest("failure", pair[1]["seed"]))
    # One of each caption on either side: the same mistake again tells nothing.
    through = {row["caption_id"]: (row, c) for row, c in wrong if c["verdict"] == ACCEPTED}
    refused = {row["caption_id"]: (row, c) for row, c in wrong if c["verdict"] not in (ACCEPTED, SURPLUS)}
    shown = list(through.values())[: SHOWN_FAILURES // 2]
    shown += list(refused.values())[: SHOWN_FAILURES - len(shown)]
    return [pair_view(row, candidate, failure_tags(candidate)) for row, candidate in shown]


def failure_tags(candidate: Row) -> list[tuple[str, bool]]:
    """(text, is it good?) of a candidate that the oracle judged."""
    if not candidate["valid"]:
        found = [("not a valid scene", False)]
    else:
        found = [
            ("carried out" if candidate["carried_out"] else "not carried out", candidate["carried_out"]),
            ("rest preserved" if candidate["preserved"] else "rest changed", candidate["preserved"]),
        ]
    accepted = candidate["verdict"] == ACCEPTED
    return [*found, ("filter: let through" if accepted else f"filter: {candidate['verdict']}", not accepted)]


def pair_view(row: Row, pair: Row, tags: list[tuple[str, bool]]) -> dict:
    texts = {key: row[key] for key in ("original_prompt", "edit_prompt", "edited_prompt")}
    pictures = {"before": picture(pair["original_image"]), "after": picture(pair["edited_image"])}
    mask = picture(pair["mask"]) if pair.get("mask") else None
    return {**pair, **texts, **pictures, "mask": mask, "tags": tags}


def judged_cases(recipe: Recipe, workspace: Workspace) -> list[dict]:
    """What the judge said of the test images that are shown, of the editor whose grid is shown."""
    if not workspace.exists("evaluation", "judged.parquet"):
        return []
    ids = [case["caption_id"] for case in test_cases(workspace)]
    judged = read_captions(workspace, ids, "evaluation", "judged.parquet")
    images = {row["edit_id"]: row["image"] for row in shown_rows(workspace)}
    sources = {case["caption_id"]: case["original_image"] for case in test_cases(workspace)}
    models = editors_of(judged)
    rows = default_rows(recipe, judged, shown_editor(models))[1] if models else []
    return [
        row | {"source": picture(sources[row["caption_id"]]), "edited": picture(images[row["edit_id"]])}
        for row in sorted(rows, key=lambda row: (ids.index(row["caption_id"]), row["draw"]))
        if row["draw"] == 0
    ]


def test_cases(workspace: Workspace) -> list[Row]:
    """The test images that are shown."""
    return workspace.read_table("evaluation", "test").slice(0, SHOWN_CASES).to_pylist()


def shown_rows(workspace: Workspace) -> list[Row]:
    """The metric rows of the test images that are shown, with the edited images."""
    if not workspace.exists("evaluation", "metrics.parquet"):
        return []
    ids = [case["caption_id"] for case in test_cases(workspace)]
    return read_captions(workspace, ids, "evaluation", "metrics.parquet")


def guidance_grids(recipe: Recipe, workspace: Workspace, rows: list[Row]) -> list[dict]:
    """The s_I x s_T grid of the image that the recipe names, and of each grid image, by `shown_editor`."""
    grids = []
    if workspace.exists("evaluation", "grid.parquet"):
        (case,) = workspace.read_table("evaluation", "chosen").to_pylist()
        made = workspace.read_table("evaluation", "grid.parquet").to_pylist()
        grids.append(guidance_grid(recipe, case, made))
    if models := editors_of(rows):
        shown = shown_editor(models)
        for case in test_cases(workspace)[: recipe.evaluate.grid_images]:
            mine = [row for row in rows if row["model"] == shown and row["caption_id"] == case["caption_id"]]
            grids.append(guidance_grid(recipe, case, mine))
    return grids


def guidance_grid(recipe: Recipe, case: Row, rows: list[Row]) -> dict:
    """The grid of one image from its `rows`, all of one editor."""
    s_texts, s_images = sorted(recipe.evaluate.guidance_scale), sorted(recipe.evaluate.image_guidance_scale)
    # Rows come in any order; of several seeds the smallest is shown, the same everywhere.
    rows = sorted(rows, key=lambda row: row["seed"], reverse=True)
    at = {(row["guidance_scale"], row["image_guidance_scale"]): row["image"] for row in rows}
    return {
        "instruction": case["instruction"],
        "model": name_of(rows[0]["model"]),
        "seed": rows[-1]["seed"],
        "source": picture(case["original_image"]),
        "image_guidance": s_images,
        "rows": [(s_text, [picture(at[s_text, s_image]) for s_image in s_images]) for s_text in s_texts],
    }


def comparison(recipe: Recipe, workspace: Workspace, rows: list[Row]) -> dict | None:
    """Test images under every model that makes something, side by side."""
    models = [*editors_of(rows), *(model for model in SDEDITS if any(row["model"] == model for row in rows))]
    if not models:
        return None
    by_model = [{row["caption_id"]: row for row in default_rows(recipe, rows, model)[1]} for model in models]
    cases = [
        {
            **{key: case[key] for key in ("instruction", "edit_kind")},
            "source": picture(case["original_image"]),
            "target": picture(case["edited_image"]),
            "cells": [cell(made[case["caption_id"]]) for made in by_model],
        }
        for case in test_cases(workspace)
    ]
    return {"models": [name_of(model) for model in models], "cases": cases}


def cell(row: Row) -> dict:
    if row["success"]:
        text = "right"
    elif row["valid"] is False:
        text = "no valid scene"
    else:
        text = "rest changed" if row["carried_out"] else "not carried out"
    return {"image": picture(row["image"]), "success": row["success"], "text": text}
