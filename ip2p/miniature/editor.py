"""The miniature editor: the text-to-image UNet, widened, taught on rendered edits of drawn scenes.

`jobs.train` fine-tunes on generated pairs, as the paper does. This is the same model taught on the truth, without
end: the editor that ships, and the yardstick for what generated pairs can reach.
"""

# diffusers, transformers and open_clip annotate less than they take and give.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional as F

from ip2p.miniature.autoencoder import SCALING_FACTOR, foreground_weight, patch_code, pixels
from ip2p.miniature.edits import EDIT_KINDS, apply_edit, draw_edit, draw_scene_for, phrase
from ip2p.miniature.fit import Run, fit, generators, rank
from ip2p.miniature.scene import Scene, held_out
from ip2p.miniature.text_to_image import stratified_timesteps
from ip2p.miniature.tokenizer import tokenize
from ip2p.train.dropout import dropout_masks
from ip2p.train.unet import widen_conv_in

DROPOUT = (0.05, 0.05, 0.05)  # text, image, both: the paper's


def draw_edits(rng: random.Random, count: int) -> tuple[list[Scene], list[str], list[Scene]]:
    """Draw scenes outside the held-out part, an instruction for each, and the edited scenes; kinds of edit balanced."""
    sources, instructions, targets = [], [], []
    while len(sources) < count:
        kind = rng.choice(EDIT_KINDS)
        source = draw_scene_for(kind, rng)
        edit = draw_edit(source, rng, kind)
        target = apply_edit(edit, source)
        if held_out(source) or held_out(target):
            continue
        sources.append(source)
        instructions.append(phrase(edit, source, rng))
        targets.append(target)
    return sources, instructions, targets


def train_editor(out: Path, run: Run, base: StableDiffusionPipeline, *, steps: int, batch_size: int = 32) -> None:
    """Widen and train `base`; writes a StableDiffusionInstructPix2PixPipeline directory in fp16 to `out`.

    The text encoder learns along: unlike Stable Diffusion's, it has never seen the words of an instruction.
    """
    torch.manual_seed(run.seed)
    widen_conv_in(base.unet)
    base.to(run.device)
    vae: AutoencoderKL = base.vae.eval().requires_grad_(False)
    model = nn.ModuleDict({"unet": base.unet.train(), "text_encoder": base.text_encoder.train()})

    def step_loss(step: int) -> Tensor:
        rng, generator = generators(run.seed, step)
        sources, instructions, targets = draw_edits(rng, batch_size)
        before, after = pixels(sources).to(run.device), pixels(targets).to(run.device)
        no_text, no_image = dropout_masks(torch.rand(batch_size, generator=generator), *DROPOUT)
        texts = ["" if drop else text for text, drop in zip(instructions, no_text.tolist(), strict=True)]
        states = base.text_encoder(tokenize(base.tokenizer, texts).to(run.device)).last_hidden_state
        with torch.no_grad():
            image_latents = vae.encode(before).latent_dist.mode()
        image_latents = image_latents * ~no_image.to(run.device)[:, None, None, None]
        latents = patch_code(after) * SCALING_FACTOR
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        timesteps = stratified_timesteps(batch_size, 1000, generator).to(run.device)
        noisy = base.scheduler.add_noise(latents, noise, timesteps)
        velocity = base.scheduler.get_velocity(latents, noise, timesteps)
        predicted = base.unet(torch.cat([noisy, image_latents], 1), timesteps, encoder_hidden_states=states).sample
        # What the edit changes is a small part of the image and the whole point of it.
        changed = ((before - after).abs().amax(1, keepdim=True) > 0.05).float()
        weight = F.max_pool2d(foreground_weight(after) + 1.5 * changed, 4)
        return (weight * (predicted - velocity) ** 2).mean()

    trained = fit(model, step_loss, run, "editor", steps=steps, peak=1e-3)
    assert isinstance(trained, nn.ModuleDict)
    if rank() == 0:
        editor = StableDiffusionInstructPix2PixPipeline(
            vae=vae,
            text_encoder=trained["text_encoder"],
            tokenizer=base.tokenizer,
            unet=trained["unet"],
            scheduler=base.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        editor.to(dtype=torch.float16).save_pretrained(out)
