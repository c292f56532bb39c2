"""The miniature editor: the text-to-image UNet, widened, taught on rendered edits of drawn scenes.

`jobs.train` fine-tunes on generated pairs, as the paper does. This is the same model taught on the truth, without
end: the editor that ships, and the yardstick for what generated pairs can reach.
"""

# diffusers, transformers and open_clip annotate less than they take and give.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from torch.nn import functional as F

from ip2p.miniature.autoencoder import SCALING_FACTOR, foreground_weight, patch_code, pixels
from ip2p.miniature.edits import EDIT_KINDS
from ip2p.miniature.fit import Run, fit, generators, rank
from ip2p.miniature.oracle import Judgement, judge_images
from ip2p.miniature.render import render_batch
from ip2p.miniature.text_to_image import stratified_timesteps
from ip2p.miniature.tokenizer import tokenize
from ip2p.miniature.triplets import draw_triplet
from ip2p.train.dropout import dropout_masks
from ip2p.train.unet import widen_conv_in

DROPOUT = (0.05, 0.05, 0.05)  # text, image, both: the paper's


def train_editor(out: Path, run: Run, base: StableDiffusionPipeline, *, steps: int, batch_size: int = 32) -> None:
    """Widen and train `base`; writes a StableDiffusionInstructPix2PixPipeline directory in fp16 to `out`.

    The text encoder stays as it is: it has learned to read instructions.
    """
    torch.manual_seed(run.seed)
    widen_conv_in(base.unet)
    base.to(run.device)
    vae: AutoencoderKL = base.vae.eval().requires_grad_(False)
    unet: UNet2DConditionModel = base.unet
    base.text_encoder.eval().requires_grad_(False)

    def step_loss(step: int) -> Tensor:
        rng, generator = generators(run.seed, step)
        drawn = [draw_triplet(rng, held_out=False) for _ in range(batch_size)]
        before = pixels([triplet.scene for triplet in drawn]).to(run.device)
        after = pixels([triplet.edited_scene for triplet in drawn]).to(run.device)
        no_text, no_image = dropout_masks(torch.rand(batch_size, generator=generator), *DROPOUT)
        texts = ["" if drop else edit.instruction for edit, drop in zip(drawn, no_text.tolist(), strict=True)]
        states = base.text_encoder(tokenize(base.tokenizer, texts).to(run.device)).last_hidden_state
        with torch.no_grad():
            image_latents = vae.encode(before).latent_dist.mode()
        image_latents = image_latents * ~no_image.to(run.device)[:, None, None, None]
        latents = patch_code(after) * SCALING_FACTOR
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        timesteps = stratified_timesteps(batch_size, 1000, generator).to(run.device)
        noisy = base.scheduler.add_noise(latents, noise, timesteps)
        velocity = base.scheduler.get_velocity(latents, noise, timesteps)
        predicted = unet(torch.cat([noisy, image_latents], 1), timesteps, encoder_hidden_states=states).sample
        # Where the source has objects, which the model sees. A weight on what changes, which it has to find out, would
        # teach it to change too much.
        weight = F.max_pool2d(foreground_weight(before), 4)
        return (weight * (predicted - velocity) ** 2).mean()

    def pipeline(unet: nn.Module) -> StableDiffusionInstructPix2PixPipeline:
        return StableDiffusionInstructPix2PixPipeline(
            vae=vae,
            text_encoder=base.text_encoder,
            tokenizer=base.tokenizer,
            unet=unet,
            scheduler=base.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def measure(ema: nn.Module) -> dict[str, float]:
        rates = measure_editor(pipeline(ema), 120)
        return {name: rate for name, rate in rates.items() if "." not in name}

    trained = fit(unet, step_loss, run, "editor", steps=steps, peak=1e-3, measure=measure)
    if rank() == 0:
        pipeline(trained).to(dtype=torch.float16).save_pretrained(out)


@torch.inference_mode()
def measure_editor(
    editor: StableDiffusionInstructPix2PixPipeline,
    count: int,
    seed: int = 1,
    *,
    guidance_scale: float = 2.0,
    image_guidance_scale: float = 1.5,
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
