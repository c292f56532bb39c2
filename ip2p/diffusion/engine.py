"""The batch engine: any set of samples of one latent shape, each advanced by one step per UNet call.

A trajectory is one sample on its way from noise to image, with its own solver, step, guidance, generator and
Prompt-to-Prompt link. Finished ones leave and waiting ones join at the next step, so the batch stays full. What a
trajectory becomes does not depend on its neighbours.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ip2p.diffusion.attention import CrossLink, SharedRows, SharingProcessor, Watch, shared_rows
from ip2p.diffusion.blend import Blend, blend_mask, layer_mean
from ip2p.diffusion.guidance import combine
from ip2p.diffusion.schedule import NoiseSchedule, Solver
from ip2p.diffusion.solvers import Plan, plan


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What the model is told. text: (L, D). image_latents: (C, H, W) for an editor, None is no image (zeros)."""

    text: Tensor
    image_latents: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Link:
    """An edited trajectory's tie to its source: it takes the source's noise, and its attention for part of the steps.

    Self-attention is shared while step / (steps - 1) < self_fraction, cross-attention likewise. alignments: for each
    conditioning (L,) the source's token of each edited token (`align_tokens`), None where the two texts are the same.
    emphasis: (L,), factors on what the edited tokens contribute where they are aligned. blend: local editing.
    """

    source: "Trajectory"
    alignments: Sequence[Tensor | None]
    self_fraction: float
    cross_fraction: float
    emphasis: Tensor | None = None
    blend: Blend | None = None


@dataclass(eq=False)
class Trajectory:
    """One sample on its way. latents: (C, H, W), variance preserving: unit noise at the start, the sample at the end.

    `start` > 0 begins at an inner step, with `latents` from `Plan.noised`. The generator (on the CPU, so that all
    devices draw the same) is needed by solvers that add noise; a linked trajectory uses its source's.
    """

    latents: Tensor
    conditionings: Sequence[Conditioning]
    weights: Sequence[float]
    steps: int
    solver: Solver
    generator: torch.Generator | None = None
    start: int = 0
    link: Link | None = None
    step: int = field(init=False)  # the next one to take
    denoised: Tensor | None = field(init=False, default=None)  # x0 as last predicted, (C, H, W): for previews
    unet_samples: int = field(init=False, default=0)
    attention: Tensor | None = field(init=False, default=None)  # with a blend: gathered maps (2, H, W), source and own
    mask: Tensor | None = field(init=False, default=None)  # with a blend: (H, W) bool, what may differ from the source

    def __post_init__(self):
        self.step = self.start

    @property
    def finished(self) -> bool:
        return self.step >= self.steps

    @property
    def progress(self) -> float:
        """0 at the first step, 1 at the last."""
        return self.step / max(self.steps - 1, 1)


@dataclass(frozen=True, eq=False)
class _Batch:
    """What stays the same while no trajectory joins or leaves. R rows of n samples, at most S of each."""

    owner: Tensor  # (R,) the sample of each row
    rows: Tensor  # (n, S)
    weights: Tensor  # (n, S) float32
    text: Tensor  # (R, L, D)
    image_latents: Tensor | None  # (R, C, H, W)
    blended: list[int]  # samples with a blend
    watched: tuple[Tensor, Tensor] | None  # of each of these, two rows and their tokens: source, own
    row_of: dict[tuple[int, int], int]  # (id of trajectory, conditioning) -> row


