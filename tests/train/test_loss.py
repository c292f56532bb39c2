import pytest
import torch
from diffusers import DDPMScheduler

from ip2p.train.loss import add_noise, min_snr_weight, mse, prediction_target, stratified_timesteps


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noise_and_target_equal_diffusers(prediction_type):
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 500, 999])
    abar = scheduler.alphas_cumprod[timesteps]
    assert torch.allclose(add_noise(latents, noise, abar), scheduler.add_noise(latents, noise, timesteps), atol=1e-6)
    expected = noise if prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    assert torch.allclose(prediction_target(prediction_type, latents, noise, abar), expected, atol=1e-6)


def test_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="sample"):
        prediction_target("sample", *torch.zeros(2, 1, 4, 8, 8), torch.ones(1))


def test_timesteps_are_stratified_and_uniform():
    generator = torch.Generator().manual_seed(0)
    places = torch.arange(8)
    draws = torch.stack(
        [stratified_timesteps(torch.rand(8, generator=generator), places, 8, 1000) for _ in range(2000)]
    )
    assert ((draws >= torch.arange(8) * 125) & (draws < torch.arange(1, 9) * 125)).all()
    assert abs(draws.float().mean() - 499.5) < 1.5
    assert draws.min() == 0 and draws.max() == 999


def test_timesteps_are_weighed_as_hang_et_al_do():
    abar = torch.tensor([0.9, 0.5, 0.1])  # SNR 9, 1, 1/9
    assert torch.allclose(min_snr_weight("epsilon", abar, 5.0), torch.tensor([5 / 9, 1.0, 1.0]))
    assert torch.allclose(min_snr_weight("v_prediction", abar, 5.0), torch.tensor([5 / 10, 1 / 2, 1 / 10]))


def test_loss_is_per_sample_and_float32():
    prediction = torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16)
    target = torch.stack([torch.ones(4, 8, 8), 3 * torch.ones(4, 8, 8)])
    loss = mse(prediction, target)
    assert loss.dtype == torch.float32 and loss.tolist() == [1.0, 9.0]
