"""The dataset to train on: its files, its columns, and the share of it that is used."""

from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from ip2p.errors import UserError
from ip2p.recipe import Recipe
from ip2p.train.encode import REQUIRED, WELCOME
from ip2p.train.latents import some_captions
from ip2p.train.previews import is_readable
from ip2p.workspace import Workspace


def dataset_files(recipe: Recipe, workspace: Workspace) -> tuple[Workspace, list[str]]:
    """Return where the dataset is and its files without those of the test split.

    It is the workspace's own unless `train.dataset` names another one. Raises `UserError` when it has no files.
    """
    source = Workspace(recipe.train.dataset or workspace.uri("dataset"))
    files = [path for path in source.files() if path.endswith(".parquet") and path.split("/")[-2] != "test"]
    if not files:
        raise UserError(f"no pairs to train on in {source.location}: run jobs.export_dataset, or accept more pairs")
    return source, files


def columns(source: Workspace, path: str) -> list[str]:
    """Return the columns of a file that training reads. Raises `UserError` when a required one is missing."""
    names = pq.ParquetFile(source.fs.open_input_file(path)).schema_arrow.names
    if missing := [name for name in REQUIRED if name not in names]:
        raise UserError(f"{path} has no column {', '.join(missing)}; it has {', '.join(names)}")
    return [name for name in (*REQUIRED, *WELCOME) if name in names]


def content(source: Workspace, paths: list[str]) -> list[list[Any]]:
    """Return [name, bytes] of each file, by which a dataset is recognised."""
    return [[info.path.removeprefix(source.root), info.size] for info in source.fs.get_file_info(paths)]


def validation_rows(recipe: Recipe, workspace: Workspace) -> list[dict[str, Any]]:
    """Return the first readable held-out pairs, each with another instruction; at most `train.pictures`."""
    source, paths = dataset_files(recipe, workspace)
    held_out = [path for path in paths if path.split("/")[-2] == "validation"]
    if not held_out or not recipe.train.pictures:
        return []
    file = pq.ParquetFile(source.fs.open_input_file(held_out[0]))
    chosen: dict[str, dict[str, Any]] = {}
    for batch in file.iter_batches(recipe.train.pictures, columns=list(REQUIRED)):
        for row in batch.to_pylist():
            if row["edit_prompt"] not in chosen and is_readable(row):
                chosen[row["edit_prompt"]] = row
        if len(chosen) >= recipe.train.pictures:
            break
    return list(chosen.values())[: recipe.train.pictures]


def share_of_train(recipe: Recipe) -> tuple[float, int]:
    """Return (fraction, seed): which of the encoded captions are trained on."""
    return recipe.train.fraction, recipe.seed if recipe.train.fraction < 1 else 0


def trained_pairs(recipe: Recipe, data: Workspace) -> int:
    """Return how many encoded pairs `train.fraction` leaves."""
    table = data.read_table("latents", columns=["caption_id", "split", "status"])
    captions = table.filter((pc.field("split") == "train") & (pc.field("status") == "ok"))["caption_id"].to_pylist()
    kept = some_captions(captions, *share_of_train(recipe))
    return sum(caption in kept for caption in captions)
