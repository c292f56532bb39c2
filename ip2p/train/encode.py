"""Dataset rows -> latents and token ids, once, ahead of training: the VAE costs about as much as the UNet.

One row per pair, with a list of *views* inside it: the pair as it is and, where it may be mirrored, its mirror image.
"""

import re
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ip2p import images
from ip2p.errors import UserError
from ip2p.models import TextToImage, load_text_to_image
from ip2p.recipe import Recipe
from ip2p.records import caption_id, digest, split_of

LATENTS = pa.schema(
    {
        "pair_id": pa.string(),
        "caption_id": pa.string(),
        "split": pa.string(),
        "token_ids": pa.list_(pa.int32()),
        "shape": pa.list_(pa.int32()),  # (V, C, h, w) of both latents: V views
        "image_latents": pa.binary(),  # float16, of the image to edit, not scaled
        "target_latents": pa.binary(),  # float16, of the edited image, scaled
        "status": pa.string(),
        "reason": pa.string(),
    }
)

SPLITS = ("train", "validation")
IMAGES, TEXTS = ("original_image", "edited_image"), ("edit_prompt",)
REQUIRED = (*IMAGES, *TEXTS)
WELCOME = ("original_prompt", "pair_id", "caption_id")  # made up where they are missing

_SIDE = re.compile(r"\b(left|right|west|east)(ern|most|hand|ward|wards|side)?\b|\b(anti|counter)?-?clockwise\b", re.I)


def names_a_side(text: str) -> bool:
    """Whether `text` would be wrong, or might be, about a mirrored image."""
    return bool(_SIDE.search(text))


def square(image: np.ndarray, side: int) -> np.ndarray:
    """uint8 (H, W, 3) -> (side, side, 3): the shorter side resized to `side`, then the centre. Never squashed."""
    height, width = image.shape[:2]
    scale = side / min(height, width)
    height, width = max(side, round(height * scale)), max(side, round(width * scale))
    if image.shape[:2] != (height, width):
        image = images.resize(image, height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def random_squares(
    pair: list[np.ndarray], side: int, sides: tuple[float, float], rng: np.random.Generator
) -> list[np.ndarray]:
    """uint8 (H, W, 3) each -> (side, side, 3): resized to a shorter side drawn from `sides`, then cut at random.

    All images of a pair are treated alike; they may differ in size, and are made as the first one is.
    """
    height, width = pair[0].shape[:2]
    scale = rng.uniform(*sides) / min(height, width)
    height, width = max(side, round(height * scale)), max(side, round(width * scale))
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    resized = [images.resize(image, height, width) for image in pair]
    return [image[top : top + side, left : left + side] for image in resized]


@torch.inference_mode()
def encode_pairs(model: TextToImage, pairs: list[list[np.ndarray]], flip: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode views [original, edited] of one pair, uint8 (H, W, 3) of one size, and their mirror images if `flip`.

    Both latents are the mode of the VAE's posterior. Upstream draws the target from the posterior instead; its
    deviation is negligible beside the noise of diffusion, and with the mode a rerun encodes the same latents.

    Returns:
        (image_latents, target_latents), each (V, C, h, w): as the UNet reads them, the first not scaled.
    """
    views = np.stack([image for pair in pairs for image in pair])
    if flip:
        views = np.concatenate([views, views[:, :, ::-1]])
    pixels = images.to_tensor(views)
    return model.encode_image(pixels[0::2], scaled=False), model.encode_image(pixels[1::2], scaled=True)


def image_bytes(row: dict[str, Any], key: str) -> bytes:
    """Return the file of a row's image, which stands there as bytes or as `datasets` writes it. Raises `UserError`."""
    held = row[key]
    if isinstance(held, dict):
        if held["bytes"] is None and held.get("path"):
            raise UserError(
                f"{key} is only the path {held['path']!r}: write the dataset with its images inside, e.g. by "
                "push_to_hub(embed_external_files=True)"
            )
        held = held["bytes"]
    if not held:
        raise UserError(f"{key} is missing")
    return held


def _bytes(held: dict[str, Any] | bytes | None) -> bytes:
    return (held["bytes"] if isinstance(held, dict) else held) or b""


class PairEncoder:
    """Encodes batches of exported rows: `dataset.map_batches(PairEncoder, batch_format="pyarrow", ...)`.

    splits: the split of each file by path. Rows of a file with None are split by caption.
    """

    def __init__(self, recipe: Recipe, splits: dict[str, str | None]) -> None:
        base = recipe.train.base or recipe.models.text_to_image
        self.model = load_text_to_image(base, recipe.models.vae, recipe.device)
        self.recipe, self.seed, self.dataset, self.splits = recipe.train, recipe.seed, recipe.dataset, splits

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Rows of `records.DATASET`, or of the published one, with their file's `path` -> as many rows of `LATENTS`.

        A broken image or a missing text is a `failed` row with a reason. Rows of files that name no split are split by
        caption, as `jobs.export_dataset` does.
        """
        return pa.Table.from_pylist([self.encode_row(row) for row in batch.to_pylist()], schema=LATENTS)

    def encode_row(self, row: dict) -> dict:
        ids = self.ids(row)
        try:
            if not (row["edit_prompt"] or "").strip():
                raise UserError("edit_prompt is missing")
            pair = [images.decode(image_bytes(row, key)) for key in IMAGES]
        except UserError as error:
            return ids | {"status": "failed", "reason": str(error)}
        # Only the instruction reaches the model: a side named by a caption alone does not forbid the mirror.
        flip = self.recipe.flip and not names_a_side(row["edit_prompt"])
        image_latents, target_latents = encode_pairs(self.model, self.views(pair, ids["pair_id"]), flip)
        return ids | {
            "token_ids": token_ids(self.model, row["edit_prompt"]).tolist(),
            "shape": list(image_latents.shape),
            "image_latents": image_latents.half().cpu().numpy().tobytes(),
            "target_latents": target_latents.half().cpu().numpy().tobytes(),
            "status": "ok",
            "reason": "",
        }

    def ids(self, row: dict) -> dict[str, str]:
        """pair_id, caption_id and split of a row; the published dataset has none."""
        prompt = row["edit_prompt"] or ""
        caption = row.get("caption_id") or caption_id(row.get("original_prompt") or prompt)
        pair = row.get("pair_id") or f"{caption}-{digest(prompt, _bytes(row['edited_image']).hex())}"
        split = self.splits[row["path"]] or split_of(caption, self.dataset.validation_fraction, 0)
        return {"pair_id": pair, "caption_id": caption, "split": split}

    def views(self, pair: list[np.ndarray], pair_id: str) -> list[list[np.ndarray]]:
        """The squares of a pair that are encoded; they depend on the seed and the pair alone."""
        side, sides = self.recipe.resolution, self.recipe.random_resize
        if sides is None:
            return [[square(image, side) for image in pair]]
        rng = np.random.default_rng(digest("crops", self.seed, pair_id))
        return [random_squares(pair, side, sides, rng) for _ in range(self.recipe.crops)]


def token_ids(model: TextToImage, text: str) -> torch.Tensor:
    """(L,) token ids as Stable Diffusion pads and truncates them."""
    tokenizer = model.tokenizer
    encoded = tokenizer(
        text, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    return encoded.input_ids[0]
