"""Small benchmarks with the columns of MagicBrush and of Emu Edit, as the datasets library writes them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ip2p import images
from ip2p.records import IMAGE

MAGICBRUSH = pa.schema(
    {
        "img_id": pa.string(),
        "turn_index": pa.int32(),
        "source_img": IMAGE,
        "mask_img": IMAGE,
        "instruction": pa.string(),
        "target_img": IMAGE,
    }
)
EMU_EDIT = pa.schema(
    {
        "instruction": pa.string(),
        "image": IMAGE,
        "task": pa.string(),
        "split": pa.string(),
        "idx": pa.int64(),
        "hash": pa.string(),
        "input_caption": pa.string(),
        "output_caption": pa.string(),
    }
)


def image(seed: int, height: int = 32, width: int = 32) -> dict[str, Any]:
    """Patches of noise as an Image struct."""
    patches = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return {"bytes": images.encode(images.resize(patches, height, width)), "path": None}


def magicbrush_row(img_id: str | None, turn: int | None, **changes: Any) -> dict[str, Any]:
    """Turn k leads from image k to image k + 1."""
    base = 10 * int(img_id or 0) + (turn or 0)
    pictures = {"source_img": image(base), "mask_img": image(base), "target_img": image(base + 1)}
    return {"img_id": img_id, "turn_index": turn, "instruction": f"edit {turn} of {img_id}", **pictures} | changes


def emu_edit_row(idx: int, **changes: Any) -> dict[str, Any]:
    texts = {"instruction": f"edit {idx}", "input_caption": "a red square", "output_caption": f"{idx} blue squares"}
    return (
        {"image": image(idx, 24, 40), "task": "color", "split": "test", "idx": idx, "hash": f"h{idx}"} | texts | changes
    )


def write(folder: Path, *parts: list[dict[str, Any]], schema: pa.Schema = MAGICBRUSH) -> Path:
    """One parquet file for each list of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, rows in enumerate(parts):
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / f"test-{n:05d}.parquet")
    return folder
