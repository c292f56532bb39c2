"""Solvers: how a step goes from one noise level to the next.

Every solver here is linear in what the model predicts, so a step is four numbers:

    d  = x0 + extrapolate (x0 - x0_before)
    z' = keep z + pull d + spread noise

A solver is a function from noise levels to these numbers, and the engine applies them to all samples at once,
whichever solver and step each of them is at.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from ip2p.diffusion.schedule import NoiseSchedule, Solver, noise_levels
from ip2p.errors import UserError


@dataclass(frozen=True)
class Moves:
    """(steps,) each, float64."""

    keep: np.ndarray
    pull: np.ndarray
    spread: np.ndarray
    extrapolate: np.ndarray


@dataclass(frozen=True, eq=False)
class Plan:
    """One solver's way through `steps` steps. timesteps, alpha, sigma: (steps,) at the entrance of each step.

    coefficients: (steps, 6) float32 on the CPU, the columns from_latents, from_output (x0 = from_latents z +
    from_output output), extrapolate, keep, pull, spread.
    """

    timesteps: Tensor
    alpha: np.ndarray
    sigma: np.ndarray
    initial_scale: float
    coefficients: Tensor

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def noised(self, x0: Tensor, noise: Tensor, start: int) -> Tensor:
        """Latents that enter step `start`: z = alpha x0 + sigma noise (SDEdit)."""
        return float(self.alpha[start]) * x0 + float(self.sigma[start]) * noise


@lru_cache(maxsize=256)
def plan(schedule: NoiseSchedule, solver: Solver, steps: int) -> Plan:
    """Raises `UserError` for an unknown solver and for impossible `steps`."""
    if solver not in get_args(Solver):
        raise UserError(f"solver {solver!r}: must be one of {', '.join(get_args(Solver))}")
    levels = noise_levels(schedule, solver, steps)
    alpha, sigma = np.sqrt(levels.alpha_bar), np.sqrt(1 - levels.alpha_bar)
    alpha_to, sigma_to = np.sqrt(levels.alpha_bar_to), np.sqrt(1 - levels.alpha_bar_to)
    if solver == "euler_ancestral":
        moves = euler_ancestral(alpha, sigma, alpha_to, sigma_to)
    elif solver == "dpmsolver++":
        moves = dpmsolver_2m(alpha, sigma, alpha_to, sigma_to)
    else:
        moves = straight(alpha, sigma, alpha_to, sigma_to)
    from_latents, from_output = denoiser(schedule.prediction, alpha, sigma)
    columns = [from_latents, from_output, moves.extrapolate, moves.keep, moves.pull, moves.spread]
    return Plan(
        timesteps=torch.from_numpy(levels.timesteps.astype(np.float32)),
        alpha=alpha,
        sigma=sigma,
        initial_scale=levels.initial_scale,
        coefficients=torch.from_numpy(np.stack(columns, axis=1).astype(np.float32)),
    )


# z = alpha x0 + sigma eps, and v = alpha eps - sigma x0 ("Progressive Distillation", appendix D)
def denoiser(prediction: str, alpha: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) with x0 = a z + b output."""
    if prediction == "v_prediction":
        return alpha, -sigma
    if prediction == "sample":
        return np.zeros_like(alpha), np.ones_like(alpha)
    assert prediction == "epsilon", prediction
    return 1 / alpha, -sigma / alpha


# z' = alpha' x0 + sigma' eps (DDIM, eq. 12 with eta 0); Euler's step of dz/dsigma is the same line, at other levels.
def straight(alpha: np.ndarray, sigma: np.ndarray, alpha_to: np.ndarray, sigma_to: np.ndarray) -> Moves:
    """`ddim` and `euler`: along the straight line through x0 and z."""
    keep = sigma_to / sigma
    zero = np.zeros_like(keep)
    return Moves(keep, alpha_to - alpha * keep, zero, zero)


# With s = sigma / alpha: up^2 = s'^2 (s^2 - s'^2) / s^2, down^2 = s'^2 - up^2; z' = alpha' (x0 + down eps + up noise)
def euler_ancestral(alpha: np.ndarray, sigma: np.ndarray, alpha_to: np.ndarray, sigma_to: np.ndarray) -> Moves:
    """Go down further than the next level, then add fresh noise (k-diffusion's `sample_euler_ancestral`)."""
    s, s_to = sigma / alpha, sigma_to / alpha_to
    up = s_to * np.sqrt((s**2 - s_to**2).clip(0)) / s
    down = np.sqrt(s_to**2 - up**2)
    keep = alpha_to * down / sigma
    return Moves(keep, alpha_to - alpha * keep, alpha_to * up, np.zeros_like(keep))


# D = (1 + 1/(2r)) x0_i - 1/(2r) x0_{i-1}, r = h_{i-1} / h_i, h: steps of log(alpha / sigma) (DPM-Solver++, alg. 2)
def dpmsolver_2m(alpha: np.ndarray, sigma: np.ndarray, alpha_to: np.ndarray, sigma_to: np.ndarray) -> Moves:
    """`dpmsolver++`: second order from the prediction before; the first and the last step are of first order."""
    moves = straight(alpha, sigma, alpha_to, sigma_to)
    extrapolate = np.zeros_like(alpha)
    h = np.diff(np.log(alpha / sigma))
    extrapolate[1:-1] = 0.5 * h[1:] / h[:-1]
    return Moves(moves.keep, moves.pull, moves.spread, extrapolate)
