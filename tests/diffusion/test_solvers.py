"""Every solver follows diffusers' scheduler of the same name, whatever the spacing, prediction type and step count."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)

from ip2p.diffusion.schedule import NoiseSchedule, start_step
from ip2p.diffusion.solvers import plan

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
}
SHAPE = (1, 4, 8, 8)


def model(latents, timestep):
    """Stands in for the UNet: some smooth function of both."""
    return torch.tanh(latents.roll(1, -1) * 1.3 + torch.sin(torch.as_tensor(timestep).float() / 300))


def follow_diffusers(scheduler, steps, noise, start=0, x0=None):
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(1)
    latents = noise * scheduler.init_noise_sigma
    if x0 is not None:
        scheduler.set_begin_index(start) if hasattr(scheduler, "set_begin_index") else None
        latents = scheduler.add_noise(x0, noise, scheduler.timesteps[start : start + 1])
    for timestep in scheduler.timesteps[start:]:
        output = model(scheduler.scale_model_input(latents, timestep), timestep)
        extra = {} if isinstance(scheduler, DDIMScheduler) else {"generator": generator}
        latents = scheduler.step(output, timestep, latents, **extra).prev_sample
    return latents


def follow_plan(way, noise, start=0, x0=None):
    generator = torch.Generator().manual_seed(1)
    latents = noise * way.initial_scale if x0 is None else way.noised(x0, noise, start)
    before = None
    for i in range(start, way.steps):
        from_latents, from_output, extrapolate, keep, pull, spread = way.coefficients[i]
        denoised = from_latents * latents + from_output * model(latents, way.timesteps[i])
        direction = denoised + extrapolate * (denoised - (denoised if before is None else before))
        latents = keep * latents + pull * direction
        if spread:
            latents = latents + spread * torch.randn(SHAPE, generator=generator)
        before = denoised
    return latents


def noise():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", None])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50])
@pytest.mark.parametrize("solver", SCHEDULERS)
def test_same_trajectory_as_diffusers(solver, steps, prediction, spacing):
    if solver == "euler_ancestral" and prediction == "sample":
        pytest.skip("diffusers has no such scheduler")
    config = {**SD15, "prediction_type": prediction, "clip_sample": False}
    if spacing:
        config["timestep_spacing"] = spacing
    scheduler = SCHEDULERS[solver].from_config(config)
    schedule = NoiseSchedule.from_config(scheduler.alphas_cumprod, config)
    way = plan(schedule, solver, steps)
    ours, theirs = follow_plan(way, noise()), follow_diffusers(scheduler, steps, noise())
    np.testing.assert_allclose(way.timesteps.numpy(), scheduler.timesteps.numpy(), atol=1e-3)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strength", [0.02, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("solver", SCHEDULERS)
def test_starting_inside_is_diffusers_image_to_image(solver, strength):
    scheduler = SCHEDULERS[solver].from_config({**SD15, "clip_sample": False, "timestep_spacing": "leading"})
    schedule = NoiseSchedule.from_config(scheduler.alphas_cumprod, {**SD15, "timestep_spacing": "leading"})
    x0 = torch.linspace(-1, 1, 256).view(SHAPE)
    start = start_step(20, strength)
    assert start == 20 - max(1, int(20 * strength))
    ours = follow_plan(plan(schedule, solver, 20), noise(), start, x0)
    torch.testing.assert_close(ours, follow_diffusers(scheduler, 20, noise(), start, x0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("solver", SCHEDULERS)
def test_defaults_of_another_scheduler_do_not_count(solver):
    """Changing SD 1.5's PNDM for another scheduler must give that one's own spacing, as in diffusers."""
    saved = PNDMScheduler.from_config({**SD15, "set_alpha_to_one": False, "skip_prk_steps": True})
    scheduler = SCHEDULERS[solver].from_config(saved.config)
    scheduler.set_timesteps(10)
    way = plan(NoiseSchedule.from_config(saved.alphas_cumprod, saved.config), solver, 10)
    np.testing.assert_allclose(way.timesteps.numpy(), scheduler.timesteps.numpy(), atol=1e-3)


@pytest.mark.parametrize("solver", SCHEDULERS)
def test_zero_terminal_snr_stays_finite(solver):
    config = {**SD15, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = SCHEDULERS[solver].from_config({**config, "clip_sample": False})
    way = plan(NoiseSchedule.from_config(scheduler.alphas_cumprod, config), solver, 8)
    torch.testing.assert_close(follow_plan(way, noise()), follow_diffusers(scheduler, 8, noise()), atol=2e-3, rtol=2e-3)


def test_errors_name_the_value():
    schedule = NoiseSchedule(np.linspace(0.999, 0.01, 100), steps_offset=1)
    for solver, steps, message in [("ddim", 0, "steps 0"), ("ddim", 100, "steps 100"), ("plms", 5, "plms")]:
        with pytest.raises(ValueError, match=message):
            plan(schedule, solver, steps)
    with pytest.raises(ValueError, match="steps_offset 60"):
        plan(NoiseSchedule(schedule.alpha_bar, spacing="leading", steps_offset=60), "euler", 2)
    with pytest.raises(ValueError, match="strength 0"):
        start_step(20, 0)
    with pytest.raises(ValueError, match="prediction_type"):
        NoiseSchedule.from_config(torch.ones(3), {"prediction_type": "flow"})
