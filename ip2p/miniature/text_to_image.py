"""The miniature Stable Diffusion: a CLIP text encoder and a UNet on the autoencoder's latents.

The text encoder is trained first, to be *readable*: one attention layer (as the UNet's cross-attention will be) must
be able to read every attribute of every place from its token states. That takes minutes and spares the UNet the hardest
part, which word belongs to which thing; trained from nothing together, shapes stay at chance for a long time.
"""

# diffusers, transformers and open_clip annotate less than they take and give.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false

import random
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ip2p.miniature.autoencoder import CHANNELS, SCALING_FACTOR, draw_scenes, foreground_weight, patch_code, pixels
from ip2p.miniature.fit import Run, fit, generators, rank
from ip2p.miniature.language import describe, vocabulary
from ip2p.miniature.oracle import attribute_accuracy
from ip2p.miniature.scene import BACKGROUNDS, COLOURS, LOOKS, PLACES, SHAPES, SIZES, Scene, thing_at
from ip2p.miniature.tokenizer import CONTEXT_LENGTH, build_tokenizer, tokenize

WIDTH = 96
DROP_TEXT = 0.1  # share of empty captions, which guidance needs


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


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


def draw_captions(rng: random.Random, scenes: list[Scene]) -> list[str]:
    return [describe(scene, rng.getrandbits(32)) for scene in scenes]


class Reader(nn.Module):
    """Reads a scene from token states (B, L, WIDTH) with one attention layer: a query a place, one for the rest."""

    ANSWERS: ClassVar = {"occupied": 2, "shape": len(SHAPES), "colour": len(COLOURS), "size": len(SIZES)}
    SETTING: ClassVar = {"background": len(BACKGROUNDS), "look": len(LOOKS)}

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(PLACES) + 1, WIDTH) * 0.1)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.of_place = nn.Linear(WIDTH, sum(self.ANSWERS.values()))
        self.of_scene = nn.Linear(WIDTH, sum(self.SETTING.values()))

    def forward(self, states: Tensor) -> list[tuple[str, Tensor]]:
        read = self.attention(self.queries.expand(len(states), -1, -1), states, states, need_weights=False)[0]
        places = self.of_place(read[:, :-1]).split(list(self.ANSWERS.values()), -1)
        scene = self.of_scene(read[:, -1]).split(list(self.SETTING.values()), -1)
        return list(zip([*self.ANSWERS, *self.SETTING], [*places, *scene], strict=True))


def answers(scenes: list[Scene]) -> dict[str, Tensor]:
    """What a reader should say: class indices (B, 4) for what a place holds, (B,) for the scene; -100 where empty."""

    def of(place_value):
        return torch.tensor([[place_value(thing_at(scene, place)) for place in PLACES] for scene in scenes])

    return {
        "occupied": of(lambda thing: int(thing is not None)),
        "shape": of(lambda thing: SHAPES.index(thing.shape) if thing else -100),
        "colour": of(lambda thing: list(COLOURS).index(thing.colour) if thing else -100),
        "size": of(lambda thing: SIZES.index(thing.size) if thing else -100),
        "background": torch.tensor([list(BACKGROUNDS).index(scene.background) for scene in scenes]),
        "look": torch.tensor([LOOKS.index(scene.look) for scene in scenes]),
    }


def train_text_encoder(run: Run, tokenizer: CLIPTokenizer, *, steps: int, batch_size: int = 64) -> CLIPTextModel:
    """Train a text encoder from whose states a `Reader`, trained with it and then dropped, reads the scene."""
    torch.manual_seed(run.seed)
    encoder, reader = new_text_encoder(tokenizer), Reader()
    both = nn.ModuleDict({"encoder": encoder, "reader": reader}).to(run.device)

    def read(rng: random.Random, kept_out: bool, count: int) -> list[tuple[str, Tensor, Tensor]]:
        """(attribute, logits (N, classes), answers (N,)) for `count` scenes."""
        scenes = draw_scenes(rng, count, kept_out)
        states = encoder(tokenize(tokenizer, draw_captions(rng, scenes)).to(run.device)).last_hidden_state
        wanted = answers(scenes)
        return [(name, logits.flatten(0, -2), wanted[name].flatten().to(run.device)) for name, logits in reader(states)]

    def step_loss(step: int) -> Tensor:
        said = read(generators(run.seed, step)[0], False, batch_size)
        return torch.stack([F.cross_entropy(logits, wanted) for _, logits, wanted in said]).sum()

    @torch.inference_mode()
    def measure(_: nn.Module) -> dict[str, float]:
        said = read(random.Random(1), True, 256)
        return {name: (logits.argmax(-1) == wanted)[wanted >= 0].float().mean().item() for name, logits, wanted in said}

    trained = fit(both, step_loss, run, "text_encoder", steps=steps, peak=2e-3, measure=measure)
    assert isinstance(trained, nn.ModuleDict)
    averaged = trained["encoder"]
    assert isinstance(averaged, CLIPTextModel)
    return averaged


def stratified_timesteps(count: int, total: int, generator: torch.Generator) -> Tensor:
    """One timestep from each of `count` equal parts of 0..total-1: the same mean as independent draws, less noise."""
    return ((torch.arange(count) + torch.rand(count, generator=generator)) * total / count).long()


def diffusion_loss(
    unet: UNet2DConditionModel, scheduler: DDIMScheduler, images: Tensor, states: Tensor, generator: torch.Generator
) -> Tensor:
    """Weighted v-prediction error; the weights do not move the optimum, they let the objects be learned sooner."""
    latents = patch_code(images) * SCALING_FACTOR
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    timesteps = stratified_timesteps(len(latents), 1000, generator).to(latents.device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    velocity = scheduler.get_velocity(latents, noise, timesteps)
    predicted = unet(noisy, timesteps, encoder_hidden_states=states).sample
    weight = F.max_pool2d(foreground_weight(images), 4)
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
        return diffusion_loss(unet, scheduler, pixels(scenes).to(run.device), states, generator)

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
