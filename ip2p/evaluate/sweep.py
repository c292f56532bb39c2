"""The guidance sweep: which edits to make, and the rows that they become.

One row is one edit: (model, test image, scales or strength, seed). Every mean in the report is a mean over these rows,
and can be recomputed from `evaluation/metrics.parquet`.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import pyarrow as pa

from ip2p.edit.names import EDITORS, SHIPPED, WORKSPACE
from ip2p.errors import UserError
from ip2p.miniature.oracle import ATTRIBUTES
from ip2p.recipe import Recipe, locate
from ip2p.records import digest
from ip2p.workspace import Workspace

UNCHANGED = "unchanged"
SDEDIT, SDEDIT_INSTRUCTION = "sdedit", "sdedit_instruction"  # told the edited caption, told the instruction
SDEDITS = (SDEDIT, SDEDIT_INSTRUCTION)
TRUTHS = ("carried_out", "preserved", "valid", "success")

# A test case: what to edit, the instruction, and the two captions that CLIP compares the result with.
TEST = pa.schema(
    {
        "caption_id": pa.string(),
        "edit_kind": pa.string(),
        "instruction": pa.string(),
        "original_prompt": pa.string(),
        "edited_prompt": pa.string(),
        "original_image": pa.binary(),
        "edited_image": pa.binary(),
    }
)

EDITS = pa.schema(
    {
        "edit_id": pa.string(),
        "model": pa.string(),
        "caption_id": pa.string(),
        "edit_kind": pa.string(),
        "instruction": pa.string(),
        "guidance_scale": pa.float64(),
        "image_guidance_scale": pa.float64(),
        "strength": pa.float64(),
        "seed": pa.int64(),
        "draw": pa.int32(),  # 0 to evaluate.seeds - 1: which of the image's seeds it is
    }
)

# Truth is null where there is none; preserved_<attribute> also where the edit leaves none of them alone.
METRICS = pa.schema(
    [
        *EDITS,
        *pa.schema(
            {
                "clip_sim_image": pa.float32(),
                "clip_sim_dir": pa.float32(),
                "clip_sim_1": pa.float32(),
                **dict.fromkeys(TRUTHS, pa.bool_()),
                **{f"preserved_{name}": pa.bool_() for name in ATTRIBUTES},
                "image": pa.binary(),
            }
        ),
    ]
)


def is_editor(model: str) -> bool:
    """Whether it is told the instruction and has the two scales; the others are baselines."""
    return model not in (*SDEDITS, UNCHANGED)


def editors_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The editors among the rows' models: that of the run, the shipped one, then the others by name."""
    there = {row["model"] for row in rows if is_editor(row["model"])}
    return [*(model for model in EDITORS if model in there), *sorted(there - {*EDITORS})]


def shown_editor(editors: Sequence[str]) -> str:
    """Whose grid of scales is shown: the shipped one's where it is there, else the first one's."""
    return SHIPPED if SHIPPED in editors else editors[0]


def curve_scales(recipe: Recipe) -> list[tuple[float, float]]:
    """The (s_T, s_I) at which every test image is edited: each swept, the other fixed; and the sampling defaults."""
    sweep = recipe.evaluate
    points = {(sweep.fixed_guidance_scale, s_image) for s_image in sweep.image_guidance_scale}
    points |= {(s_text, sweep.fixed_image_guidance_scale) for s_text in sweep.guidance_scale}
    return sorted(points | {(recipe.sampling.guidance_scale, recipe.sampling.image_guidance_scale)})


def grid_scales(recipe: Recipe) -> list[tuple[float, float]]:
    """All (s_T, s_I) of the two sweeps' product: the paper's David figure."""
    return sorted(product(recipe.evaluate.guidance_scale, recipe.evaluate.image_guidance_scale))


def plan_edits(recipe: Recipe, test: pa.Table, editors: list[str]) -> pa.Table:
    """All edits of an evaluation as a table of EDITS, one model after the other.

    A test image has the same seeds, so the same noise, under every model and scale: differences between them are
    paired. The first `evaluate.grid_images` images are edited at the whole grid of scales.
    """
    rows = []
    cases = test.select(["caption_id", "edit_kind", "instruction"]).to_pylist()
    seeds = range(recipe.evaluate.seeds)
    for model in editors:
        for n, case in enumerate(cases):
            scales = curve_scales(recipe)
            if n < recipe.evaluate.grid_images:
                scales = sorted({*scales, *grid_scales(recipe)})
            rows += [_edit(recipe, model, case, *at, draw=k) for at, k in product(scales, seeds)]
    rows += [_edit(recipe, UNCHANGED, case) for case in cases]
    # Text to image is done at the middle of the scales that pairs are made at.
    s_text = sum(recipe.pairs.guidance_scale) / 2
    rows += [
        _edit(recipe, model, case, s_text, strength=strength, draw=k)
        for model in SDEDITS
        for case in cases
        for strength, k in product(recipe.evaluate.sdedit_strengths, seeds)
    ]
    return pa.Table.from_pylist(rows, schema=EDITS)


def plan_grid(recipe: Recipe, case: pa.Table, editor: str) -> pa.Table:
    """Edits of one image, `case`, at the whole grid of scales, as a table of EDITS."""
    (chosen,) = case.select(["caption_id", "edit_kind", "instruction"]).to_pylist()
    rows = [_edit(recipe, editor, chosen, *at) for at in grid_scales(recipe)]
    return pa.Table.from_pylist(rows, schema=EDITS)


def _edit(
    recipe: Recipe,
    model: str,
    case: dict[str, Any],
    guidance_scale: float | None = None,
    image_guidance_scale: float | None = None,
    strength: float | None = None,
    draw: int = 0,
) -> dict[str, Any]:
    """A row of EDITS."""
    seed = digest("evaluate", recipe.seed, case["caption_id"], draw)
    settings = (guidance_scale, image_guidance_scale, strength)
    edit_id = f"{digest('edit', model, case['caption_id'], case['instruction'], *map(str, settings), seed):016x}"
    values = (edit_id, model, case["caption_id"], case["edit_kind"], case["instruction"], *settings, seed, draw)
    return dict(zip(EDITS.names, values, strict=True))


def check_others(recipe: Recipe) -> None:
    """Raises `UserError`, naming the key, for an editor of `evaluate.models` that is not there, or a name taken."""
    for name, other in recipe.evaluate.models.items():
        key = f"evaluate.models.{name}"
        if name in (WORKSPACE, SHIPPED, UNCHANGED, *SDEDITS):
            raise UserError(f"{key}: the name is taken, choose another one")
        if other.path is not None:
            locate(other.path, f"{key}.path")
        elif other.workspace is not None and not Workspace(other.workspace).done("model"):
            raise UserError(f"{key}.workspace: {other.workspace} has no trained model; run jobs.train on it")
