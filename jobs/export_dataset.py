"""Stage 3: accepted pairs become a dataset that `datasets.load_dataset` opens, split by caption.

pairs/ -> one row for every accepted pair -> split by caption id -> dataset/{train,validation,test}/*.parquet
"""

from collections import Counter
from contextlib import ExitStack
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from ip2p.cli import StageFlags, load_settings
from ip2p.errors import UserError
from ip2p.pairs.export import SPLITS, explode, with_features
from ip2p.recipe import Recipe
from ip2p.records import split_of
from ip2p.stage import Stage
from ip2p.workspace import Workspace
from runtime.connect import connect
from runtime.job import job

SHARD_BYTES = 256 * 2**20  # of pairs/, which become one file of each split
ROW_GROUP = 64  # rows; small enough to be looked at one by one
TASK_CPUS = 0.5


def run(recipe: Recipe, workspace: Workspace, overwrite: bool = False) -> None:
    """Write `dataset/` from `pairs/`. Does nothing when it is complete.

    Raises `UserError` when `pairs/` is not complete or holds no pair, and when `dataset/` was made otherwise.
    """
    stage = Stage(workspace, "dataset", recipe)
    if not stage.begin(overwrite):
        print(f"export_dataset: {workspace.uri('dataset')} is complete\n{show(workspace.counts('dataset'))}")
        return
    if not workspace.counts("pairs")["pairs"]:
        raise UserError(f"{workspace.uri('pairs')} holds no pair: lower pairs.thresholds or draw more candidates")
    connect()
    if workspace.exists("dataset"):
        workspace.fs.delete_dir(workspace.path("dataset"))  # an interrupted run may have had other shards
    work = [{"shard": n, "paths": paths} for n, paths in enumerate(shards(workspace))]
    written = (
        ray.data.from_items(work, override_num_blocks=len(work))
        .map(partial(export_shard, recipe=recipe, location=workspace.location), num_cpus=TASK_CPUS)
        .take_all()
    )
    counts = {split: sum(row[split] for row in written) for split in SPLITS}
    pairs = workspace.counts("pairs")["pairs"]
    assert sum(counts.values()) == pairs, f"{sum(counts.values())} of {pairs} pairs were exported"
    stage.finish(counts)
    print(f"export_dataset: done\n{show(counts)}")


def shards(workspace: Workspace) -> list[list[str]]:
    """The files of `pairs/`, in order, in groups of about SHARD_BYTES."""
    groups: list[list[str]] = []
    size = SHARD_BYTES
    for info in workspace.fs.get_file_info([path for path in workspace.files("pairs") if path.endswith(".parquet")]):
        if size >= SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(info.path)
        size += info.size
    return groups


def export_shard(work: dict[str, Any], recipe: Recipe, location: str) -> dict[str, int]:
    """Write the pairs of some files into one file of each split that has any; returns rows by split.

    File names follow from the shard's number: a task that is done twice writes the same files.
    """
    workspace, settings = Workspace(location), recipe.dataset
    writers: dict[str, pq.ParquetWriter] = {}
    counts: Counter[str] = Counter()
    schema = with_features()
    with ExitStack() as files:
        for path in work["paths"]:
            rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
            with pq.ParquetFile(workspace.fs.open_input_file(path)) as file:
                for row in explode(file.read()):
                    split = split_of(row["caption_id"], settings.validation_fraction, settings.test_fraction)
                    rows[split].append(row)
            for split in filter(rows.get, SPLITS):
                if split not in writers:
                    name = f"{split}-{work['shard']:05d}.parquet"
                    sink = files.enter_context(workspace.open_out("dataset", split, name))
                    writers[split] = files.enter_context(pq.ParquetWriter(sink, schema))
                writers[split].write_table(pa.Table.from_pylist(rows[split], schema=schema), row_group_size=ROW_GROUP)
                counts[split] += len(rows[split])
    return {split: counts[split] for split in SPLITS}


def show(counts: dict[str, int]) -> str:
    """Rows by split as lines of text."""
    return "\n".join(f"{counts[split]:10d}  pairs in {split}" for split in SPLITS)


def main(argv: list[str] | None = None) -> None:
    recipe, workspace, flags = load_settings(__doc__ or "", StageFlags, argv=argv)
    assert workspace is not None
    with job("export_dataset", workspace):
        run(recipe, workspace, flags.overwrite)


if __name__ == "__main__":
    main()
