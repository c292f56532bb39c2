"""The miniature AutoencoderKL: 32 px images <-> latents (16, 8, 8).

Its latents are not found by chance: the encoder is taught the closed-form code of `patch_code`, whose axes are known,
so the diffusion model can be trained on that code while the autoencoder is still learning to decode it.
"""

# diffusers, transformers and open_clip annotate less than they take and give.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false

import random
from functools import cache
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from ip2p.miniature.models.fit import Run, fit, generators, rank
from ip2p.miniature.oracle import attribute_accuracy
from ip2p.miniature.render import render_batch
from ip2p.miniature.scene import Scene, draw_scene, held_out

CHANNELS, PATCH = 16, 4
SCALING_FACTOR = 0.5


def draw_scenes(rng: random.Random, count: int, kept_out: bool = False) -> list[Scene]:
    """Draw `count` scenes, either all from the training part of the world or all from the held-out part."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = draw_scene(rng)
        if held_out(scene) == kept_out:
            scenes.append(scene)
    return scenes


def pixels(scenes: list[Scene]) -> Tensor:
    """Render scenes to float (B, 3, 32, 32) in [-1, 1]."""
    return torch.from_numpy(render_batch(scenes)).permute(0, 3, 1, 2).float() / 127.5 - 1


@cache
def patch_basis() -> tuple[Tensor, Tensor, Tensor]:
    """Principal axes of 4x4 RGB patches: mean (48,), encoder (16, 48), decoder (48, 16).

    Component i has variance l_i; it is scaled by l_i^(-1/4). Unscaled, the last components (edges: what tells a star
    from a circle) drown in the first noise; whitened, they are as loud as the background colour. Half-way works.
    The whole is scaled to a standard deviation of 1 / SCALING_FACTOR.
    """
    patches = F.unfold(pixels(draw_scenes(random.Random(0), 4096)), PATCH, stride=PATCH).transpose(1, 2).reshape(-1, 48)
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((patches - mean).T.double()))
    values, axes = values.flip(0)[:CHANNELS], vectors.flip(1)[:, :CHANNELS].T
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()  # an eigenvector's sign is arbitrary
    scale = values.pow(-0.25) / (values.sqrt().mean().sqrt() * SCALING_FACTOR)
    return mean, (scale[:, None] * axes).float(), (axes / scale[:, None]).T.float()


def patch_code(images: Tensor) -> Tensor:
    """Encode images (B, 3, 32, 32) in [-1, 1] to unscaled latents (B, 16, 8, 8) in closed form."""
    mean, encode, _ = patch_basis()
    side = images.shape[-1] // PATCH
    patches = F.unfold(images, PATCH, stride=PATCH) - mean.to(images)[:, None]
    return (encode.to(images) @ patches).view(-1, CHANNELS, side, side)


def patch_decode(latents: Tensor) -> Tensor:
    """Decode unscaled latents (B, 16, 8, 8) to images (B, 3, 32, 32) by the transpose of `patch_code`."""
    mean, _, decode = patch_basis()
    patches = decode.to(latents) @ latents.flatten(2) + mean.to(latents)[:, None]
    return F.fold(patches, latents.shape[-1] * PATCH, PATCH, stride=PATCH)


def new_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(24, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=CHANNELS,
        # Two channels to a group would destroy absolute colour on flat images.
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=SCALING_FACTOR,
    )


def foreground_weight(images: Tensor) -> Tensor:
    """Weights (B, 1, H, W), mean about 1: what differs from the most common corner colour counts four times.

    The background is most of every image and easy; unweighted, it hides the objects in the loss.
    """
    backdrop = images[:, :, ::31, ::31].flatten(2).median(2).values[:, :, None, None]
    objects = ((images - backdrop).abs().amax(1, keepdim=True) > 0.05).float()
    return 0.5 + 1.5 * objects


def autoencoder_loss(model: nn.Module, images: Tensor, generator: torch.Generator) -> Tensor:
    """Reconstruction, the code to be learned, and a faint KL term (latent diffusion's 1e-6 is per pixel summed)."""
    assert isinstance(model, AutoencoderKL)
    code = patch_code(images)
    posterior = model.encode(images).latent_dist
    # Half of the decoder's inputs are the code with noise: what a diffusion model hands it is never exact.
    noise = torch.randn(code.shape, generator=generator).to(code)
    level = torch.rand(len(code), 1, 1, 1, generator=generator).to(code) * 0.25 / SCALING_FACTOR
    half = len(code) // 2
    deviation = torch.exp(0.5 * posterior.logvar)
    latents = torch.cat([(posterior.mean + deviation * noise)[:half], (code + level * noise)[half:]])
    decoded = model.decode(latents).sample
    error = (foreground_weight(images) * ((decoded - images).abs() + (decoded - images) ** 2)).mean()
    return error + 0.2 * F.mse_loss(posterior.mean, code) + 1e-5 * posterior.kl().mean()


def train_autoencoder(out: Path, run: Run, *, steps: int, batch_size: int = 32) -> None:
    """Train the autoencoder and write it in fp16 to `out`."""
    torch.manual_seed(run.seed)
    model = new_autoencoder().to(run.device)

    def step_loss(step: int) -> Tensor:
        rng, generator = generators(run.seed, step)
        return autoencoder_loss(model, pixels(draw_scenes(rng, batch_size)).to(run.device), generator)

    trained = fit(
        model,
        step_loss,
        run,
        "autoencoder",
        steps=steps,
        peak=2e-3,
        measure=lambda ema: measure_autoencoder(ema, 512, run.device),
    )
    if rank() == 0:
        trained.half().save_pretrained(out)


@torch.inference_mode()
def measure_autoencoder(model: nn.Module, count: int, device: str, seed: int = 1) -> dict[str, float]:
    """What the oracle reads from reconstructions of held-out scenes."""
    assert isinstance(model, AutoencoderKL)
    scenes = draw_scenes(random.Random(seed), count, kept_out=True)
    images = pixels(scenes).to(device)
    code = model.encode(images).latent_dist.mode()
    decoded = model.decode(code).sample.clamp(-1, 1)
    psnr = -10 * torch.log10(((decoded - images) / 2).pow(2).mean()).item()
    off = F.mse_loss(code, patch_code(images)).sqrt().item() * SCALING_FACTOR
    rgb = ((decoded.permute(0, 2, 3, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
    return {"psnr": psnr, "code_error": off, **attribute_accuracy(scenes, rgb)}
