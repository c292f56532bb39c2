"""The miniature editor, which `make reproduce` trains as the paper does: how it is shipped, and what it can do."""

# diffusers, transformers and open_clip annotate less than they take and give.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)

from ip2p.miniature.edits import EDIT_KINDS
from ip2p.miniature.models.autoencoder import pixels
from ip2p.miniature.oracle import Judgement, judge_images
from ip2p.miniature.render import render_batch
from ip2p.miniature.triplets import draw_triplet


def ship_editor(model: Path, out: Path) -> None:
    """Write the UNet that `make reproduce` trained to `model` (a diffusers directory) to `out`, in fp16.

    All else of the shipped editor is the text-to-image model's, by links. Raises `ValueError` when there is no model.
    """
    if not (model / "unet").is_dir():
        raise ValueError(f"{model} holds no trained editor: run make reproduce there first")
    unet = UNet2DConditionModel.from_pretrained(model / "unet").half()
    unet.register_to_config(_name_or_path="")  # where it lay is nobody's business
    unet.save_pretrained(out / "unet")


@torch.inference_mode()
def measure_editor(
    editor: StableDiffusionInstructPix2PixPipeline,
    count: int,
    seed: int = 1,
    *,
    guidance_scale: float = 4.0,
    image_guidance_scale: float = 2.0,
) -> dict[str, float]:
    """What the oracle says of `count` edits of held-out scenes in unseen wordings (16 steps), all kinds in turn.

    Rates of `carried_out`, `preserved` and `success` (both, in a valid scene), and `success.<kind>`.
    """
    rng = random.Random(seed)
    kinds = [EDIT_KINDS[n % len(EDIT_KINDS)] for n in range(count)]
    drawn = [draw_triplet(rng, kind, unseen=True, held_out=True) for kind in kinds]
    sources = render_batch([triplet.scene for triplet in drawn])
    instructions = [triplet.instruction for triplet in drawn]
    editor.set_progress_bar_config(disable=True)
    results: list[np.ndarray] = [
        editor(
            instructions[at : at + 64],
            image=pixels([triplet.scene for triplet in drawn[at : at + 64]]),
            num_inference_steps=16,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            generator=[torch.Generator().manual_seed(seed + n) for n in range(at, min(at + 64, count))],
            output_type="np",
        ).images
        for at in range(0, count, 64)
    ]
    made = (np.concatenate(results) * 255).round().astype(np.uint8)
    judged = [judgement for judgement in judge_images(sources, instructions, made) if isinstance(judgement, Judgement)]
    assert len(judged) == count  # these are renderings
    rates = {
        name: float(np.mean([getattr(judgement, name) for judgement in judged]))
        for name in ("carried_out", "preserved", "success")
    }
    for kind in EDIT_KINDS:
        hits = [judgement.success for judgement, of in zip(judged, kinds, strict=True) if of == kind]
        rates[f"success.{kind}"] = float(np.mean(hits))
    return rates