class Engine:
    """Advances up to `batch_size` trajectories per UNet call; a pair of linked ones counts as two.

    The UNet's attention processors are replaced by `SharingProcessor`s. Latents stay float32, whatever its dtype.
    """

    def __init__(self, unet: UNet2DConditionModel, schedule: NoiseSchedule, batch_size: int):
        assert batch_size > 0, batch_size
        # Measured on two cores: 0 to 12% faster.
        self.unet = unet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.unet.set_attn_processor(SharingProcessor())  # pyright: ignore[reportArgumentType]
        self.schedule = schedule
        self.batch_size = batch_size
        self.unet_samples = 0
        self.active: list[Trajectory] = []
        self._waiting: deque[tuple[Trajectory, ...]] = deque()
        self._slots: dict[int, tuple[int, ...]] = {}  # by id of trajectory: its conditionings of any weight
        self._batch: _Batch | None = None
        self._shared: tuple[object, SharedRows | None] = (None, None)

    def __len__(self) -> int:
        """Trajectories on their way or waiting."""
        return len(self.active) + sum(map(len, self._waiting))

    def add(self, *group: Trajectory) -> None:
        """Queue trajectories that start together: one, or a source and those linked to it.

        Raises `ValueError` for what can't be run, before anything of it is.
        """
        if len(group) > self.batch_size:
            raise ValueError(f"batch_size {self.batch_size} is too small for {len(group)} linked trajectories")
        others = self.active or (self._waiting[0] if self._waiting else group)
        for trajectory in group:
            self._check(trajectory, group, others[0].latents.shape)
        self._waiting.append(group)

    def remove(self, trajectory: Trajectory) -> None:
        """Drop a trajectory wherever it is, with all that are linked with it. One that is not here is ignored."""
        root = _root(trajectory)
        self._waiting = deque(group for group in self._waiting if _root(group[0]) is not root)
        self._keep([other for other in self.active if _root(other) is not root])

    def run(self, trajectories: Sequence[Trajectory], progress: Callable[[int], None] | None = None) -> list[Tensor]:
        """Final latents (C, H, W), in order. Sources must be among them. `progress` is told how many just finished."""
        groups: dict[int, list[Trajectory]] = {}
        for trajectory in trajectories:
            groups.setdefault(id(_root(trajectory)), []).append(trajectory)
        for group in groups.values():
            self.add(*group)
        while len(self):
            finished = self.step()
            if finished and progress is not None:
                progress(len(finished))
        return [trajectory.latents for trajectory in trajectories]

    @torch.inference_mode()
    def step(self) -> list[Trajectory]:
        """Admit what waits, advance all active trajectories by one step with one UNet call, return the finished."""
        self._admit()
        if not self.active:
            return []
        batch = self._batch or self._assemble()
        self._batch = batch
        plans = [plan(self.schedule, t.solver, t.steps) for t in self.active]
        latents = torch.stack([t.latents for t in self.active])
        watch = batch.watched and Watch(*batch.watched, [])
        output = self._predict(batch, plans, latents, watch)
        self._advance(plans, latents, combine(output, batch.rows, batch.weights))
        if watch:
            self._blend([self.active[n] for n in batch.blended], layer_mean(watch.maps, *latents.shape[2:]))
        for trajectory in self.active:
            trajectory.step += 1
        finished = [t for t in self.active if t.finished]
        self._keep([t for t in self.active if not t.finished])
        return finished

    def _predict(self, batch: _Batch, plans: list[Plan], latents: Tensor, watch: Watch | None) -> Tensor:
        """(n, C, H, W) -> the UNet's output for all rows, (R, C, H, W) float32."""
        timesteps = torch.stack([p.timesteps[t.step] for p, t in zip(plans, self.active)])
        sample = latents[batch.owner]
        if batch.image_latents is not None:
            sample = torch.cat([sample, batch.image_latents], dim=1)
        shared = self._share(batch)
        self.unet_samples += len(sample)
        return self.unet(
            sample.to(self.unet.dtype),
            timesteps.to(self.unet.device)[batch.owner],
            batch.text,
            cross_attention_kwargs={"shared": shared, "watch": watch} if shared or watch else None,
            return_dict=False,
        )[0].float()

    def _advance(self, plans: list[Plan], latents: Tensor, output: Tensor) -> None:
        """The solver's step, see `solvers`."""
        chosen = torch.stack([p.coefficients[t.step] for p, t in zip(plans, self.active)])
        columns = chosen.to(latents.device).T[:, :, None, None, None]
        from_latents, from_output, extrapolate, keep, pull, spread = columns
        x0 = from_latents * latents + from_output * output
        direction = x0
        if chosen[:, 2].any():
            before = torch.stack([x if t.denoised is None else t.denoised for x, t in zip(x0, self.active)])
            direction = x0 + extrapolate * (x0 - before)
        latents = keep * latents + pull * direction
        if chosen[:, 5].any():
            latents = latents + spread * self._noise(chosen[:, 5]).to(latents.device)
        for trajectory, z, prediction in zip(self.active, latents, x0):
            trajectory.latents, trajectory.denoised = z, prediction
            trajectory.unet_samples += len(self._slots[id(trajectory)])

    def _blend(self, blended: list[Trajectory], maps: Tensor) -> None:
        """maps: (2n, H, W), of source and edited sample in turn."""
        for trajectory, seen in zip(blended, maps.unflatten(0, (-1, 2))):
            assert trajectory.link is not None and trajectory.link.blend is not None
            blend, source = trajectory.link.blend, trajectory.link.source
            trajectory.attention = seen if trajectory.attention is None else trajectory.attention + seen
            if trajectory.progress >= blend.start:
                trajectory.mask = blend_mask(trajectory.attention, blend.threshold)
                trajectory.latents = torch.where(trajectory.mask, trajectory.latents, source.latents)

    def _noise(self, spread: Tensor) -> Tensor:
        """(n, C, H, W) on the CPU; zeros where a solver asks for none."""
        drawn: dict[int, Tensor] = {}
        for trajectory, amount in zip(self.active, spread.tolist()):
            root = _root(trajectory)
            if amount and id(root) not in drawn:
                drawn[id(root)] = torch.randn(root.latents.shape, generator=root.generator)
        nothing = torch.zeros(self.active[0].latents.shape)
        return torch.stack([drawn.get(id(_root(t)), nothing) for t in self.active])

    def _admit(self) -> None:
        while self._waiting and len(self.active) + len(self._waiting[0]) <= self.batch_size:
            group = self._waiting.popleft()
            # A conditioning of weight 0 is skipped; linked trajectories keep the same ones, they meet row by row.
            used = tuple(i for i in range(len(group[0].weights)) if any(t.weights[i] for t in group))
            for trajectory in group:
                way = plan(self.schedule, trajectory.solver, trajectory.steps)
                latents = trajectory.latents.to(self.unet.device, torch.float32)
                trajectory.latents = latents * way.initial_scale if trajectory.start == 0 else latents
                self._slots[id(trajectory)] = used
            self.active.extend(group)
            self._batch = None

    def _keep(self, trajectories: list[Trajectory]) -> None:
        if len(trajectories) != len(self.active):
            self.active, self._batch = trajectories, None
            self._slots = {id(t): self._slots[id(t)] for t in trajectories}

    def _assemble(self) -> _Batch:
        pairs = [(n, i) for n, t in enumerate(self.active) for i in self._slots[id(t)]]
        row_of = {(id(self.active[n]), i): row for row, (n, i) in enumerate(pairs)}
        width = max(map(len, self._slots.values()))
        rows, weights = [], []
        for t in self.active:
            own = [row_of[id(t), i] for i in self._slots[id(t)]]
            rows.append(own + own[:1] * (width - len(own)))
            weights.append([t.weights[i] for i in self._slots[id(t)]] + [0.0] * (width - len(own)))
        conditionings = [self.active[n].conditionings[i] for n, i in pairs]
        device, dtype = self.unet.device, self.unet.dtype
        shape = self.active[0].latents.shape
        image_latents = None
        if self.unet.config["in_channels"] > shape[0]:
            none = torch.zeros(self.unet.config["in_channels"] - shape[0], *shape[1:])
            images = [none if c.image_latents is None else c.image_latents for c in conditionings]
            image_latents = torch.stack([image.to(device, torch.float32) for image in images])
        blended = [n for n, t in enumerate(self.active) if t.link is not None and t.link.blend is not None]
        return _Batch(
            blended=blended,
            watched=self._watched(blended, row_of),
            owner=torch.tensor([n for n, _ in pairs], device=device),
            rows=torch.tensor(rows, device=device),
            weights=torch.tensor(weights, device=device),
            text=torch.stack([c.text.to(device, dtype) for c in conditionings]),
            image_latents=image_latents,
            row_of=row_of,
        )

    def _watched(self, blended: list[int], row_of: dict[tuple[int, int], int]) -> tuple[Tensor, Tensor] | None:
        """Rows (2n,) and tokens (2n, L) of source and edited sample in turn, where they are told different texts."""
        rows, tokens = [], []
        for n in blended:
            link = self.active[n].link
            assert link is not None and link.blend is not None
            text = next(i for i, alignment in enumerate(link.alignments) if alignment is not None)
            rows += [row_of[id(link.source), text], row_of[id(self.active[n]), text]]
            tokens += [link.blend.source_tokens, link.blend.edited_tokens]
        if not rows:
            return None
        device = self.unet.device
        return torch.tensor(rows, device=device), torch.stack(tokens).to(device, torch.float32)

    def _share(self, batch: _Batch) -> SharedRows | None:
        """Rows that share attention at this step; the last answer is kept, since phases seldom change."""
        phases = [
            (False, False) if link is None else (t.progress < link.self_fraction, t.progress < link.cross_fraction)
            for t in self.active
            for link in [t.link]
        ]
        key = (batch, phases)
        if self._shared[0] != key:
            self_links, cross_links = [], []
            tokens = torch.arange(batch.text.shape[1])
            for trajectory, (shares_self, shares_cross) in zip(self.active, phases):
                link = trajectory.link
                for i in self._slots[id(trajectory)] if link else ():
                    assert link is not None
                    edited, source = batch.row_of[id(trajectory), i], batch.row_of[id(link.source), i]
                    if shares_self:
                        self_links.append((edited, source))
                    if shares_cross:
                        alignment = link.alignments[i]
                        cross_links.append(
                            CrossLink(edited, source, tokens)
                            if alignment is None
                            else CrossLink(edited, source, alignment, link.emphasis)
                        )
            some = self_links or cross_links
            shared = shared_rows(len(batch.text), self_links, cross_links, len(tokens)) if some else None
            self._shared = (key, shared and shared.to(self.unet.device))
        return self._shared[1]

    def _check(self, trajectory: Trajectory, group: Sequence[Trajectory], shape: torch.Size) -> None:
        way = plan(self.schedule, trajectory.solver, trajectory.steps)
        if trajectory.latents.shape != shape:
            raise ValueError(f"latents {tuple(trajectory.latents.shape)}: the others here are {tuple(shape)}")
        if not 0 <= trajectory.start < trajectory.steps:
            raise ValueError(f"start {trajectory.start}: must be a step, 0 to {trajectory.steps - 1}")
        if len(trajectory.weights) != len(trajectory.conditionings) or not any(trajectory.weights):
            raise ValueError(f"weights {trajectory.weights}: one for each conditioning, and not all 0")
        root = _root(trajectory)
        if way.coefficients[:, 5].any() and root.generator is None:
            raise ValueError(f"solver {trajectory.solver!r} adds noise: give the trajectory a generator")
        if root not in group or root.link is not None:
            raise ValueError("a linked trajectory is added together with its source, which is not linked itself")
        same = ("steps", "start", "solver")
        if any(getattr(trajectory, key) != getattr(root, key) for key in same) or len(root.weights) != len(
            trajectory.weights
        ):
            raise ValueError(f"linked trajectories differ in {', '.join(same)} or conditionings: they go in step")


def _root(trajectory: Trajectory) -> Trajectory:
    return trajectory if trajectory.link is None else trajectory.link.source
