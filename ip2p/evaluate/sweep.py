"""The guidance sweep: which edits to make, and the rows that they become.

One row is one edit: (model, test image, scales or strength, seed). Every mean in the report is a mean over these rows,
and can be recomputed from `evaluation/metrics.parquet`.
"""

from itertools import product

import pyarrow as pa

from ip2p.recipe import Recipe
from ip2p.records import digest

WORKSPACE, SHIPPED, UNCHANGED = "workspace", "shipped", "unchanged"
SDEDIT, SDEDIT_INSTRUCTION = "sdedit", "sdedit_instruction"  # told the edited caption, told the instruction
EDITORS = (WORKSPACE, SHIPPED)
SDEDITS = (SDEDIT, SDEDIT_INSTRUCTION)

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
    }
)

METRICS = pa.schema(
    [
        *EDITS,
        *pa.schema(
            {
                "clip_sim_image": pa.float32(),
                "clip_sim_dir": pa.float32(),
                "clip_sim_1": pa.float32(),
                "carried_out": pa.bool_(),
                "preserved": pa.bool_(),
                "valid": pa.bool_(),
                "success": pa.bool_(),
                "image": pa.binary(),
            }
        ),
    ]
)


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

    def add(model: str, case: dict, guidance_scale=None, image_guidance_scale=None, strength=None, k: int = 0) -> None:
        seed = digest("evaluate", recipe.seed, case["caption_id"], k)
        settings = (guidance_scale, image_guidance_scale, strength)
        edit_id = f"{digest('edit', model, case['caption_id'], case['instruction'], *map(str, settings), seed):016x}"
        rows.append((edit_id, model, case["caption_id"], case["edit_kind"], case["instruction"], *settings, seed))

    cases = test.select(["caption_id", "edit_kind", "instruction"]).to_pylist()
    seeds = range(recipe.evaluate.seeds)
    for model in editors:
        for n, case in enumerate(cases):
            scales = curve_scales(recipe)
            if n < recipe.evaluate.grid_images:
                scales = sorted({*scales, *grid_scales(recipe)})
            for (s_text, s_image), k in product(scales, seeds):
                add(model, case, s_text, s_image, k=k)
    for case in cases:
        add(UNCHANGED, case)
    # Text to image is done at the middle of the scales that pairs are made at.
    s_text = sum(recipe.pairs.guidance_scale) / 2
    for model in SDEDITS:
        for case in cases:
            for strength, k in product(recipe.evaluate.sdedit_strengths, seeds):
                add(model, case, s_text, strength=strength, k=k)
    return pa.Table.from_arrays(
        [pa.array(column, field.type) for column, field in zip(zip(*rows), EDITS)], schema=EDITS
    )
