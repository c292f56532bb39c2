"""Local blend (Prompt-to-Prompt, section 4, "local editing"): only where the changed words look is anything changed.

The cross-attention to the words that differ, of the source and of the edited sample, gathered over layers and steps, is
a soft map of what they speak of; where it is high in either, the edited latents stand, elsewhere the source's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Blend:
    """Which tokens differ, (L,) bool, in the source's text and in the edited one, and when and where they blend.

    threshold: share of the map's maximum from which on a place belongs to them. start: progress (0 to 1) before which
    nothing is blended, since the maps say little yet.
    """

    source_tokens: Tensor
    edited_tokens: Tensor
    threshold: float
    start: float


def layer_mean(maps: Sequence[Tensor], height: int, width: int) -> Tensor:
    """Attention maps (W, N) of layers of any resolution -> their mean at that of the latents, (W, height, width)."""
    total = torch.zeros(len(maps[0]), height, width, device=maps[0].device)
    for flat in maps:
        grid = flat.view(len(flat), 1, *_grid(flat.shape[1], height, width))
        total += F.interpolate(grid, (height, width), mode="bilinear")[:, 0]
    return total / len(maps)


def _grid(count: int, height: int, width: int) -> tuple[int, int]:
    """Sides of a feature map of `count` places: the latents' sides, halved (and rounded up) some times."""
    while height * width > count:
        height, width = ceil(height / 2), ceil(width / 2)
    assert height * width == count, (count, height, width)
    return height, width


# P2P, algorithm 1 with a local edit: alpha = B(M_bar_t, k) u B(M_bar*_t, k); z*_t = (1 - alpha) z_t + alpha z*_t
def blend_mask(maps: Tensor, threshold: float) -> Tensor:
    """Gathered maps (2, H, W) of source and edited sample -> (H, W) bool: where either has `threshold` of its maximum.

    A map that is zero everywhere (no token differs on that side) covers nothing.
    """
    grown = F.max_pool2d(maps[:, None], 3, stride=1, padding=1)[:, 0]  # a word's map is narrower than its thing
    highest = grown.amax(dim=(1, 2), keepdim=True)
    return ((grown >= threshold * highest) & (highest > 0)).any(0)
