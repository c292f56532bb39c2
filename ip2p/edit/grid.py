"""One picture of many edits: rows are image guidance scales, columns guidance scales."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SMALLEST_TILE = 128  # pixels: smaller pictures are enlarged by a whole factor
GAP = 4


def scale_grid(original: np.ndarray, edits: list[list[np.ndarray]], s_I: list[float], s_T: list[float]) -> np.ndarray:
    """Lay out `edits[row][column]`, uint8 (H, W, 3) of one size, under their scales, with the original beside them.

    Returns:
        uint8 (H', W', 3).
    """
    factor = max(1, SMALLEST_TILE // max(original.shape[:2]))
    height, width = (side * factor for side in original.shape[:2])
    font = ImageFont.load_default(max(12, min(height, width) // 10))
    label = font.getbbox("image guidance 0.0")
    margin_left, margin_top = round(label[2] - label[0]) + 2 * GAP, round(label[3] - label[1]) * 2
    rows, columns = len(s_I), len(s_T) + 1
    size = (margin_left + columns * (width + GAP), margin_top + rows * (height + GAP))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    heads = ["original", *(f"guidance {scale:g}" for scale in s_T)]
    for column, head in enumerate(heads):
        draw.text((margin_left + column * (width + GAP), GAP), head, "black", font)
    for row, scale in enumerate(s_I):
        top = margin_top + row * (height + GAP)
        draw.text((GAP, top + height // 2), f"image guidance {scale:g}", "black", font)
        for column, tile in enumerate([original, *edits[row]]):
            if factor > 1:
                tile = tile.repeat(factor, axis=0).repeat(factor, axis=1)
            canvas.paste(Image.fromarray(tile), (margin_left + column * (width + GAP), top))
    return np.asarray(canvas)
