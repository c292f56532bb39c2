"""The training loop: plain torch, one process or one rank of several.

Everything random about a sample (which it is, its view, noise, timestep, dropout) is a pure function of the seed and
of its place in the endless row of samples. So a resumed run repeats the uninterrupted one exactly, no two ranks share
noise, and a step is the same, up to rounding, whatever the number of ranks that share it: it may change on the way.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from ip2p.models import TextToImage
from ip2p.recipe import Train
from ip2p.records import digest
from ip2p.train.dropout import drop, dropout_masks
from ip2p.train.encode import token_ids
from ip2p.train.latents import Batch, LatentPairs, sample_indices, share
from ip2p.train.loss import add_noise, min_snr_weight, mse, prediction_target, stratified_timesteps
from ip2p.train.parallel import gathered, scattered, shard, synchronised
from ip2p.train.unet import trainable

LOG_EVERY = 10  # steps

State = dict[str, Any]
Report = Callable[[dict[str, float], State | None], None]


@dataclass(frozen=True)
class Draw:
    """What is random about B samples of a step."""

    view: Tensor  # (B,) in [0, 1): which pair of a caption, and which of its views
    noise: Tensor  # (B, C, h, w)
    timesteps: Tensor  # (B,)
    text_dropped: Tensor  # (B,) bool
    image_dropped: Tensor  # (B,) bool

    def __getitem__(self, rows: slice) -> "Draw":
        return Draw(
            self.view[rows],
            self.noise[rows],
            self.timesteps[rows],
            self.text_dropped[rows],
            self.image_dropped[rows],
        )


def train(
    model: TextToImage,
    pairs: LatentPairs,
    recipe: Train,
    *,
    seed: int,
    report: Report,
    validation: LatentPairs | None = None,
    state: State | None = None,
    look: Callable[[int], None] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> EMAModel:
    """Fine-tune `model.unet` (already widened, see `unet.widen_conv_in`) to follow instructions, in place.

    Args:
        pairs: the encoded training split, the same on every rank.
        report: called on every rank alike, every LOG_EVERY steps with (metrics, None) and every
            `recipe.checkpoint_every` steps and at the end with (metrics, state). Metrics: step, loss, learning_rate,
            grad_norm, samples_per_second, eta_seconds and, at a checkpoint with a `validation` split, validation_loss
            (with DDP on the first rank only). The state is complete on every rank, whoever holds which part of the
            weights; it may refer to live tensors: save it before returning.
        state: what `report` was given at the step to go on from, by however many ranks; None starts anew.
        look: called at every checkpoint, with the step, while the UNet holds the averaged weights: on the first rank,
            and with FSDP on all, which hold parts of them.
        world_size: above 1, torch.distributed must have been initialised.

    Returns:
        The moving average of the parameters that were trained (`unet.trainable`): the weights to use.
    """
    sharded = recipe.parallel == "fsdp" and world_size > 1
    layout = torch.contiguous_format if sharded else torch.channels_last  # FSDP2 takes no other
    unet = model.unet.float().to(memory_format=layout).train()  # pyright: ignore[reportCallIssue]
    trained = trainable(unet, recipe.lora_rank)
    if recipe.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if sharded:
        trained = shard(unet)
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    scaler = torch.amp.GradScaler(torch.device(model.device).type, enabled=recipe.precision == "float16")
    ema = EMAModel(trained, decay=recipe.ema_decay, foreach=not sharded)  # DTensors know no foreach copy
    first_step = 0
    if state is not None:
        first_step = restore(state, unet, optimizer, scaler, ema)
    parallel = DistributedDataParallel(unet) if world_size > 1 and not sharded else unet
    step_unet = torch.compile(parallel) if recipe.compile else parallel
    null_text = encode_text(model, token_ids(model, "")[None].to(model.device))[0]
    window = _Window(first_step, recipe, world_size)

    for step in range(first_step, recipe.steps):
        places = share(step, recipe.batch_size, rank, world_size)
        drawn = draw(places, pairs, recipe, len(model.schedule.alphas_cumprod), seed)
        batch = pairs.batch(sample_indices(pairs.count, seed, places), drawn.view)
        optimizer.param_groups[0]["lr"] = learning_rate(recipe, step)
        loss = torch.zeros((), device=model.device)
        for rows in micro_batches(len(places), recipe.micro_batch):
            with synchronised(parallel, rows.stop == len(places)):
                with autocast(model.device, recipe):
                    part = denoising_loss(model, step_unet, batch[rows], drawn[rows], null_text, recipe)
                # The ranks' gradients are averaged, and their shares of the batch may differ by one.
                part = part * (rows.stop - rows.start) / recipe.batch_size * world_size
                scaler.scale(part).backward()
            loss += part.detach()
        scaler.unscale_(optimizer)
        grad_norm = gathered(torch.nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        ema.step(trained)

        window.add(loss, grad_norm)
        done = step + 1
        if done % recipe.checkpoint_every == 0 or done == recipe.steps:
            metrics = window.close(done, learning_rate(recipe, step))
            if rank == 0 or sharded:
                with averaged_weights(unet, trained, ema):
                    if validation is not None:
                        metrics["validation_loss"] = validation_loss(model, validation, null_text, recipe, seed)
                    if look is not None:
                        look(done)
            report(metrics, snapshot(done, unet, optimizer, scaler, ema))
            window = _Window(done, recipe, world_size)
        elif done % LOG_EVERY == 0:
            report(window.close(done, learning_rate(recipe, step)), None)
            window = _Window(done, recipe, world_size)
    return ema


def learning_rate(recipe: Train, step: int) -> float:
    """Linear warm-up over the first `warmup_steps` steps, constant after, linearly to 0 over the last ones."""
    warmup, cooldown = max(1, recipe.warmup_steps), max(1, recipe.cooldown_steps)
    return recipe.learning_rate * min(1.0, (step + 1) / warmup, (recipe.steps - step) / cooldown)


def autocast(device: str, recipe: Train) -> torch.autocast:
    dtype = torch.float16 if recipe.precision == "float16" else torch.bfloat16
    return torch.autocast(torch.device(device).type, dtype, enabled=recipe.precision != "float32")


def micro_batches(size: int, largest: int | None) -> list[slice]:
    """Rows of a batch of `size`, at most `largest` at a time."""
    largest = largest or size
    return [slice(start, min(start + largest, size)) for start in range(0, size, largest)]


def draw(places: range, pairs: LatentPairs, recipe: Train, train_timesteps: int, seed: int) -> Draw:
    """What is random about the samples in `places`: each by a generator of its own, on the CPU, so that a sample is the
    same on every device and in any company."""
    uniform, noise = torch.empty(len(places), 3), torch.empty(len(places), *pairs.latent_shape)
    generator = torch.Generator()
    for row, place in enumerate(places):
        generator.manual_seed(digest("train", seed, place))
        torch.rand(3, generator=generator, out=uniform[row])
        torch.randn(pairs.latent_shape, generator=generator, out=noise[row])
    in_batch = torch.tensor([place % recipe.batch_size for place in places])
    view, u, dropout = uniform.unbind(1)
    timesteps = stratified_timesteps(u, in_batch, recipe.batch_size, train_timesteps)
    return Draw(view, noise, timesteps, *dropout_masks(dropout, recipe.drop_text, recipe.drop_image, recipe.drop_both))


@torch.no_grad()
def encode_text(model: TextToImage, ids: Tensor) -> Tensor:
    """Token ids (B, L) -> text conditioning (B, L, D), float32. The text encoder is frozen."""
    return model.text_encoder(ids)[0].float()


# L = E || eps - eps_theta(z_t, t, E(c_I), c_T) ||^2   (InstructPix2Pix, eq. 1), or the same in v
def denoising_loss(
    model: TextToImage, unet: Callable, batch: Batch, drawn: Draw, null_text: Tensor, recipe: Train
) -> Tensor:
    """Mean loss of a batch under what was drawn for it."""
    device, schedule = model.device, model.schedule
    batch, noise = batch.to(device), drawn.noise.to(device)
    abar = schedule.alphas_cumprod.cpu()[drawn.timesteps].to(device)

    noisy = add_noise(batch.target_latents, noise, abar)
    image_latents = drop(batch.image_latents, drawn.image_dropped.to(device), 0.0)
    text = drop(encode_text(model, batch.token_ids), drawn.text_dropped.to(device), null_text)
    prediction = unet(torch.cat([noisy, image_latents], dim=1), drawn.timesteps.to(device), text).sample
    losses = mse(prediction, prediction_target(schedule.prediction_type, batch.target_latents, noise, abar))
    if recipe.min_snr_gamma is not None:
        losses = losses * min_snr_weight(schedule.prediction_type, abar, recipe.min_snr_gamma)
    return losses.mean()


@torch.no_grad()
def validation_loss(model: TextToImage, pairs: LatentPairs, null_text: Tensor, recipe: Train, seed: int) -> float:
    """Loss of the model as it is on up to 256 held-out pairs, always under the same noise, all timesteps alike.

    Nothing is dropped.
    """
    count = min(pairs.count, 256)
    size = recipe.micro_batch or recipe.batch_size
    plain = {"drop_text": 0.0, "drop_image": 0.0, "drop_both": 0.0, "min_snr_gamma": None, "batch_size": count}
    recipe = recipe.model_copy(update=plain)
    total = 0.0
    for start in range(0, count, size):
        indices = torch.arange(start, min(start + size, count))
        places = range(start, start + len(indices))
        drawn = draw(places, pairs, recipe, len(model.schedule.alphas_cumprod), digest("validation", seed))
        batch = pairs.batch(indices, torch.zeros(len(indices)))
        total += denoising_loss(model, model.unet, batch, drawn, null_text, recipe).item() * len(indices)
    return total / count


@contextmanager
def averaged_weights(unet: torch.nn.Module, trained: list[torch.nn.Parameter], ema: EMAModel) -> Iterator[None]:
    """Inside, `unet` holds the averaged weights and is in evaluation mode; after, it is as before."""
    ema.store(trained)
    ema.copy_to(trained)
    unet.eval()
    try:
        yield
    finally:
        ema.restore(trained)
        unet.train()


def snapshot(step: int, unet, optimizer, scaler, ema: EMAModel) -> State:
    """All that `restore` needs to go on after `step` steps: plain containers, numbers and whole tensors.

    By names of parameters, so that any number of ranks can go on, with DDP or with FSDP.
    """
    weights, of_optimizer = get_state_dict(unet, optimizer, options=StateDictOptions(full_state_dict=True))
    averages = ema.state_dict()
    averages["shadow_params"] = [gathered(average) for average in averages["shadow_params"]]
    return {
        "step": step,
        "unet": weights,
        "optimizer": of_optimizer,
        "scaler": scaler.state_dict(),
        "ema": averages,
    }


def restore(state: State, unet, optimizer, scaler, ema: EMAModel) -> int:
    """Undo `snapshot`; returns the number of steps already done."""
    set_state_dict(
        unet,
        optimizer,
        model_state_dict=state["unet"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(full_state_dict=True),
    )
    scaler.load_state_dict(state["scaler"])
    averages = [scattered(full, like) for full, like in zip(state["ema"]["shadow_params"], ema.shadow_params)]
    ema.load_state_dict(state["ema"] | {"shadow_params": averages})
    return state["step"]


class _Window:
    """Mean loss and speed since the last report; reads tensors from the device only when it closes."""

    def __init__(self, first_step: int, recipe: Train, world_size: int) -> None:
        self.first_step, self.recipe, self.started = first_step, recipe, time.perf_counter()
        self.world_size = world_size
        self.losses: list[Tensor] = []

    def add(self, loss: Tensor, grad_norm: Tensor) -> None:
        self.losses.append(loss)
        self.grad_norm = grad_norm

    def close(self, done: int, learning_rate: float) -> dict[str, float]:
        loss = torch.stack(self.losses).mean()
        if self.world_size > 1:
            dist.all_reduce(loss)
        seconds_per_step = (time.perf_counter() - self.started) / (done - self.first_step)
        return {
            "step": done,
            "loss": loss.item() / self.world_size,
            "learning_rate": learning_rate,
            "grad_norm": self.grad_norm.item(),
            "samples_per_second": self.recipe.batch_size / seconds_per_step,
            "eta_seconds": (self.recipe.steps - done) * seconds_per_step,
        }
