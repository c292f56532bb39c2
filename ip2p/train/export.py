"""The trained editor as a directory that `diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained` loads."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline

from ip2p.card import public_name, published_recipe
from ip2p.models import TextToImage
from ip2p.recipe import Recipe
from ip2p.train.unet import merge, trainable

SCHEDULERS = {
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "ddim": diffusers.DDIMScheduler,
    "dpmsolver++": diffusers.DPMSolverMultistepScheduler,
}

CARD = """\
---
library_name: diffusers
pipeline_tag: image-to-image
tags: [instruct-pix2pix, image-editing]
---

# {name}

An image editor that follows written instructions: the text-to-image model `{base}` fine-tuned as in
*InstructPix2Pix* (Brooks, Holynski, Efros, CVPR 2023). The UNet holds the moving average of the trained weights.

```python
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline

pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained("PATH OF THIS DIRECTORY")
edited = pipeline("{example}", image=image, num_inference_steps={steps},
                  guidance_scale={guidance_scale}, image_guidance_scale={image_guidance_scale}).images[0]
```

Images of {resolution} x {resolution} px were seen in training. There is no safety checker. The licence of the base
model holds for these weights as well.

## Training

{facts}

## Recipe

```yaml
{recipe}```
"""


def export(
    model: TextToImage, ema: dict[str, Any], recipe: Recipe, facts: dict[str, Any], example: str, directory: str | Path
) -> None:
    """Write `directory`: VAE, text encoder, tokenizer, 2C-channel UNet, scheduler and a model card.

    Args:
        model: the base model, its UNet already widened; its weights are replaced, in place, by the averaged ones.
        ema: `EMAModel.state_dict()` of what the recipe trains of that UNet.
        facts: what the card tells about the data and the result: label -> value.
        example: an instruction for the card's example.
    """
    parameters = trainable(model.unet, recipe.train.lora_rank)
    assert len(parameters) == len(ema["shadow_params"]), "the checkpoint is of another UNet"
    with torch.no_grad():
        for parameter, average in zip(parameters, ema["shadow_params"], strict=True):
            parameter.copy_(average)
    if recipe.train.lora_rank is not None:
        merge(model.unet)
    # diffusers' DDIM clips the predicted latents to [-1, 1] unless told otherwise: right for pixels only.
    options = {"clip_sample": False} if recipe.sampling.solver == "ddim" else {}
    scheduler = SCHEDULERS[recipe.sampling.solver].from_config(model.schedule.config, **options)
    pipeline = StableDiffusionInstructPix2PixPipeline(
        vae=model.vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,  # pyright: ignore[reportArgumentType]
        unet=model.unet,
        scheduler=scheduler,
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(directory)
    Path(directory, "README.md").write_text(card(recipe, facts, example))


def card(recipe: Recipe, facts: dict[str, Any], example: str) -> str:
    """The model card."""
    return CARD.format(
        name=recipe.name,
        base=public_name((recipe.train.base or recipe.models.text_to_image).path),
        example=example,
        steps=recipe.sampling.steps,
        guidance_scale=recipe.sampling.guidance_scale,
        image_guidance_scale=recipe.sampling.image_guidance_scale,
        resolution=recipe.train.resolution,
        facts="\n".join(f"- {label.replace('_', ' ')}: {value}" for label, value in facts.items()),
        recipe=published_recipe(recipe, "train", "sampling"),
    )
