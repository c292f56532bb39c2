"""The miniature Stable Diffusion: a UNet on the autoencoder's latents that listens to a text encoder."""

# diffusers, transformers and open_clip annotate less than they take and give.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from ip2p.miniature.language import describe, read_caption, vocabulary
from ip2p.miniature.models.autoencoder import (
    CHANNELS,
    SCALING_FACTOR,
    draw_scenes,
    foreground_weight,
    patch_code,
    pixels,
)
from ip2p.miniature.models.fit import Run, fit, generators, rank
from ip2p.miniature.models.text_encoder import WIDTH, draw_captions, train_text_encoder
from ip2p.miniature.models.tokenizer import build_tokenizer, tokenize
from ip2p.miniature.oracle import attribute_accuracy

DROP_TEXT = 0.1  # share of empty captions, which guidance needs


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=4,
    )


def new_scheduler() -> DDIMScheduler:
    """SD's noise schedule with v-prediction, which also learns where there is almost only noise."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def stratified_timesteps(count: int, total: int, generator: torch.Generator) -> Tensor:
    """One timestep from each of `count` equal parts of 0..total-1: the same mean as independent draws, less noise."""
    return ((torch.arange(count) + torch.rand(count, generator=generator)) * total / count).long()


def diffusion_loss(
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    images: Tensor,
    states: Tensor,
    placed: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """v-prediction error, weighted so that objects are learned sooner where their places are known: bool `placed` (B,).

    Weights that depend on what the model can only guess would move the optimum: it would put a thing at every place.
    """
    latents = patch_code(images) * SCALING_FACTOR
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    timesteps = stratified_timesteps(len(latents), 1000, generator).to(latents.device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    velocity = scheduler.get_velocity(latents, noise, timesteps)
    predicted = unet(noisy, timesteps, encoder_hidden_states=states).sample
    weight = torch.where(placed[:, None, None, None], F.max_pool2d(foreground_weight(images), 4), 1.0)
    return (weight * (predicted - velocity) ** 2).mean()


def train_text_to_image(
    out: Path, run: Run, vae: AutoencoderKL, *, text_steps: int, steps: int, batch_size: int = 32
) -> None:
    """Train the text encoder, then the UNet; writes a StableDiffusionPipeline directory in fp16 to `out`.

    The UNet learns on the autoencoder's teacher, `patch_code`; the autoencoder itself is only used to look.
    """
    tokenizer = build_tokenizer(vocabulary())
    text_encoder = train_text_encoder(run, tokenizer, steps=text_steps).eval().requires_grad_(False)
    torch.manual_seed(run.seed)
    unet, scheduler, vae = new_unet().to(run.device), new_scheduler(), vae.to(run.device)

    def pipeline(unet: nn.Module) -> StableDiffusionPipeline:
        return assemble(vae, text_encoder, tokenizer, unet, scheduler)

    def step_loss(step: int) -> Tensor:
        rng, generator = generators(run.seed, step)
        scenes = draw_scenes(rng, batch_size)
        captions = ["" if rng.random() < DROP_TEXT else caption for caption in draw_captions(rng, scenes)]
        states = text_encoder(tokenize(tokenizer, captions).to(run.device)).last_hidden_state
        placed = torch.tensor([caption != "" and "places" not in read_caption(caption).unsaid for caption in captions])
        return diffusion_loss(unet, scheduler, pixels(scenes).to(run.device), states, placed.to(run.device), generator)

    trained = fit(
        unet,
        step_loss,
        run,
        "unet",
        steps=steps,
        peak=1.5e-3,
        measure=lambda ema: measure_text_to_image(pipeline(ema), 128),
    )
    if rank() == 0:
        pipeline(trained).to(dtype=torch.float16).save_pretrained(out)


def assemble(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: nn.Module,
    scheduler: DDIMScheduler,
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.inference_mode()
def measure_text_to_image(
    pipeline: StableDiffusionPipeline, count: int, seed: int = 1, unseen: bool = False
) -> dict[str, float]:
    """What the oracle reads from images of held-out captions (20 steps, guidance 3), by attribute and exactly."""
    rng = random.Random(seed)
    scenes = draw_scenes(rng, count, kept_out=True)
    captions = [describe(scene, rng.getrandbits(32), unseen) for scene in scenes]
    generators = [torch.Generator().manual_seed(seed + index) for index in range(count)]
    pipeline.set_progress_bar_config(disable=True)
    made: list[np.ndarray] = [
        pipeline(
            captions[at : at + 64],
            height=32,
            width=32,
            num_inference_steps=20,
            guidance_scale=3.0,
            generator=generators[at : at + 64],
            output_type="np",
        ).images
        for at in range(0, count, 64)
    ]
    return attribute_accuracy(scenes, (np.concatenate(made) * 255).round().astype(np.uint8))
