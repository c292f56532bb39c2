"""The one training loop of the miniature family: plain torch, deterministic by seed, resumable, on one or many ranks.

What a model learns is given as `step_loss(step) -> loss`; everything random inside must be drawn from
`generators(seed, step)`, so that a resumed run sees exactly what an uninterrupted one would have seen.
"""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ip2p.records import digest

Log = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class Run:
    """How a model is trained: where unfinished training is kept, from which seed, on what, heard by whom."""

    checkpoints: Path
    seed: int
    device: str
    log: Log


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def generators(seed: int, step: int) -> tuple[random.Random, torch.Generator]:
    """The randomness of one step on this rank: for scenes and words, and for tensors (CPU)."""
    value = digest("fit", seed, rank(), step)
    return random.Random(value), torch.Generator().manual_seed(value)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine down to 5% of `peak` at `steps`."""
    warm = min(1.0, (step + 1) / warmup)
    return peak * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Mean of the gradients over all ranks, in one message."""
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    at = 0
    for p in parameters:
        if p.grad is not None:
            p.grad.copy_(flat[at : at + p.numel()].view_as(p))
            at += p.numel()


def fit(
    model: nn.Module,
    step_loss: Callable[[int], Tensor],
    run: Run,
    name: str,
    *,
    steps: int,
    peak: float,
    measure: Callable[[nn.Module], dict[str, float]] | None = None,
    ema_decay: float = 0.995,
    every: int = 100,
    measure_every: int = 1000,
) -> nn.Module:
    """Train `model` in place for `steps` steps and return its exponential moving average.

    `run.log` gets the mean loss every `every` steps and what `measure(ema)` says every `measure_every` steps. The state
    is saved to `<name>.state` at each of these and picked up from there when the same call is made again.
    """
    state_file = run.checkpoints / f"{name}.state"
    parameters = [p for p in model.parameters() if p.requires_grad]
    # AdamW betas (.9, .98): a shorter memory suits a few thousand steps.
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    ema = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(ema_decay), use_buffers=False
    )
    first = 0
    if state_file.exists():
        state = torch.load(state_file, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    total, since = 0.0, time.monotonic()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        loss = step_loss(step)
        loss.backward()
        if dist.is_initialized():
            average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(model)
        total += loss.item()
        done = step + 1
        if done % every == 0 or done == steps:
            facts = {"step": done, "loss": total / every, "steps_per_second": every / (time.monotonic() - since)}
            if measure is not None and (done % measure_every == 0 or done == steps):
                facts |= measure(ema.module)
            if rank() == 0:
                save_state(state_file, model, ema, optimizer, done)
                run.log(facts)
            total, since = 0.0, time.monotonic()
    return ema.module


def save_state(path: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write the state beside `path` first, so that a crash never leaves half a file."""
    state = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").rename(path)
