"""Rows of `pairs/` become rows of the dataset, one per accepted pair."""

import json
from typing import Any

import pyarrow as pa

from ip2p.card import public_name, published_recipe
from ip2p.recipe import Recipe
from ip2p.records import DATASET, IMAGE, SCORES

SPLITS = ("train", "validation", "test")

CARD = """\
---
task_categories: [image-to-image]
tags: [instruct-pix2pix, image-editing]
---

# {name}

Pairs of images with the instruction that leads from the one to the other, made as in *InstructPix2Pix* (Brooks,
Holynski, Efros, CVPR 2023): captions edited by `{llm}`, images drawn by `{text_to_image}` with Prompt-to-Prompt, chosen
by CLIP `{clip}`. The images are made, not photographed; the licences of these models hold for what they made.

```python
from datasets import load_dataset

pairs = load_dataset("NAME OF THIS DATASET", split="train")
```

{splits}

The columns `original_prompt`, `original_image`, `edit_prompt`, `edited_prompt` and `edited_image` are those of
timbrooks/instructpix2pix-clip-filtered; the others say how a pair was made and how it was scored. All pairs of a
caption are in one split.

## Recipe

```yaml
{recipe}```
"""


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


def dataset_card(recipe: Recipe, counts: dict[str, int]) -> str:
    """What a hub shows of an exported dataset. counts: pairs by split."""
    return CARD.format(
        name=recipe.name,
        llm=public_name(recipe.models.llm.path),
        text_to_image=public_name(recipe.models.text_to_image.path),
        clip=public_name(recipe.models.clip.name),
        splits="\n".join(f"- {split}: {counts[split]} pairs" for split in SPLITS if counts[split]),
        recipe=published_recipe(recipe, "models", "captions", "instructions", "pairs", "dataset"),
    )
