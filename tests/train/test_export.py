import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionInstructPix2PixPipeline
from diffusers.training_utils import EMAModel

from ip2p import images
from ip2p.edit.editor import Editor, EditRequest
from ip2p.models import load_text_to_image
from ip2p.recipe import ModelRef, Sampling
from ip2p.train.export import export
from ip2p.train.unet import trainable, widen_conv_in


def test_diffusers_loads_the_averaged_weights(base, full_recipe, tmp_path):
    recipe = full_recipe.model_copy(update={"sampling": Sampling(solver="ddim", steps=3)})
    ema = EMAModel(base.unet.parameters())
    ema.shadow_params = [torch.randn_like(parameter) for parameter in ema.shadow_params]
    expected = ema.shadow_params[0].clone()
    export(base, ema.state_dict(), recipe, {"pairs": 12}, "make it night", tmp_path)

    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path)
    assert torch.equal(next(pipeline.unet.parameters()), expected)
    assert pipeline.unet.config.in_channels == 8 and isinstance(pipeline.scheduler, DDIMScheduler)
    assert not pipeline.scheduler.config.clip_sample
    assert torch.allclose(pipeline.scheduler.alphas_cumprod, base.schedule.alphas_cumprod)
    assert not {"safety_checker", "feature_extractor"} & {path.name for path in tmp_path.iterdir()}
    assert load_text_to_image(ModelRef(path=str(tmp_path)), device="cpu").is_editor
    card = (tmp_path / "README.md").read_text()
    assert "- pairs: 12" in card and "num_inference_steps=3" in card and "name: a test" in card


def test_our_editor_and_diffusers_make_the_same_image_with_it(base, full_recipe, tmp_path):
    """Loaded without a flag, from the same noise."""
    recipe = full_recipe.model_copy(update={"sampling": Sampling(solver="ddim", steps=3, max_side=64)})
    with torch.no_grad():
        base.unet.conv_in.weight.normal_(std=0.1)
    export(base, EMAModel(base.unet.parameters()).state_dict(), recipe, {}, "make it night", tmp_path)
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    ours = Editor(load_text_to_image(ModelRef(path=str(tmp_path)), device="cpu"), max_side=64).edit(
        [EditRequest(photo, "make it night", 7.5, 1.5, steps=3, seed=11, solver="ddim")]
    )[0]
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path)
    theirs = pipeline(
        "make it night",
        image=images.to_tensor(photo[None]),
        num_inference_steps=3,
        guidance_scale=7.5,
        image_guidance_scale=1.5,
        generator=torch.Generator().manual_seed(11),
        output_type="np",
    ).images[0]
    assert np.abs(ours - 255 * theirs).max() <= 1 and theirs.std() > 0.01


def test_an_adapter_is_merged_and_diffusers_sees_none(base, full_recipe, tmp_path):
    recipe = full_recipe.model_copy(update={"train": full_recipe.train.model_copy(update={"lora_rank": 2})})
    adapted = load_text_to_image(recipe.models.text_to_image, device="cpu")
    trained = trainable(widen_conv_in(adapted.unet), 2)
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(std=0.1)
    export(base, EMAModel(trained).state_dict(), recipe, {}, "make it night", tmp_path)

    unet = StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path).unet
    assert not any("lora" in name or "base_layer" in name for name in unet.state_dict())
    latents, text = torch.randn(1, 8, 8, 8), torch.randn(1, 77, 32)
    with torch.no_grad():
        expected, found = adapted.unet.eval()(latents, 500, text).sample, unet.eval()(latents, 500, text).sample
        untrained = widen_conv_in(load_text_to_image(recipe.models.text_to_image, device="cpu").unet)
        assert torch.allclose(found, expected, atol=1e-4)
        assert not torch.allclose(untrained(latents, 500, text).sample, expected, atol=0.05)
