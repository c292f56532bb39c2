"""What the field measures of one edit: distances of pixels, cosines of embeddings.

Two sources. MagicBrush (Zhang et al., NeurIPS 2023) compares the edited image with a ground truth: L1, L2, CLIP-I and
DINO, and with the caption of the ground truth: CLIP-T. Emu Edit (Sheynin et al., CVPR 2024), which has no ground truth,
compares it with the input: L1, CLIP image similarity and DINO, and with captions: CLIP output similarity, which is
CLIP-T, and CLIP direction.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ip2p import images
from ip2p.clip_similarity import similarities
from ip2p.models import DinoModel


@dataclass(frozen=True, eq=False)
class Picture:
    """An image with its embeddings. pixels: uint8 (H, W, 3); clip, dino: (D,), of length 1; dino None without a model.

    Two images of a benchmark may have other sizes.
    """

    pixels: np.ndarray
    clip: Tensor
    dino: Tensor | None


def measure(
    source: Picture, edited: Picture, target: Picture | None, before: Tensor | None, after: Tensor | None
) -> dict[str, float | None]:
    """The metrics (`benchmarks.METRICS`) of `edited`, which was made of `source`.

    target: the ground truth. before, after: normalised CLIP embeddings (D,) of the captions of input and output.
    """
    return {
        "l1": l1(edited.pixels, target.pixels) if target else None,
        "l2": l2(edited.pixels, target.pixels) if target else None,
        "clip_i": cosine(edited.clip, target.clip) if target else None,
        "dino": cosine(edited.dino, target.dino) if target else None,
        "clip_t": cosine(edited.clip, after),
        "clip_dir": direction(source.clip, edited.clip, before, after),
        "input_l1": l1(edited.pixels, source.pixels),
        "input_clip_i": cosine(edited.clip, source.clip),
        "input_dino": cosine(edited.dino, source.dino),
    }


# MagicBrush, evaluation: mean |x - y| over pixels and channels in [0, 1], the edited image at the other one's size.
def l1(edited: np.ndarray, other: np.ndarray) -> float:
    """uint8 (H, W, 3), (H', W', 3) -> 0 to 1."""
    return float(np.abs(_difference(edited, other)).mean())


# MagicBrush, evaluation: mean (x - y)^2, as L1. It is a mean square, without a root.
def l2(edited: np.ndarray, other: np.ndarray) -> float:
    """uint8 (H, W, 3), (H', W', 3) -> 0 to 1."""
    return float(np.square(_difference(edited, other)).mean())


def _difference(edited: np.ndarray, other: np.ndarray) -> np.ndarray:
    resized = images.resize(edited, *other.shape[:2])
    return resized.astype(np.float64) / 255 - other.astype(np.float64) / 255


# CLIP-I, CLIP-T and DINO: x . y / |x| |y|
def cosine(one: Tensor | None, other: Tensor | None) -> float | None:
    """Embeddings (D,) -> -1 to 1; None where one of them is missing."""
    return None if one is None or other is None else F.cosine_similarity(one, other, dim=0).item()


# CLIP direction (StyleGAN-NADA; InstructPix2Pix, 3.1.2): cos(I1 - I0, T1 - T0); 0 where nothing changed.
def direction(i0: Tensor, i1: Tensor, t0: Tensor | None, t1: Tensor | None) -> float | None:
    """Normalised CLIP embeddings (D,) of images and captions -> -1 to 1; None without both captions."""
    if t0 is None or t1 is None:
        return None
    return similarities(i0[None], i1[None], t0[None], t1[None])["clip_sim_dir"].item()


@torch.no_grad()
def embed_by_dino(dino: DinoModel, pictures: list[np.ndarray]) -> Tensor:
    """uint8 images (H, W, 3) of any sizes -> (B, D), of length 1: the last layer's class token (Caron et al., 2021).

    They are resized and normalised by the model's own processor.
    """
    # Copies, as torch warns of arrays that can't be written to. Told where the channels are: it would guess, wrongly
    # for an image of 3 rows.
    inputs = dino.processor([*map(np.array, pictures)], return_tensors="pt", input_data_format="channels_last")
    states = dino.model(inputs.pixel_values.to(dino.device, dino.dtype)).last_hidden_state
    return F.normalize(states[:, 0].float(), dim=-1)
