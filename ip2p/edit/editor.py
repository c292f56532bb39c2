"""Image + instruction -> edited image, by the trained editor on the batch engine."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
import torch
from torch import Tensor

from ip2p import images
from ip2p.diffusion.engine import Conditioning, Engine, Trajectory
from ip2p.diffusion.guidance import edit_weights
from ip2p.diffusion.schedule import NoiseSchedule, Solver
from ip2p.errors import UserError
from ip2p.models import TextToImage

TEXTS_KEPT = 256


@dataclass(frozen=True, eq=False)
class EditRequest:
    """One edit. image: uint8 (H, W, 3), of any size. The same request gives the same image, whatever runs beside it.

    guidance_scale is s_T of the paper, how strictly the instruction is followed; image_guidance_scale is s_I, how
    closely the image is kept. 1 means no extrapolation; below 1 the conditioning counts for less, and is still used.
    negative_prompt is what the result is led away from, in place of the empty text.
    """

    image: np.ndarray
    instruction: str
    guidance_scale: float = 7.5
    image_guidance_scale: float = 1.5
    steps: int = 20
    seed: int = 0
    solver: Solver = "euler_ancestral"
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        assert self.image.dtype == np.uint8 and self.image.ndim == 3 and self.image.shape[2] == 3, self.image.shape
        for key in ("guidance_scale", "image_guidance_scale"):
            if not isfinite(getattr(self, key)):
                raise UserError(f"{key} {getattr(self, key)}: must be a finite number, usually 1 to 15")


class Editor:
    """Edits images; requests with different scales, steps and solvers share UNet calls.

    Args:
        model: an editor, i.e. with a UNet that also reads the image's latents.
        batch_size: edits in one UNet call; each is up to three samples (neither, image, image and text).
        max_side: longer side in pixels of what the model sees; default: what its UNet was made for.
    """

    def __init__(self, model: TextToImage, batch_size: int = 8, max_side: int | None = None) -> None:
        if not model.is_editor:
            raise UserError(
                f"the UNet reads {model.unet.config['in_channels']} channels, so it is no editor, which reads "
                f"{2 * model.latent_channels}: give the model/ that jobs.train writes"
            )
        self.model = model
        self.batch_size = batch_size
        self.schedule = NoiseSchedule.from_config(model.schedule.alphas_cumprod, model.schedule.config)
        # Both the VAE and the UNet halve the sides at every level but the last.
        self.multiple = model.downsampling * 2 ** (len(model.unet.config["block_out_channels"]) - 1)
        self.max_side = max_side or model.unet.config["sample_size"] * model.downsampling
        if self.max_side < self.multiple:
            raise UserError(f"max_side {self.max_side}: this model needs at least {self.multiple} pixels a side")
        self._texts: dict[str, Tensor] = {}

    def fit(self, image: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) -> the size that the model sees."""
        return images.fit(image, self.max_side, self.multiple)

    def trajectory(self, request: EditRequest) -> Trajectory:
        """The way of one edit, from noise drawn from its seed. Its latents' shape depends on the image's size."""
        return self.trajectories([request])[0]

    def trajectories(self, requests: Sequence[EditRequest]) -> list[Trajectory]:
        """The ways of edits of one fitted size, encoded together; an image or a text that several share, once."""
        arrays = list({id(request.image): request.image for request in requests}.values())
        pixels = images.to_tensor(np.stack([self.fit(image) for image in arrays]))
        latents = dict(zip(map(id, arrays), self.model.encode_image(pixels, scaled=False)))
        texts = self._encode_texts({text for r in requests for text in (r.instruction, r.negative_prompt)})
        return [self._trajectory(request, latents[id(request.image)], texts) for request in requests]

    def _trajectory(self, request: EditRequest, image_latents: Tensor, texts: dict[str, Tensor]) -> Trajectory:
        without = texts[request.negative_prompt]
        generator = torch.Generator().manual_seed(request.seed)
        return Trajectory(
            latents=torch.randn(image_latents.shape, generator=generator),
            conditionings=[
                Conditioning(without),
                Conditioning(without, image_latents),
                Conditioning(texts[request.instruction], image_latents),
            ],
            weights=edit_weights(request.guidance_scale, request.image_guidance_scale),
            steps=request.steps,
            solver=request.solver,
            generator=generator,
        )

    def _encode_texts(self, texts: set[str]) -> dict[str, Tensor]:
        """(L, D) of each; the last few hundred are kept, the empty text and a page's instruction among them."""
        if new := [text for text in texts if text not in self._texts]:
            self._texts |= dict(zip(new, self.model.encode_text(new)))
        found = {text: self._texts.pop(text) for text in texts}
        self._texts |= found  # the latest last
        for text in list(self._texts)[:-TEXTS_KEPT]:
            del self._texts[text]
        return found

    def decode(self, latents: Tensor, request: EditRequest) -> np.ndarray:
        """Final latents (C, h, w) of `request` -> uint8 (H, W, 3) of the size of its image."""
        result = images.to_uint8(self.model.decode_latents(latents[None]))[0]
        return images.resize(result, *request.image.shape[:2])

    def edit(
        self, requests: Sequence[EditRequest], progress: Callable[[int], object] | None = None
    ) -> list[np.ndarray]:
        """Edited images, uint8 (H, W, 3), in order, each of the size of its request's image.

        `progress` is told how many denoising steps have just been made; there are sum(r.steps) of them.
        Raises `UserError` for steps or a solver that the model's schedule can't do.
        """
        results: dict[int, np.ndarray] = {}
        for indices in self._by_shape(requests):
            engine = Engine(self.model.unet, self.schedule, self.batch_size)
            waiting, running = deque(indices), {}
            while waiting or len(engine):
                while (
                    waiting and len(engine) < self.batch_size
                ):  # prepared only when there is room: memory stays bounded
                    index = waiting.popleft()
                    trajectory = self.trajectory(requests[index])
                    engine.add(trajectory)
                    running[id(trajectory)] = index
                moved = len(engine)
                for trajectory in engine.step():
                    index = running.pop(id(trajectory))
                    results[index] = self.decode(trajectory.latents, requests[index])
                if progress is not None:
                    progress(moved)
        return [results[index] for index in range(len(requests))]

    def _by_shape(self, requests: Sequence[EditRequest]) -> list[list[int]]:
        """Indices of the requests, grouped by the size that the model sees: a batch has one."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, request in enumerate(requests):
            shape = self.fit(request.image).shape
            groups.setdefault(shape, []).append(index)
        return list(groups.values())
