"""Scene -> pixels, from precomputed cells.

A look is pixelwise and a thing never leaves its cell, so an image is four independent 16 px cells given (background,
look). The cells are drawn once, from signed distance fields; renderer and oracle share them, so there is one source of
pixels. In shapes, K = 15 settings (look, background) and C = 61 cell contents (nothing, or shape, colour, size).
"""

from collections.abc import Sequence
from functools import cache

import numpy as np

from ip2p.miniature.scene import BACKGROUNDS, COLOURS, LOOKS, PLACES, SHAPES, SIZES, Scene, Thing

CELL = 16
IMAGE_SIZE = 2 * CELL

_RADII = {"small": 4.5, "large": 6.75}  # pixels; squares end on whole pixels, and the tip of a star stays in its cell
_CIRCLE_RADIUS = 0.92
_NIGHT_TINT = np.array([0.46, 0.50, 0.80], np.float32)
_FOG_COLOUR = np.array([0.70, 0.72, 0.74], np.float32)
_FOG_DENSITY = 0.45

_SETTINGS = tuple((background, look) for look in LOOKS for background in BACKGROUNDS)
_KINDS = tuple((shape, colour, size) for shape in SHAPES for colour in COLOURS for size in SIZES)
_SETTING_CODES = {setting: index for index, setting in enumerate(_SETTINGS)}
_KIND_CODES = {kind: index for index, kind in enumerate(_KINDS, start=1)}
_PLACE_CODES = {place: index for index, place in enumerate(PLACES)}


def _corners(shape: str) -> np.ndarray:
    """Return the corners (N, 2) of a polygonal shape of unit radius, x to the right and y down, in order."""
    if shape == "square":
        return 8 / 9 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    if shape == "cross":
        arm, half = 1.03, 0.35
        quarter = np.array([[half, -arm], [half, -half], [arm, -half]])
        turn = np.array([[0, 1], [-1, 0]])  # a quarter turn, row vectors
        return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])
    if shape == "triangle":
        return np.array([[0, -1.05], [1.1, 0.9], [-1.1, 0.9]])
    if shape == "star":
        angles = np.pi * np.arange(10) / 5
        radii = np.where(np.arange(10) % 2 == 0, 1.16, 0.50)
        # A five-pointed star reaches less far down than up: lower it to the middle of its cell.
        return np.stack([radii * np.sin(angles), 0.08 - radii * np.cos(angles)], axis=1)
    raise ValueError(f"{shape!r} is not a polygon")


def _polygon_distance(points: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Signed distance of points (..., 2) to the polygon with corners (N, 2); negative inside."""
    squared = np.full(points.shape[:-1], np.inf)
    inside = np.zeros(points.shape[:-1], bool)
    for start, end in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        edge, offset = end - start, points - start
        along = np.clip(offset @ edge / (edge @ edge), 0, 1)
        squared = np.minimum(squared, np.sum((offset - along[..., None] * edge) ** 2, axis=-1))
        # Even-odd rule: a ray to the right crosses this edge.
        crosses = (start[1] > points[..., 1]) != (end[1] > points[..., 1])
        if edge[1]:
            inside ^= crosses & (points[..., 0] < start[0] + (points[..., 1] - start[1]) * edge[0] / edge[1])
    return np.where(inside, -1, 1) * np.sqrt(squared)


def _coverage(shape: str, size: str) -> np.ndarray:
    """How much of each pixel of a cell (16, 16) the shape covers, 0..1: its signed distance, half a pixel each way."""
    axis = np.arange(CELL) + 0.5 - CELL / 2
    points = np.stack(np.meshgrid(axis, axis), axis=-1)
    radius = _RADII[size]
    if shape == "circle":
        distance = np.linalg.norm(points, axis=-1) - _CIRCLE_RADIUS * radius
    else:
        distance = _polygon_distance(points, radius * _corners(shape))
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)


def _apply_look(colours: np.ndarray, look: str) -> np.ndarray:
    """Apply a look to RGB values (..., 3) in 0..1."""
    if look == "night":
        return colours * _NIGHT_TINT
    if look == "fog":
        return colours + _FOG_DENSITY * (_FOG_COLOUR - colours)
    return colours


@cache
def cell_templates() -> np.ndarray:
    """Return every cell there is: float32 (K, C, 16, 16, 3) in 0..1, read-only, indexed as by `encode_scenes`."""
    coverage = np.stack([np.zeros((CELL, CELL), np.float32)] + [_coverage(shape, size) for shape, _, size in _KINDS])
    paint = np.array([(0.0, 0.0, 0.0)] + [COLOURS[colour] for _, colour, _ in _KINDS], np.float32)
    alpha, paint = coverage[..., None], paint[:, None, None]
    settings = [
        _apply_look(alpha * paint + (1 - alpha) * np.array(BACKGROUNDS[background], np.float32), look)
        for background, look in _SETTINGS
    ]
    templates = np.stack(settings)
    templates.setflags(write=False)
    return templates


@cache
def _cell_pixels() -> np.ndarray:
    return np.round(cell_templates() * 255).astype(np.uint8)


def encode_scenes(scenes: Sequence[Scene]) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices into `cell_templates`: settings int64 (B,) and cells int64 (B, 4), 0 where a cell is empty."""
    settings = np.array([_SETTING_CODES[scene.background, scene.look] for scene in scenes], np.int64)
    cells = np.zeros((len(scenes), len(PLACES)), np.int64)
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            cells[row, _PLACE_CODES[thing.place]] = _KIND_CODES[thing.shape, thing.colour, thing.size]
    return settings, cells


def decode_setting(setting: int) -> tuple[str, str]:
    """Return the (background, look) of a setting index."""
    return _SETTINGS[setting]


def decode_cell(cell: int, place: str) -> Thing | None:
    """Return the thing that a cell index stands for, at `place`; None for the empty cell."""
    return Thing(*_KINDS[cell - 1], place) if cell else None


def render_batch(scenes: Sequence[Scene]) -> np.ndarray:
    """Render scenes to uint8 (B, 32, 32, 3)."""
    settings, cells = encode_scenes(scenes)
    grid = _cell_pixels()[settings[:, None], cells].reshape(-1, 2, 2, CELL, CELL, 3)
    return np.ascontiguousarray(grid.transpose(0, 1, 3, 2, 4, 5)).reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3)


def render(scene: Scene) -> np.ndarray:
    """Render one scene to uint8 (32, 32, 3)."""
    return render_batch([scene])[0]
