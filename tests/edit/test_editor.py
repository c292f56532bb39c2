import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, StableDiffusionInstructPix2PixPipeline
from skimage import data

from ip2p import images
from ip2p.diffusion.engine import Engine
from ip2p.edit.editor import Editor, EditRequest
from ip2p.models import load_text_to_image
from ip2p.recipe import ModelRef

PHOTO = images.resize(data.astronaut(), 64, 64)


@pytest.fixture(scope="module")
def model(tiny_editor):
    return load_text_to_image(ModelRef(path=str(tiny_editor)), device="cpu")


@pytest.fixture(scope="module")
def editor(model):
    return Editor(model, batch_size=3)


def by_diffusers(directory, scheduler, request):
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(directory)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    if scheduler is DDIMScheduler:
        pipeline.scheduler.register_to_config(clip_sample=False)  # as in every Stable Diffusion
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        request.instruction,
        image=images.to_tensor(request.image[None]),
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        image_guidance_scale=request.image_guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="np",
    )
    return 255 * result.images[0]


@pytest.mark.parametrize(
    ("solver", "scheduler"), [("ddim", DDIMScheduler), ("euler_ancestral", EulerAncestralDiscreteScheduler)]
)
@pytest.mark.parametrize("scales", [(7.5, 1.5), (3.0, 1.0)])
def test_equals_the_diffusers_pipeline(tiny_editor, editor, solver, scheduler, scales):
    """From the same seed: the same initial latents and, for the ancestral solver, the same noise at every step."""
    request = EditRequest(PHOTO, "make it night", *scales, steps=5, seed=11, solver=solver)
    (ours,) = editor.edit([request])
    theirs = by_diffusers(tiny_editor, scheduler, request)
    assert np.abs(ours - theirs).max() <= 1  # of 255: rounding
    assert theirs.std() > 1


def test_batch_neighbours_change_nothing(editor):
    """Different scales, steps, solvers and sizes at once, more than fit a batch: each as if alone, and in order."""
    wide = images.resize(data.coffee(), 64, 128)
    requests = [
        EditRequest(PHOTO, "make it night", 7.5, 1.5, steps=4, seed=1),
        EditRequest(wide, "add a cat", 3.0, 2.0, steps=3, seed=2),
        EditRequest(PHOTO, "add a cat", 5.0, 0.5, steps=6, seed=3, solver="ddim"),
        EditRequest(PHOTO, "", 1.0, 1.0, steps=5, seed=4, solver="dpmsolver++"),
        EditRequest(PHOTO, "make it night", 2.0, 1.2, steps=2, seed=5, solver="euler"),
    ]
    moves = []
    together = editor.edit(requests, progress=moves.append)
    assert sum(moves) == sum(request.steps for request in requests)
    for request, result in zip(requests, together, strict=True):
        (alone,) = editor.edit([request])
        assert result.shape == request.image.shape
        assert np.abs(result.astype(int) - alone).max() <= 1


def predicted(editor, request):
    """x0 as predicted at the first step."""
    engine = Engine(editor.model.unet, editor.schedule, 1)
    trajectory = editor.trajectory(request)
    engine.add(trajectory)
    engine.step()
    return trajectory.denoised, engine.unet_samples


def test_both_scales_1_give_the_fully_conditioned_prediction(editor):
    request = EditRequest(PHOTO, "make it night", 1.0, 1.0, steps=4, solver="ddim")
    found, samples = predicted(editor, request)
    trajectory = editor.trajectory(request)
    full = trajectory.conditionings[2]
    with torch.no_grad():
        sample = torch.cat([trajectory.latents, full.image_latents])[None]
        timestep = DDIMScheduler.from_config(editor.model.schedule.config)
        timestep.set_timesteps(4)
        noise = editor.model.unet(sample, timestep.timesteps[:1], full.text[None]).sample[0]
    abar = editor.model.schedule.alphas_cumprod[timestep.timesteps[0]]
    assert torch.allclose(found, (trajectory.latents - (1 - abar).sqrt() * noise) / abar.sqrt(), atol=1e-3, rtol=1e-3)
    assert samples == 1


def test_image_guidance_below_1_keeps_all_guidance(editor):
    """The diffusers pipeline would drop both scales here; eq. 3 goes on as it does above 1."""

    def x0(s_T, s_I):
        return predicted(editor, EditRequest(PHOTO, "make it night", s_T, s_I, steps=4, solver="ddim"))[0]

    # Linear in s_I: the value at 0.5 lies halfway between those at 0 and 1.
    assert torch.allclose(x0(7.5, 0.5), (x0(7.5, 0.0) + x0(7.5, 1.0)) / 2, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(x0(7.5, 0.5), x0(1.0, 0.5), atol=1e-2)


@pytest.mark.parametrize("photo", [data.chelsea(), data.coffee(), data.camera()[:77, :200], data.rocket()[:5, :9]])
def test_real_photographs_of_odd_sizes_keep_their_size(editor, photo):
    if photo.ndim == 2:
        photo = np.stack([photo] * 3, axis=-1)
    (result,) = editor.edit([EditRequest(photo, "make it night", steps=1)])
    assert result.shape == photo.shape and result.dtype == np.uint8


def test_a_text_to_image_model_is_refused(tiny_sd):
    with pytest.raises(ValueError, match="no editor"):
        Editor(load_text_to_image(ModelRef(path=str(tiny_sd)), device="cpu"))


def test_impossible_requests_name_the_value(model):
    with pytest.raises(ValueError, match="guidance_scale nan"):
        EditRequest(PHOTO, "", float("nan"))
    with pytest.raises(ValueError, match="steps 0"):
        Editor(model).edit([EditRequest(PHOTO, "", steps=0)])
    with pytest.raises(ValueError, match="max_side 32"):
        Editor(model, max_side=32)
