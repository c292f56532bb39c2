"""Stage 3 on a real local Ray; the result opens with `datasets`."""

from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ip2p import images
from ip2p.recipe import ClipRef, Dataset, GrammarCaptions, ModelRef, Models, Recipe
from ip2p.records import PAIRS, split_of
from ip2p.workspace import Workspace
from jobs import export_dataset

CAPTIONS = 40


@pytest.fixture
def recipe() -> Recipe:
    ref = ModelRef(path="no/model")
    models = Models(text_to_image=ref, clip=ClipRef(name="local-dir:none"), llm=ref, editor=ref)
    dataset = Dataset(validation_fraction=0.3, test_fraction=0.2)
    return Recipe(name="smallest", models=models, captions=GrammarCaptions(), dataset=dataset)


def colour(seed: int) -> np.ndarray:
    return np.full((8, 8, 3), seed % 256, np.uint8)


def write_pairs(workspace: Workspace) -> int:
    """Captions k with k % 3 pairs each, in four files; returns the number of pairs."""
    rows = []
    for k in range(CAPTIONS):
        pairs = [
            {
                "seed": 10 * k + i,
                "shared_attention_fraction": 0.5,
                "guidance_scale": 7.5,
                "clip_sim_dir": 0.5,
                "verdict": "accepted",
                "original_image": images.encode(colour(10 * k + i)),
                "edited_image": images.encode(colour(10 * k + i + 1)),
            }
            for i in range(k % 3)
        ]
        rows.append({"caption_id": f"c{k}", "original_prompt": f"dog {k}", "edit_prompt": "x", "pairs": pairs})
    for part in range(4):
        with workspace.open_out("pairs", f"{part}.parquet") as file:
            pq.write_table(pa.Table.from_pylist(rows[part::4], schema=PAIRS), file)
    count = sum(len(row["pairs"]) for row in rows)
    workspace.mark_done("pairs", captions=CAPTIONS, pairs=count)
    return count


def test_datasets_opens_what_was_exported(recipe, tmp_path, local_ray, monkeypatch, capsys):
    monkeypatch.setattr(export_dataset, "SHARD_BYTES", 1)  # a shard for every file
    workspace = Workspace(tmp_path / "run")
    count = write_pairs(workspace)
    with workspace.open_out("dataset", "train", "left-by-a-killed-run.parquet") as file:
        file.write(b"half")
    export_dataset.run(recipe, workspace)

    loaded = datasets.load_dataset("parquet", data_dir=workspace.path("dataset"), cache_dir=str(tmp_path / "cache"))
    assert set(loaded) == {"train", "validation", "test"}
    assert {split: len(rows) for split, rows in loaded.items()} == workspace.counts("dataset")
    seen = {}
    for split, rows in loaded.items():
        for row in rows:
            assert split_of(row["caption_id"], 0.3, 0.2) == split
            assert row["pair_id"] == f"{row['caption_id']}-{row['seed']}"
            assert (np.asarray(row["original_image"]) == colour(row["seed"])).all()
            assert (np.asarray(row["edited_image"]) == colour(row["seed"] + 1)).all()
            seen[row["pair_id"]] = row
    assert len(seen) == sum(map(len, loaded.values())) == count
    assert next(iter(seen.values()))["original_prompt"].startswith("dog")

    before = {path: Path(path).stat().st_mtime_ns for path in workspace.files("dataset")}
    export_dataset.run(recipe, workspace)
    assert "is complete" in capsys.readouterr().out
    assert {path: Path(path).stat().st_mtime_ns for path in workspace.files("dataset")} == before


def test_small_files_share_a_shard(tmp_path):
    workspace = Workspace(tmp_path)
    write_pairs(workspace)
    assert [len(paths) for paths in export_dataset.shards(workspace)] == [4]


def test_nothing_to_export_is_refused(recipe, tmp_path):
    workspace = Workspace(tmp_path)
    with pytest.raises(ValueError, match=r"run jobs\.generate_pairs first"):
        export_dataset.run(recipe, workspace)
    workspace.mark_done("pairs", captions=1, pairs=0)
    with pytest.raises(ValueError, match=r"lower pairs\.thresholds"):
        export_dataset.run(recipe, workspace)
