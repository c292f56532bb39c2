import json

import datasets
import pyarrow as pa

from ip2p.pairs.export import explode, with_features
from ip2p.records import DATASET, PAIRS


def pair(seed, direction):
    return {
        "seed": seed,
        "shared_attention_fraction": 0.5,
        "guidance_scale": 7.5,
        "clip_sim_dir": direction,
        "verdict": "accepted",
        "original_image": b"before",
        "edited_image": b"after",
    }


def test_one_row_per_pair():
    shared = {"original_prompt": "a dog", "edit_prompt": "make it red", "edited_prompt": "a red dog"}
    rows = [
        {"caption_id": "a", "status": "ok", "pairs": [pair(1, 0.5), pair(2, 0.25) | {"mask": b"mask"}], **shared},
        {"caption_id": "b", "status": "rejected", "pairs": []},
        {"caption_id": "c", "status": "ok", "pairs": [pair(3, 0.125)]},
    ]
    exploded = explode(pa.Table.from_pylist(rows, schema=PAIRS))
    assert [row["pair_id"] for row in exploded] == ["a-1", "a-2", "c-3"]
    table = pa.Table.from_pylist(exploded, schema=with_features())
    first = table.to_pylist()[0]
    assert first["original_image"] == {"bytes": b"before", "path": None} and first["edited_image"]["bytes"] == b"after"
    assert (first["seed"], first["guidance_scale"], first["clip_sim_dir"], first["edit_prompt"]) == (
        1,
        7.5,
        0.5,
        "make it red",
    )
    assert set(exploded[0]) <= set(DATASET.names)
    assert [row["mask"] for row in table.to_pylist()] == [None, {"bytes": b"mask", "path": None}, None]


def test_features_are_those_datasets_would_write():
    described = json.loads(with_features().metadata[b"huggingface"])["info"]["features"]
    features = datasets.Features.from_dict(described)
    assert features["original_image"] == datasets.Image() and features["seed"] == datasets.Value("int64")
    assert features.arrow_schema.remove_metadata().equals(DATASET)
