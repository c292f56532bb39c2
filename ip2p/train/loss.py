"""The denoising objective on latents: noise, target, mean squared error."""

from torch import Tensor

from ip2p.errors import UserError


def stratified_timesteps(u: Tensor, places: Tensor, batch_size: int, train_timesteps: int) -> Tensor:
    """(B,) int64 timesteps in [0, train_timesteps): the sample in place i of a batch falls into the i-th of its equal
    intervals, where `u` (B,) in [0, 1) says.

    Uniform over a batch of shuffled samples, with less variance of the loss than independent draws.
    """
    return ((places + u) / batch_size * train_timesteps).long().clamp(max=train_timesteps - 1)


# z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps   (Ho et al. 2020, eq. 4)
def add_noise(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Noisy latents (B, C, H, W) from scaled latents, noise and the samples' own abar_t (B,)."""
    abar = alphas_cumprod.view(-1, 1, 1, 1)
    return abar.sqrt() * latents + (1 - abar).sqrt() * noise


# epsilon: eps;   v = sqrt(abar_t) eps - sqrt(1 - abar_t) z_0   (Salimans & Ho 2022, appendix D)
def prediction_target(prediction_type: str, latents: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """What the UNet is to predict, (B, C, H, W); `alphas_cumprod` holds the samples' own abar_t (B,).

    Raises:
        ValueError: the scheduler's prediction type is neither 'epsilon' nor 'v_prediction'.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        abar = alphas_cumprod.view(-1, 1, 1, 1)
        return abar.sqrt() * noise - (1 - abar).sqrt() * latents
    raise UserError(f"prediction_type {prediction_type!r} of the base model: 'epsilon' or 'v_prediction' is supported")


# w = min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v;  SNR = abar / (1 - abar)
# (Hang et al. 2023, section 3.4)
def min_snr_weight(prediction_type: str, alphas_cumprod: Tensor, gamma: float) -> Tensor:
    """Weights (B,) of the samples' losses, from their own abar_t (B,): nearly clean timesteps count for less."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=gamma) / (snr if prediction_type == "epsilon" else snr + 1)


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error per sample, (B,), in float32."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)
