"""Conditioning dropout: what makes the two guidance scales possible (InstructPix2Pix, section 3.2.1)."""

from torch import Tensor


def dropout_masks(u: Tensor, drop_text: float, drop_image: float, drop_both: float) -> tuple[Tensor, Tensor]:
    """Which samples lose their text and which their image, from ONE uniform draw per sample.

    [0, 1) is cut into text | both | image | none, so that the three fractions are exact and exclude one another.
    Two independent draws would tie 'both' to the product of the others.

    Args:
        u: (B,) uniform in [0, 1).
        drop_text: fraction that loses only the text; `drop_image`, `drop_both` likewise; their sum is at most 1.

    Returns:
        (text_dropped, image_dropped), each (B,) bool.
    """
    text_dropped = u < drop_text + drop_both
    image_dropped = (u >= drop_text) & (u < drop_text + drop_both + drop_image)
    return text_dropped, image_dropped


def drop(conditioning: Tensor, dropped: Tensor, null: Tensor | float) -> Tensor:
    """`conditioning` (B, ...) with the samples where `dropped` (B,) replaced by `null` (one sample, or a number)."""
    mask = dropped.view(-1, *[1] * (conditioning.ndim - 1))
    return conditioning.where(~mask, null)
