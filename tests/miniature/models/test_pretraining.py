"""How the miniature models are trained, and that those which ship are what the README says."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTokenizer

from ip2p.miniature.edits import EDIT_KINDS
from ip2p.miniature.language import vocabulary
from ip2p.miniature.models import autoencoder, clip, editor, text_to_image
from ip2p.miniature.models.fit import Run, fit, generators, learning_rate
from ip2p.miniature.models.tokenizer import CONTEXT_LENGTH, build_tokenizer
from ip2p.miniature.oracle import attribute_accuracy
from ip2p.models import load_clip
from ip2p.recipe import ClipRef

WEIGHTS = Path(autoencoder.__file__).parents[1] / "weights"


def run_at(folder: Path) -> Run:
    return Run(folder, seed=0, device="cpu", log=print)


def test_every_word_is_one_token_and_any_text_encodes():
    tokenizer = build_tokenizer(vocabulary())
    assert all(len(tokenizer(word).input_ids) == 3 for word in vocabulary())
    ids = tokenizer("a photo of über-cats, 3 of them 😀").input_ids
    assert ids.count(tokenizer.eos_token_id) == 1  # no unknown token, which would be the end token
    assert tokenizer.eos_token_id == len(tokenizer) - 1  # open_clip pools at the highest id
    assert tokenizer.model_max_length == CONTEXT_LENGTH


def test_training_that_goes_on_in_another_process_has_the_same_token_ids():
    assert len({frozenset(build_tokenizer(vocabulary()).get_vocab().items()) for _ in range(5)}) == 1


def test_patch_code_keeps_what_the_oracle_reads():
    scenes = autoencoder.draw_scenes(random.Random(5), 200)
    images = autoencoder.pixels(scenes)
    code = autoencoder.patch_code(images)
    assert code.shape == (200, 16, 8, 8)
    assert (code.std() * autoencoder.SCALING_FACTOR).item() == pytest.approx(1, abs=0.1)
    decoded = autoencoder.patch_decode(code).clamp(-1, 1)
    rgb = ((decoded.permute(0, 2, 3, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    assert attribute_accuracy(scenes, rgb)["exact"] == 1


def test_things_weigh_more_only_where_the_caption_says_their_places():
    """A weight on what must be guessed would move the optimum: a thing at every place."""
    torch.manual_seed(0)
    unet, scheduler = text_to_image.new_unet(), text_to_image.new_scheduler()
    images = autoencoder.pixels(autoencoder.draw_scenes(random.Random(6), 8))
    states = torch.randn(8, CONTEXT_LENGTH, unet.config["cross_attention_dim"])

    # The same draws as in the loss, in its order.
    generator = torch.Generator().manual_seed(0)
    latents = autoencoder.patch_code(images) * autoencoder.SCALING_FACTOR
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = text_to_image.stratified_timesteps(8, 1000, generator)
    with torch.no_grad():
        predicted = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, states).sample
    errors = ((predicted - scheduler.get_velocity(latents, noise, timesteps)) ** 2).flatten(1).mean(1)

    placed = torch.tensor([True, False] * 4)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        loss = text_to_image.diffusion_loss(unet, scheduler, images, states, placed, generator)
        generator = torch.Generator().manual_seed(0)
        unplaced = text_to_image.diffusion_loss(unet, scheduler, images, states, placed & False, generator)
    assert unplaced.item() == pytest.approx(errors.mean().item())
    assert loss.item() > 1.02 * unplaced.item(), "objects, a minority of the pixels, count four times the background"


def test_held_out_scenes_stay_out():
    rng = random.Random(0)
    trained_on = set(autoencoder.draw_scenes(rng, 2000))
    assert not trained_on & set(autoencoder.draw_scenes(rng, 500, kept_out=True))


def test_fit_resumes_exactly(tmp_path):
    def train(folder: Path, *stops: int) -> torch.Tensor:
        for steps in stops:
            torch.manual_seed(0)
            model = nn.Linear(4, 1)

            def step_loss(step: int, model: nn.Module = model) -> torch.Tensor:
                x = torch.randn(8, 4, generator=generators(0, step)[1])
                return (model(x) - x.sum(1, keepdim=True)).pow(2).mean()

            class Interrupted(Exception):  # noqa: N818
                pass

            def log(facts: dict[str, float], at: int = steps) -> None:
                if facts["step"] == at:
                    raise Interrupted

            try:
                averaged = fit(model, step_loss, Run(folder, 0, "cpu", log), "line", steps=60, peak=1e-2, every=10)
            except Interrupted:
                continue
            return averaged.weight.detach()  # pyright: ignore[reportReturnType]
        raise AssertionError("not reached")

    assert torch.equal(train(tmp_path / "whole", 1000), train(tmp_path / "broken", 20, 40, 1000))


def test_learning_rate_warms_up_and_falls():
    rates = [learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(rates[99], rel=0.05)
    assert rates[-1] < 0.06


def test_each_model_trains_and_loads(tmp_path):
    run = run_at(tmp_path / "state")
    autoencoder.train_autoencoder(tmp_path / "sd" / "vae", run, steps=2, batch_size=4)
    vae = AutoencoderKL.from_pretrained(tmp_path / "sd" / "vae", torch_dtype=torch.float32)
    text_to_image.train_text_to_image(tmp_path / "sd", run, vae, text_steps=2, steps=2, batch_size=4)
    clip.train_clip(tmp_path / "clip", run, vae, steps=2, batch_size=4)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "sd", torch_dtype=torch.float32)
    figures = text_to_image.measure_text_to_image(pipeline, 4)
    assert 0 <= figures["exact"] <= 0.5  # two steps teach nothing
    loaded = load_clip(ClipRef(name=f"local-dir:{tmp_path / 'clip'}"), "cpu")
    own = CLIPTokenizer.from_pretrained(tmp_path / "clip")
    assert set(clip.measure_clip(loaded.model, own, "cpu", count=16)) == {"retrieval", "direction_auc"}


def test_the_editor_of_a_workspace_is_shipped_in_half_precision(tmp_path):
    with pytest.raises(ValueError, match="holds no trained editor: run make reproduce"):
        editor.ship_editor(tmp_path, tmp_path / "out")
    trained = UNet2DConditionModel.from_pretrained(WEIGHTS / "editor" / "unet", torch_dtype=torch.float32)
    trained.save_pretrained(tmp_path / "model" / "unet")
    editor.ship_editor(tmp_path / "model", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "unet" / "config.json").read_text())
    assert config["in_channels"] == trained.config["in_channels"]
    shipped = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert shipped.keys() == trained.state_dict().keys()
    assert str(tmp_path) not in (tmp_path / "out" / "unet" / "config.json").read_text()
    for name, value in shipped.items():
        assert value.dtype == torch.float16
        assert torch.equal(value, trained.state_dict()[name].half())


def test_area_under_curve():
    assert clip.area_under_curve(torch.tensor([1.0, 2.0]), torch.tensor([0.0])) == 1
    assert clip.area_under_curve(torch.tensor([0.0]), torch.tensor([0.0, 1.0])) == 0.25


@pytest.fixture(scope="module")
def shipped() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS / "text_to_image", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Smaller samples than `--measure` takes, so a little below what it must reach.
def test_shipped_autoencoder_is_faithful(shipped):
    figures = autoencoder.measure_autoencoder(shipped.vae, 256, "cpu", seed=7)
    assert figures["attributes"] >= 0.97
    assert figures["exact"] >= 0.85


def test_shipped_text_to_image_shows_its_captions(shipped):
    figures = text_to_image.measure_text_to_image(shipped, 128, seed=7)
    assert figures["attributes"] >= 0.96
    assert figures["exact"] >= 0.80


def test_shipped_clip_knows_scenes_and_edits():
    model = load_clip(ClipRef(name=f"local-dir:{WEIGHTS / 'clip'}"), "cpu").model
    figures = clip.measure_clip(model, CLIPTokenizer.from_pretrained(WEIGHTS / "clip"), "cpu", seed=7)
    assert figures["retrieval"] >= 0.80
    assert figures["direction_auc"] >= 0.90


def test_shipped_editor_follows_instructions():
    shipped = StableDiffusionInstructPix2PixPipeline.from_pretrained(WEIGHTS / "editor", torch_dtype=torch.float32)
    figures = editor.measure_editor(shipped, 60, seed=7)
    assert set(figures) == {"carried_out", "preserved", "success", *(f"success.{kind}" for kind in EDIT_KINDS)}
    assert figures["success"] >= 0.4


def test_weights_are_small():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert np.sum([path.stat().st_size for path in files]) <= 25e6
