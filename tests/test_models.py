import re
import shutil

import open_clip
import pytest
import torch
from diffusers import StableDiffusionPipeline

from ip2p.models import load_clip, load_text_to_image, resolve_device
from ip2p.recipe import REPOSITORY, ClipRef, ModelRef, locate


@pytest.fixture(scope="module")
def model(tiny_sd):
    return load_text_to_image(ModelRef(path=str(tiny_sd)), device="cpu")


@pytest.fixture(scope="module")
def pipeline(tiny_sd):
    return StableDiffusionPipeline.from_pretrained(tiny_sd)


def test_a_model_is_ready_for_inference(model):
    assert model.latent_shape(64, 32) == (4, 8, 4)
    assert model.downsampling == 8
    assert model.scaling_factor == 0.18215
    assert not model.is_editor
    for module in (model.text_encoder, model.vae, model.unet):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_latents_need_whole_pixels(model):
    with pytest.raises(ValueError, match="image size 60x64: both sides must be multiples of 8"):
        model.latent_shape(60, 64)


def test_text_is_encoded_as_the_diffusers_pipeline_does(model, pipeline):
    prompts = ["a red square", "", "words " * 100]
    theirs, _ = pipeline.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)
    ours = model.encode_text(prompts)
    assert ours.shape == (3, 77, 32)
    torch.testing.assert_close(ours, theirs)


def test_images_are_encoded_by_the_mode_scaled_or_not(model, pipeline):
    x = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mode = pipeline.vae.encode(x).latent_dist.mode()
    torch.testing.assert_close(model.encode_image(x, scaled=False), mode)
    torch.testing.assert_close(model.encode_image(x, scaled=True), mode * 0.18215)


def test_decoding_undoes_the_scale_and_stays_in_range(model, pipeline):
    z = torch.randn(2, 4, 8, 4, generator=torch.Generator().manual_seed(0))
    images = model.decode_latents(z)
    assert images.shape == (2, 3, 64, 32)
    torch.testing.assert_close(images, pipeline.vae.decode(z / 0.18215).sample.clamp(-1, 1))
    assert model.decode_latents(z * 1e4).abs().max() <= 1


def test_the_schedule_is_the_models_own(model):
    # SD 1.5: scaled-linear betas from 0.00085 to 0.012.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    torch.testing.assert_close(model.schedule.alphas_cumprod, torch.cumprod(1 - betas, 0))
    assert model.schedule.prediction_type == "epsilon"
    assert model.schedule.config["steps_offset"] == 1


def test_an_editor_loads_by_the_same_call(tiny_editor):
    editor = load_text_to_image(ModelRef(path=str(tiny_editor)), device="cpu", key="models.editor")
    assert editor.is_editor
    assert editor.latent_channels == 4


def test_another_vae_can_take_the_place_of_the_models(tiny_sd, tiny_editor):
    vae = ModelRef(path=str(tiny_editor / "vae"), dtype="bfloat16")
    model = load_text_to_image(ModelRef(path=str(tiny_sd)), vae, "cpu")
    assert model.vae.dtype == torch.bfloat16
    assert model.unet.dtype == torch.float32
    assert model.encode_image(torch.zeros(1, 3, 64, 64), scaled=True).dtype == torch.float32


def test_numbers_are_of_the_format_asked_for(tiny_sd):
    model = load_text_to_image(ModelRef(path=str(tiny_sd), dtype="bfloat16"), device="cpu")
    assert model.dtype == model.unet.dtype == model.text_encoder.dtype == model.vae.dtype == torch.bfloat16
    assert model.encode_text(["a"]).dtype == torch.bfloat16
    assert model.schedule.alphas_cumprod.dtype == torch.float32


def test_a_missing_model_is_named_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match=r"models.text_to_image.path: there is no directory '/no/where'.*owner/name"):
        load_text_to_image(ModelRef(path="/no/where"), device="cpu")
    with pytest.raises(ValueError, match=r"models.editor.path: can't load .* complete diffusers directory"):
        load_text_to_image(ModelRef(path=str(tmp_path)), device="cpu", key="models.editor")
    with pytest.raises(ValueError, match=r"models.clip.name: there is no directory 'nowhere'"):
        load_clip(ClipRef(name="local-dir:nowhere"), "cpu")


def test_a_clip_without_weights_is_refused(tiny_clip, tmp_path):
    shutil.copytree(tiny_clip, tmp_path / "clip", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ValueError, match=r"models\.clip: open_clip can't load"):
        load_clip(ClipRef(name=f"local-dir:{tmp_path}/clip"), "cpu")


def test_openais_weights_get_their_activation(monkeypatch):
    # No weights are at hand: what open_clip is asked for is what counts.
    asked = {}
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **kwargs: asked.update(kwargs) or no_weights())

    def no_weights():
        raise RuntimeError("no weights")

    for tag, expected in (("openai", True), ("laion2b_s32b_b82k", False)):
        with pytest.raises(ValueError, match="no weights"):
            load_clip(ClipRef(name="ViT-L-14", pretrained=tag), "cpu")
        assert asked["force_quick_gelu"] is expected


def test_an_unknown_clip_is_named():
    with pytest.raises(ValueError, match=re.escape("models.clip: open_clip can't load 'ViT-L-99' (openai)")):
        load_clip(ClipRef(name="ViT-L-99", pretrained="openai"), "cpu")


def test_paths_are_looked_up_here_then_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("ip2p") == str(REPOSITORY / "ip2p")
    (tmp_path / "ip2p").mkdir()
    assert locate("ip2p") == str(tmp_path / "ip2p")
    assert locate("owner/name-1.5") == "owner/name-1.5"
    for neither in ("./x", "a/b/c", "name", "/a/b", "../a"):
        with pytest.raises(ValueError, match=r"models\.llm\.path: there is no directory"):
            locate(neither, "models.llm.path")


def test_devices(monkeypatch):
    assert resolve_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    with pytest.raises(ValueError, match="use device: auto or cpu"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == "cuda"
