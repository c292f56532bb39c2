import torch
from diffusers import DDIMScheduler, StableDiffusionInstructPix2PixPipeline
from diffusers.training_utils import EMAModel

from ip2p.models import load_text_to_image
from ip2p.recipe import ModelRef, Sampling
from ip2p.train.export import export


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
