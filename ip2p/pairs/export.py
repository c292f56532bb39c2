"""Rows of `pairs/` become rows of the dataset, one per accepted pair."""

import json
from typing import Any

import pyarrow as pa

from ip2p.records import DATASET, IMAGE, SCORES

SPLITS = ("train", "validation", "test")


def explode(rows: pa.Table) -> list[dict[str, Any]]:
    """Rows of PAIRS -> rows of DATASET, those of one caption the best first.

    pair_id is `<caption_id>-<seed>`: the same for the same pair in every export.
    """
    shared = [name for name in SCORES if name != "verdict"]
    return [
        {
            **{
                name: row[name]
                for name in ("original_prompt", "edit_prompt", "edited_prompt", "caption_id", "edit_type")
            },
            **{name: pair[name] for name in shared},
            "pair_id": f"{row['caption_id']}-{pair['seed']}",
            "original_image": {"bytes": pair["original_image"], "path": None},
            "edited_image": {"bytes": pair["edited_image"], "path": None},
            "mask": pair["mask"] and {"bytes": pair["mask"], "path": None},
        }
        for row in rows.to_pylist()
        for pair in row["pairs"]
    ]


def with_features(schema: pa.Schema = DATASET) -> pa.Schema:
    """DATASET with the metadata by which `datasets` knows which structs are images."""
    features = {
        field.name: {"_type": "Image"} if field.type == IMAGE else {"dtype": _dtype(field.type), "_type": "Value"}
        for field in schema
    }
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _dtype(kind: pa.DataType) -> str:
    return {"float": "float32", "double": "float64"}.get(str(kind), str(kind))
