"""SDEdit (Meng et al. 2022), the paper's baseline: noise the input, denoise it with the caption of the edited image."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch

from ip2p import images
from ip2p.diffusion.engine import Conditioning, Engine, Trajectory
from ip2p.diffusion.guidance import text_weights
from ip2p.diffusion.schedule import NoiseSchedule, start_step
from ip2p.diffusion.solvers import plan
from ip2p.models import TextToImage
from ip2p.recipe import Sampling


@dataclass(frozen=True, eq=False)
class SDEditRequest:
    """image: uint8 (H, W, 3). strength in (0, 1]: 1 starts from noise alone."""

    image: np.ndarray
    prompt: str
    strength: float
    guidance_scale: float
    seed: int


class SDEdit:
    """Edits with a text-to-image model, in as many steps and by the same solver as the editors."""

    def __init__(self, model: TextToImage, sampling: Sampling, batch_size: int):
        self.model, self.sampling = model, sampling
        self.schedule = NoiseSchedule.from_config(model.schedule.alphas_cumprod, model.schedule.config)
        self.engine = Engine(model.unet, self.schedule, batch_size)
        # As for the editors: the VAE and the UNet halve the sides at every level but the last.
        self.multiple = model.downsampling * 2 ** (len(model.unet.config["block_out_channels"]) - 1)

    def edit(self, requests: list[SDEditRequest]) -> list[np.ndarray]:
        """Results, uint8 (H, W, 3) of the sizes of the inputs, in order."""
        by_shape = defaultdict(list)
        fitted = [images.fit(request.image, self.sampling.max_side, self.multiple) for request in requests]
        for n, image in enumerate(fitted):
            by_shape[image.shape].append(n)
        results: dict[int, np.ndarray] = {}
        for numbers in by_shape.values():
            trajectories = [self._trajectory(requests[n], fitted[n]) for n in numbers]
            for n, latents in zip(numbers, self.engine.run(trajectories), strict=True):
                result = images.to_uint8(self.model.decode_latents(latents[None]))[0]
                results[n] = images.resize(result, *requests[n].image.shape[:2])
        return [results[n] for n in range(len(requests))]

    def _trajectory(self, request: SDEditRequest, image: np.ndarray) -> Trajectory:
        generator = torch.Generator().manual_seed(request.seed)
        x0 = self.model.encode_image(images.to_tensor(image[None]), scaled=True)[0].float().cpu()
        start = start_step(self.sampling.steps, request.strength)
        noise = torch.randn(x0.shape, generator=generator)
        way = plan(self.schedule, self.sampling.solver, self.sampling.steps)
        null_text, text = self.model.encode_text(["", request.prompt])
        return Trajectory(
            latents=way.noised(x0, noise, start) if start else noise,
            conditionings=[Conditioning(null_text), Conditioning(text)],
            weights=text_weights(request.guidance_scale),
            steps=self.sampling.steps,
            solver=self.sampling.solver,
            generator=generator,
            start=start,
        )
