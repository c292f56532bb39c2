"""Pixels -> scene, and the truth about edits: carried out? everything else preserved?

An image is read as the nearest rendering: of every (background, look) the best content of each of the four cells is
looked up among the renderer's own cells, and the setting with the least total error wins. Comparing a cell with all of
them is one matrix product, so reading is exact and fast.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from ip2p.miniature.edits import Edit, apply_edit
from ip2p.miniature.instructions import parse_instruction
from ip2p.miniature.render import CELL, IMAGE_SIZE, cell_templates, decode_cell, decode_setting
from ip2p.miniature.scene import MAX_THINGS, PLACES, Scene, attributes

# Above this RMSE an image is no scene, but blobs or two scenes mixed. Noise of 20 of 255 steps is below it.
MAX_RESIDUAL = 0.08

ATTRIBUTES = ("shape", "colour", "size", "place", "background", "look")

_CHUNK = 256  # images per matrix product: about 4 MB of scores


@dataclass(frozen=True)
class Reading:
    """The nearest scene to an image; None when that has no things or more than three.

    `residual` is the RMSE (0..1) between the image and the nearest rendering; `valid` says that there is a scene and
    that the residual is at most MAX_RESIDUAL.
    """

    scene: Scene | None
    residual: float
    valid: bool


@dataclass(frozen=True)
class Judgement:
    """The truth about one edit: what it asks for is there, nothing else has changed, and the result is a scene.

    `kept` says for each of ATTRIBUTES whether all that the edit leaves alone are as they were; None: it leaves none.
    """

    carried_out: bool
    preserved: bool
    valid: bool
    preserved_fraction: float
    kept: Mapping[str, bool | None]

    @property
    def success(self) -> bool:
        """All three."""
        return self.carried_out and self.preserved and self.valid


@cache
def _flat_templates() -> tuple[np.ndarray, np.ndarray]:
    """Return the templates as columns (768, K * C) and half their squared norms (K * C)."""
    # Around middle gray, for the precision of float32.
    flat = cell_templates().reshape(-1, CELL * CELL * 3) - 0.5
    return np.ascontiguousarray(flat.T), 0.5 * np.sum(flat**2, axis=1)


def _split_cells(images: np.ndarray) -> np.ndarray:
    """uint8 (B, 32, 32, 3) -> float32 (B, 4, 768) in -0.5..0.5, cells in the order of PLACES."""
    grid = images.reshape(-1, 2, CELL, 2, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(-1, len(PLACES), CELL * CELL * 3).astype(np.float32) / 255 - 0.5


def read_cells(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the nearest rendering: settings (B,), cells (B, 4) as in `encode_scenes`, residuals float (B,) as RMSE.

    Unlike `read_scenes` this also reads images with no things or with four. Raises ValueError unless `images` is uint8
    (B, 32, 32, 3): resize images before.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(f"images must be uint8 (B, {IMAGE_SIZE}, {IMAGE_SIZE}, 3), got {images.dtype} {images.shape}")
    templates, half_norms = _flat_templates()
    count = cell_templates().shape[0]
    settings, cells, residuals = [], [], []
    for start in range(0, len(images), _CHUNK):
        pixels = _split_cells(images[start : start + _CHUNK])
        # |x - t|^2 / 2 without the |x|^2 that all templates share; (b, 4, K, C)
        errors = (half_norms - pixels @ templates).reshape(len(pixels), len(PLACES), count, -1)
        best = errors.min(axis=3).sum(axis=1)
        setting = best.argmin(axis=1)
        rows = np.arange(len(pixels))
        settings.append(setting)
        cells.append(errors[rows, :, setting].argmin(axis=2))
        squared = 2 * best[rows, setting] + np.sum(pixels**2, axis=(1, 2))
        residuals.append(np.sqrt(np.maximum(squared, 0) / (3 * IMAGE_SIZE**2)))
    if not settings:
        return np.zeros(0, np.int64), np.zeros((0, len(PLACES)), np.int64), np.zeros(0)
    return np.concatenate(settings), np.concatenate(cells), np.concatenate(residuals)


def read_scenes(images: np.ndarray) -> list[Reading]:
    """Read uint8 images (B, 32, 32, 3); raises ValueError for other sizes and types."""
    return [
        _reading(int(setting), row, float(residual)) for setting, row, residual in zip(*read_cells(images), strict=True)
    ]


def _reading(setting: int, cells: np.ndarray, residual: float) -> Reading:
    things = tuple(thing for cell, place in zip(cells, PLACES, strict=True) if (thing := decode_cell(int(cell), place)))
    scene = Scene(things, *decode_setting(setting)) if 1 <= len(things) <= MAX_THINGS else None
    return Reading(scene, residual, scene is not None and residual <= MAX_RESIDUAL)


def _attributes_of(reading: Reading) -> dict[str, str | bool]:
    return attributes(reading.scene) if reading.scene else {}


def _names(*flats: dict[str, str | bool]) -> list[str]:
    return sorted({name for flat in flats for name in flat})


def judge_edit(source: Scene, edit: Edit, result: Reading) -> Judgement:
    """Judge what became of `source` under `edit`.

    Every attribute that the edit changes must have its new value, every other attribute its old one;
    `preserved_fraction` (0..1) is the share of the others that have. A result without a scene fails everything.
    Raises ValueError when the edit does not apply to the source.
    """
    before, after, got = attributes(source), attributes(apply_edit(edit, source)), _attributes_of(result)
    changed = [name for name in _names(before, after) if before.get(name) != after.get(name)]
    # A thing that only the result has is seen by its cell, which should be empty.
    kept = [name for name in _names(before) if name not in changed]
    same = {name: bool(got) and got.get(name) == before[name] for name in kept}
    fraction = float(np.mean(list(same.values()))) if got else 0.0
    carried_out = bool(got) and all(got.get(name) == after.get(name) for name in changed)
    by_attribute: dict[str, list[bool]] = {name: [] for name in ATTRIBUTES}
    for name, is_same in same.items():
        by_attribute[_attribute(name)].append(is_same)
    each = {name: all(found) if found else None for name, found in by_attribute.items()}
    return Judgement(carried_out, fraction == 1, result.valid, fraction, each)


def _attribute(name: str) -> str:
    """Which of ATTRIBUTES a key of `scene.attributes` is."""
    return "place" if name.endswith(".occupied") else name.split(".")[-1]


def judge_images(
    source_images: np.ndarray, instructions: Sequence[str], result_images: np.ndarray
) -> list[Judgement | str]:
    """Judge edited images, uint8 (B, 32, 32, 3) both, by what is seen in the source images.

    Where there is nothing to judge, because a source is no scene or its instruction makes no sense there, the reason.
    """
    rows = zip(read_scenes(source_images), instructions, read_scenes(result_images), strict=True)
    return [_judge(source, instruction, result) for source, instruction, result in rows]


def _judge(source: Reading, instruction: str, result: Reading) -> Judgement | str:
    if source.scene is None or not source.valid:
        return f"the source image is no scene (residual {source.residual:.3f})"
    try:
        return judge_edit(source.scene, parse_instruction(instruction, source.scene), result)
    except ValueError as error:
        return str(error)


def attribute_accuracy(expected: Sequence[Scene], images: np.ndarray) -> dict[str, float]:
    """Return how much of the expected scenes can be read back from uint8 images (B, 32, 32, 3), each 0..1.

    shape, colour and size are taken over the expected things, place over the four cells (occupied or not), background
    and look over the images, attributes over all of these together; exact is the share of images that show their scene.
    Raises ValueError when there are no images or not one for each scene.
    """
    if not expected or len(expected) != len(images):
        raise ValueError(f"{len(expected)} scenes and {len(images)} images")
    hits: dict[str, list[bool]] = {name: [] for name in ATTRIBUTES}
    exact = []
    for scene, setting, cells in zip(expected, *read_cells(images)[:2], strict=True):
        background, look = decode_setting(int(setting))
        wanted = attributes(scene)
        got: dict[str, str | bool] = {"background": background, "look": look}
        for cell, place in zip(cells, PLACES, strict=True):
            thing = decode_cell(int(cell), place)
            got[f"{place}.occupied"] = thing is not None
            if thing:
                got |= {f"{place}.{name}": getattr(thing, name) for name in ("shape", "colour", "size")}
        for name, value in wanted.items():
            hits[_attribute(name)].append(got.get(name) == value)
        exact.append(got == wanted)
    together = [hit for values in hits.values() for hit in values]
    return {name: float(np.mean(values)) for name, values in {**hits, "attributes": together, "exact": exact}.items()}
