"""A few encoded pairs of noise and their base model: all that training needs."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow.fs import LocalFileSystem

from ip2p.models import TextToImage, load_text_to_image
from ip2p.recipe import ClipRef, GrammarCaptions, ModelRef, Models, Recipe, Train
from ip2p.train.encode import LATENTS, token_ids
from ip2p.train.latents import LatentPairs, write_local_cache
from ip2p.train.unet import widen_conv_in


@pytest.fixture
def base(tiny_sd: Path) -> TextToImage:
    """A text-to-image model, its UNet widened; a new one for each test, because training changes it."""
    model = load_text_to_image(ModelRef(path=str(tiny_sd)), device="cpu")
    widen_conv_in(model.unet)
    return model


def open_pairs(
    rows: list[dict], folder: Path, one_per_caption: bool = False, fraction: float = 1.0, seed: int = 0
) -> LatentPairs:
    """Rows of LATENTS, in two files, laid out and opened."""
    folder.mkdir(exist_ok=True)
    paths = [str(folder / "b.parquet"), str(folder / "a.parquet")]
    for path, part in zip(paths, (rows[::2], rows[1::2])):
        pq.write_table(pa.Table.from_pylist(part, schema=LATENTS), path)
    write_local_cache(LocalFileSystem(), paths, "train", folder / "train", fraction, seed)
    return LatentPairs(folder / "train", one_per_caption)


@pytest.fixture
def pairs(base: TextToImage, tmp_path: Path) -> LatentPairs:
    """Seven pairs, every other one with a mirrored view."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for k in range(7):
        shape = (1 + k % 2, 4, 8, 8)
        image, target = (torch.randn(shape, generator=generator).half().numpy() for _ in range(2))
        rows.append(row(f"pair{k}", token_ids(base, f"make it {k}").tolist(), image, target))
    return open_pairs(rows, tmp_path / "pairs")


@pytest.fixture
def full_recipe(tiny_sd: Path) -> Recipe:
    ref = ModelRef(path=str(tiny_sd))
    return Recipe(
        name="a test",
        models=Models(text_to_image=ref, clip=ClipRef(name="ViT-B-32", pretrained="openai"), llm=ref, editor=ref),
        captions=GrammarCaptions(),
        train=Train(resolution=64),
    )


@pytest.fixture
def recipe() -> Train:
    return Train(steps=6, batch_size=4, learning_rate=1e-3, warmup_steps=2, checkpoint_every=3, resolution=64)


def row(pair_id: str, ids: list[int], image: np.ndarray, target: np.ndarray) -> dict:
    return {
        "pair_id": pair_id,
        "caption_id": pair_id,
        "split": "train",
        "token_ids": ids,
        "shape": list(image.shape),
        "image_latents": image.tobytes(),
        "target_latents": target.tobytes(),
        "status": "ok",
        "reason": "",
    }
