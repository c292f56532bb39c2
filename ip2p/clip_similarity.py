"""The four CLIP similarities that a pair is judged by (InstructPix2Pix section 3.1.2; direction: StyleGAN-NADA)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ip2p.models import ClipModel


class ClipSimilarity:
    """Embeds images and texts with a CLIP model; embeddings are float32 of length 1."""

    def __init__(self, clip: ClipModel):
        self.clip = clip
        self._mean = torch.tensor(clip.mean, device=clip.device).view(1, 3, 1, 1)
        self._std = torch.tensor(clip.std, device=clip.device).view(1, 3, 1, 1)

    def preprocess(self, images: np.ndarray | Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> float32 (B, 3, h, w): resized, cropped, in [0, 1], then normalised, as in training."""
        assert images.dtype in (np.uint8, torch.uint8) and images.shape[-1] == 3, (images.dtype, images.shape)
        x = torch.as_tensor(images).to(self.clip.device).permute(0, 3, 1, 2).float()
        x = _resize_and_crop(x, self.clip.size, self.clip.resize_mode, self.clip.interpolation)
        return (x / 255 - self._mean) / self._std

    @torch.no_grad()
    def embed_images(self, images: np.ndarray | Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> (B, D)."""
        return F.normalize(self.clip.model.encode_image(self.preprocess(images).to(self.clip.dtype)).float(), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """Texts -> (B, D)."""
        tokens = self.clip.tokenizer(texts).to(self.clip.device)
        return F.normalize(self.clip.model.encode_text(tokens).float(), dim=-1)


def similarities(i0: Tensor, i1: Tensor, t0: Tensor, t1: Tensor) -> dict[str, Tensor]:
    """The four similarities, (B,) each, of normalised embeddings (B, D) of images and texts before (0) and after (1).

    clip_sim_0 = cos(I0, T0), clip_sim_1 = cos(I1, T1), clip_sim_image = cos(I0, I1),
    clip_sim_dir = cos(I1 - I0, T1 - T0); 0 where nothing changed.
    """
    return {
        "clip_sim_0": F.cosine_similarity(i0, t0),
        "clip_sim_1": F.cosine_similarity(i1, t1),
        "clip_sim_dir": F.cosine_similarity(i1 - i0, t1 - t0),
        "clip_sim_image": F.cosine_similarity(i0, i1),
    }


def _resize_and_crop(x: Tensor, size: tuple[int, int], mode: str, interpolation: str) -> Tensor:
    """(B, 3, H, W) -> (B, 3, *size) as open_clip's transform does: `squash`, or `shortest` side and centre crop."""
    height, width = x.shape[-2:]
    if mode == "squash":
        resized = size
    elif size[0] == size[1]:  # torchvision's Resize(int): the longer side is cut down to whole pixels
        short = min(height, width)
        resized = (size[0] * height // short, size[0] * width // short)
    else:
        ratio = min(height / size[0], width / size[1])
        resized = (round(height / ratio), round(width / ratio))
    # Pillow, which the model was trained with, resizes rows, then columns, and keeps 8 bits after each.
    for step in ((height, resized[1]), resized):
        if x.shape[-2:] != step:
            x = F.interpolate(x, step, mode=interpolation, antialias=True, align_corners=False).round().clamp(0, 255)
    top, left = round((resized[0] - size[0]) / 2), round((resized[1] - size[1]) / 2)
    return x[..., top : top + size[0], left : left + size[1]]
