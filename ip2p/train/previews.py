"""Edits of a few fixed pairs while a model is trained: what a person looks at to see whether it learns."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ip2p import images
from ip2p.edit.editor import Editor, EditRequest
from ip2p.errors import UserError
from ip2p.models import TextToImage
from ip2p.recipe import Recipe
from ip2p.train.encode import IMAGES, image_bytes, square


def is_readable(row: dict[str, Any]) -> bool:
    """Whether both images of a dataset's row can be shown; training has counted and named those that can't."""
    try:
        for key in IMAGES:
            images.decode(image_bytes(row, key))
    except UserError:
        return False
    return True


def contact_sheet(model: TextToImage, rows: Sequence[dict[str, Any]], recipe: Recipe) -> np.ndarray:
    """uint8 (N side, 3 side, 3): for each row of a dataset the image, what `model` makes of it, and the edited image.

    The model is left as it is, also in how its attention is computed.
    """
    side, sampling = recipe.train.resolution, recipe.sampling
    before, after = ([square(images.decode(image_bytes(row, key)), side) for row in rows] for key in IMAGES)
    requests = [
        EditRequest(
            image=image,
            instruction=row["edit_prompt"],
            guidance_scale=sampling.guidance_scale,
            image_guidance_scale=sampling.image_guidance_scale,
            steps=sampling.steps,
            seed=recipe.seed,
            solver=sampling.solver,
        )
        for image, row in zip(before, rows, strict=True)
    ]
    processors = model.unet.attn_processors
    edited = Editor(model, max_side=side).edit(requests)
    model.unet.set_attn_processor(processors)
    return np.concatenate([np.concatenate(row, axis=1) for row in zip(before, edited, after, strict=True)])
