"""Noise levels and timesteps, with diffusers' arithmetic.

Latents are variance preserving for every solver: z = alpha x0 + sigma eps with alpha^2 + sigma^2 = 1. So samples of
different solvers share one UNet call, and noise always starts with unit variance. (diffusers keeps Euler's latents as
z / alpha; the trajectories are the same up to that factor.)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
from torch import Tensor

from ip2p.errors import UserError

Solver = Literal["ddim", "euler", "euler_ancestral", "dpmsolver++"]
Spacing = Literal["leading", "trailing", "linspace"]
Prediction = Literal["epsilon", "v_prediction", "sample"]

SMALLEST_ALPHA_BAR = 2.0**-24
"""A schedule with zero terminal signal-to-noise ratio ends here, so that z / alpha stays finite (as in diffusers)."""


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The noise that a UNet was trained with, and how its timesteps are spaced when sampling.

    alpha_bar: (T,) float64, the cumulative products of the DDPM paper. `spacing` None means each solver's own
    default in diffusers: leading for ddim, linspace for the others.
    """

    alpha_bar: np.ndarray
    prediction: Prediction = "epsilon"
    spacing: Spacing | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool = True

    @classmethod
    def from_config(cls, alphas_cumprod: Tensor, config: Mapping[str, Any]) -> Self:
        """From a diffusers scheduler's `alphas_cumprod` (T,) and config.

        Keys that the config holds only as its own scheduler's defaults don't count, as when diffusers changes the
        scheduler of a pipeline (`OtherScheduler.from_config`).
        """
        defaults = config.get("_use_default_values", ())
        given = {key: value for key, value in config.items() if key not in defaults}
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in get_args(Prediction):
            raise UserError(f"prediction_type {prediction!r}: must be one of {', '.join(get_args(Prediction))}")
        return cls(
            alpha_bar=alphas_cumprod.double().cpu().numpy(),
            prediction=prediction,
            spacing=given.get("timestep_spacing"),
            steps_offset=given.get("steps_offset", 0),
            set_alpha_to_one=given.get("set_alpha_to_one", True),
        )


@dataclass(frozen=True)
class Levels:
    """Noise levels on the way from noise to image, (steps,) each: a step goes from `alpha_bar` to `alpha_bar_to`."""

    timesteps: np.ndarray
    alpha_bar: np.ndarray
    alpha_bar_to: np.ndarray
    initial_scale: float = 1.0  # of the unit noise that the way starts with


def noise_levels(schedule: NoiseSchedule, solver: Solver, steps: int) -> Levels:
    """Raises `UserError` for a number of steps outside 1..T-1."""
    trained = len(schedule.alpha_bar)
    if not 1 <= steps < trained:
        raise UserError(f"steps {steps}: must be at least 1 and below {trained}, the timesteps of the model's training")
    if solver == "ddim":
        return _ddim_levels(schedule, steps)
    return _sigma_levels(schedule, steps, whole=solver == "dpmsolver++")


def start_step(steps: int, strength: float) -> int:
    """First step when an image is noised by `strength` in (0, 1] (SDEdit): 1 starts from noise alone (step 0)."""
    if not 0 < strength <= 1:
        raise UserError(f"strength {strength}: must be above 0 and at most 1")
    return steps - max(int(steps * strength), 1)


def spaced_timesteps(trained: int, steps: int, spacing: Spacing, offset: int) -> np.ndarray:
    """(steps,) float64, falling (Table 2 of "Common Diffusion Noise Schedules and Sample Steps are Flawed")."""
    if spacing == "linspace":
        return np.linspace(0, trained - 1, steps)[::-1]
    if spacing == "leading":
        return np.arange(steps)[::-1] * float(trained // steps) + offset
    if spacing == "trailing":
        return np.arange(trained, 0, -trained / steps)[:steps].round() - 1
    raise UserError(f"timestep_spacing {spacing!r}: must be one of {', '.join(get_args(Spacing))}")


def _ddim_levels(schedule: NoiseSchedule, steps: int) -> Levels:
    trained = len(schedule.alpha_bar)
    spaced = spaced_timesteps(trained, steps, schedule.spacing or "leading", schedule.steps_offset)
    timesteps = _within(spaced.round().astype(np.int64), trained, schedule)
    # Equal to the next timestep for `leading`; for the others diffusers' rounding is kept.
    before = timesteps - trained // steps
    final = 1.0 if schedule.set_alpha_to_one else schedule.alpha_bar[0]
    alpha_bar_to = np.where(before >= 0, schedule.alpha_bar[before.clip(0)], final)
    return Levels(timesteps.astype(np.float64), schedule.alpha_bar[timesteps], alpha_bar_to)


def _sigma_levels(schedule: NoiseSchedule, steps: int, whole: bool) -> Levels:
    """For solvers that diffusers writes in sigma / alpha. `whole`: DPM-Solver's timesteps, whole, without the end."""
    trained = len(schedule.alpha_bar)
    spacing = schedule.spacing or "linspace"
    # DPM-Solver divides the way into one step more and leaves out the end, but not when trailing.
    parts = steps + 1 if whole and spacing != "trailing" else steps
    timesteps = spaced_timesteps(trained, parts, spacing, schedule.steps_offset)[:steps]
    timesteps = _within(timesteps.round() if whole else timesteps, trained, schedule)
    alpha_bar = schedule.alpha_bar.clip(min=SMALLEST_ALPHA_BAR)
    # Timesteps between two trained ones: sigma / alpha is interpolated.
    ratio = np.interp(timesteps, np.arange(trained), np.sqrt((1 - alpha_bar) / alpha_bar))
    levels = 1 / (ratio**2 + 1)
    unit = whole or spacing == "leading"
    return Levels(timesteps, levels, np.append(levels[1:], 1.0), 1.0 if unit else float(np.sqrt(1 - levels[0])))


def _within(timesteps: np.ndarray, trained: int, schedule: NoiseSchedule) -> np.ndarray:
    if timesteps.max() >= trained:
        raise UserError(
            f"steps {len(timesteps)} with steps_offset {schedule.steps_offset} reach timestep {timesteps.max():g} of a "
            f"model trained with {trained}: ask for fewer steps, or set the scheduler's timestep_spacing to trailing"
        )
    return timesteps
