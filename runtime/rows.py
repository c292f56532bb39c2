"""The one resumable chain, `source` -> steps -> `sink`: no row is lost, none is doubled.

The data file is the commit. Each write task writes one parquet file, atomically, and names it after
the run, the pass and the task: `<epoch>-<pass>-<task>.parquet`. A retried task overwrites its own
file, and a row is done when a file holds its id. There is nothing else to keep in step with: no
checkpoint, no pending name.

A run reads the ids of both folders, asks for the rows that are missing, and compares again at the
end. A replaced run whose write comes late leaves a file of an older epoch; the newer copy is kept.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import ray
from ray.data import ActorPoolStrategy, Dataset, Datasink
from ray.data._internal.execution.interfaces import TaskContext
from ray.data.block import Block, BlockAccessor

from ip2p.errors import UserError
from ip2p.recipe import Recipe
from ip2p.workspace import Workspace
from runtime.connect import uses_gpu
from runtime.lease import lease_of
from runtime.progress import StageCounters, WithCounters, time_left

# Less than a whole CPU each: on two cores a stage's actors would leave nothing for its tasks.
ACTOR_CPUS = 0.4
TASK_CPUS = 0.1  # of a task that mostly waits
WRITE_CPUS = 0.25
# A row larger than this leaves its actor by itself, as soon as it is done. Smaller rows leave
# together. Ray plans memory by this number: with 1 byte, for rows of any size, it stands still.
BLOCK_BYTES = 2**20
# Tasks that an actor holds: one at work and one waiting.
TASKS_PER_ACTOR = 2
PASSES = 2  # the second is for rows that the first has left out
READERS = 32  # threads that read ids, each waiting for the storage most of the time

EPOCH_AND_PASS = re.compile(r"(\d{6})-(\d+)-\d{6}\.parquet")
PART = re.compile(r"\..+\.parquet\.\w+\.part")

Counts = dict[str, float]
Steps = Callable[[Dataset, StageCounters], Dataset]
Line = Callable[[Counter[str], float, int], str]  # counts, seconds, rows to do


@dataclass(frozen=True)
class Written:
    """A file that a write task has written."""

    name: str
    rows: int
    size: int  # bytes
    id_sum: int
    counts: Counts = field(default_factory=dict)


def chain(
    workspace: Workspace,
    source: str,
    sink: str,
    id_column: str,
    rows_per_task: int,
    steps: Steps,
    counters: StageCounters,
    epoch: int,
    line: Line | None = None,
    rows_per_file: int | None = None,
    count: Callable[[pa.Table], Counts] | None = None,
    lost_blocks: int = 0,
) -> list[Written]:
    """Run `steps` on the rows of `source` that `sink` does not have, and write the results there.

    Args:
        id_column: Names the column of strings that identifies a row in both folders.
        steps: Maps a dataset of rows of `source` to one of rows of `sink`. They count the "rows"
            that they have done in `counters`.
        epoch: The number of this run. It must be larger than that of any earlier run in `sink`.
        line: Formats a line of progress.
        rows_per_file: Rows collected for a file, at least. None: `rows_per_task`.
        count: Counts a file's rows for the `Written` of that file. Write tasks import its module,
            which should not import torch: four of them may run on each CPU of a node.
        lost_blocks: Blocks of `rows_per_task` rows that the first pass may lose without ending, for
            example with an actor whose GPU is broken. The second pass asks for them again.

    Returns:
        The files that this call has written, in no order.

    Raises:
        UserError: `sink` has rows that `source` does not have.
        RuntimeError: Rows are missing after the last pass, or `sink` has files of a newer run.
    """
    wanted = read_ids(workspace, source, id_column)
    if len(np.unique(wanted)) != len(wanted):
        raise ValueError(f"{workspace.uri(source)} has duplicate values of {id_column}")
    remove_unfinished(workspace, sink)
    written: list[Written] = []
    for number in range(PASSES):
        before, missing = reconcile(workspace, sink, id_column, wanted)
        if not len(missing):
            return written
        name = f"{epoch:06d}-{next_pass(before, epoch)}"
        to = Sink(workspace, sink, id_column, name, rows_per_file or rows_per_task, count)
        show = partial(_line, line or partial(progress_line, source), len(missing))
        with counters.shown(show):
            rows = missing_rows(workspace, source, id_column, missing, rows_per_task)
            rows.context.max_errored_blocks = 0 if number else lost_blocks
            steps(rows, counters).write_datasink(to, ray_remote_args={"num_cpus": WRITE_CPUS})
        written += to.written
        if adds_up(workspace, sink, before, missing, to.written):
            return written
    _, missing = reconcile(workspace, sink, id_column, wanted)
    if len(missing):
        raise RuntimeError(
            f"{workspace.uri(sink)}: {len(missing)} of {len(wanted)} rows of {source} are missing "
            f"after {PASSES} passes, the first is {missing[0].decode()}"
        )
    return written


def _line(line: Line, to_do: int, counts: Counter[str], seconds: float) -> str:
    return line(counts, seconds, to_do)


def missing_rows(
    workspace: Workspace,
    source: str,
    id_column: str,
    missing: np.ndarray,
    rows_per_task: int,
) -> Dataset:
    """Read the rows of `source` whose ids are in `missing`, in blocks of `rows_per_task`.

    Filtering and cutting ask for a whole CPU each, as Ray's cutting does: else they are not fused.
    """
    rows = ray.data.read_parquet(
        workspace.path(source),
        filesystem=workspace.fs,
        partitioning=None,  # a folder named key=value adds no column
    )
    rows.context.target_max_block_size = BLOCK_BYTES
    # The array lies in the object store once; every task of a node reads it in place.
    only = partial(rows_among, ray.put(missing), id_column)
    return rows.map_batches(only, batch_format="pyarrow", batch_size=None).repartition(
        target_num_rows_per_block=rows_per_task
    )


def rows_among(ids: "ray.ObjectRef[np.ndarray]", id_column: str, rows: pa.Table) -> pa.Table:
    """Keep the rows whose id is in the sorted array `ids`, which is not empty."""
    among = ray.get(ids)
    values = id_array(rows[id_column])
    nearest = among[np.minimum(np.searchsorted(among, values), len(among) - 1)]
    return rows.filter(pa.array(nearest == values))


class Sink(Datasink[Written]):
    """Writes the blocks of each write task into one file, `<name>-<task>.parquet`."""

    def __init__(
        self,
        workspace: Workspace,
        folder: str,
        id_column: str,
        name: str,
        rows_per_file: int,
        count: Callable[[pa.Table], Counts] | None = None,
    ):
        self.workspace, self.folder, self.id_column, self.name = workspace, folder, id_column, name
        self.rows_per_file, self.count = rows_per_file, count
        self.written: list[Written] = []

    @property
    def min_rows_per_write(self) -> int:
        return self.rows_per_file

    def write(self, blocks: Iterable[Block], ctx: TaskContext) -> Written:
        tables = [BlockAccessor.for_block(block).to_arrow() for block in blocks]
        name = f"{self.name}-{ctx.task_idx:06d}.parquet"
        tables = [table for table in tables if table.num_rows]
        if not tables:
            return Written(name, 0, 0, 0)
        table = pa.concat_tables(tables, promote_options="permissive")
        size = put_table(self.workspace, table, self.folder, name)
        counts = self.count(table) if self.count else {}
        ids = id_array(table[self.id_column])
        return Written(name, table.num_rows, size, id_sum(ids), counts)

    def on_write_complete(self, write_result: Any) -> None:
        self.written = [result for result in write_result.write_returns if result.rows]


def put_table(workspace: Workspace, table: pa.Table, folder: str, name: str) -> int:
    """Write a parquet file that exists whole or not at all, and return its size in bytes.

    A store's object appears when its upload is complete. The upload begins when the whole file is
    in memory: pyarrow completes the upload of a stream that an exception closes half-written.
    """
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    data = buffer.getvalue()
    path = workspace.path(folder, name)
    if isinstance(workspace.fs, pafs.LocalFileSystem):
        # Two attempts at one task may run at the same time, each with a name of its own.
        part = workspace.path(folder, f".{name}.{uuid4().hex}.part")
        workspace.fs.create_dir(workspace.path(folder), recursive=True)
        with workspace.fs.open_output_stream(part) as file:
            file.write(data)
        workspace.fs.move(part, path)
    else:
        with workspace.fs.open_output_stream(path) as file:
            file.write(data)
    return data.size


def reconcile(
    workspace: Workspace,
    sink: str,
    id_column: str,
    wanted: np.ndarray,
) -> tuple[dict[str, int], np.ndarray]:
    """Drop doubled rows of `sink`; return its files (name -> size) and the sorted ids it misses.

    Of a doubled row the copy in the newest file is kept.

    Raises:
        UserError: `sink` has ids that are not in `wanted`.
    """
    names = sorted(files(workspace, sink), reverse=True)
    parts = ids_of_files(workspace, [f"{sink}/{name}" for name in names], id_column)
    ids = np.concatenate([*parts, np.array([], "S1")])
    strange = ids[~np.isin(ids, wanted)]
    if len(strange):
        raise UserError(
            f"{workspace.uri(sink)} has {len(np.unique(strange))} rows that its source does not "
            f"have, the first is {strange[0].decode()}: the source has changed; "
            "pass --overwrite to start over"
        )
    doubled = doubles(ids)
    ends = np.cumsum([len(part) for part in parts])
    for name, mask in zip(names, np.split(doubled, ends[:-1]) if names else [], strict=True):
        if mask.any():
            print(f"{workspace.uri(sink, name)}: dropping {mask.sum()} rows that have a newer copy")
            drop_rows(workspace, sink, name, mask)
    return files(workspace, sink), np.setdiff1d(wanted, ids)


def doubles(ids: np.ndarray) -> np.ndarray:
    """Mark each id that stands earlier in `ids` as well: (n,) -> (n,) bool."""
    order = np.argsort(ids, kind="stable")
    mask = np.zeros(len(ids), bool)
    mask[order[1:]] = ids[order[1:]] == ids[order[:-1]]
    return mask


def adds_up(
    workspace: Workspace,
    sink: str,
    before: dict[str, int],
    missing: np.ndarray,
    written: Sequence[Written],
) -> bool:
    """Whether a pass has added the `missing` rows to `sink` and changed nothing else.

    Names, sizes and the facts of the write tasks tell it: no file is read.
    """
    expected = before | {file.name: file.size for file in written}
    return (
        files(workspace, sink) == expected
        and sum(file.rows for file in written) == len(missing)
        and sum(file.id_sum for file in written) % 2**64 == id_sum(missing)
    )


def forget(
    workspace: Workspace,
    sink: str,
    columns: list[str],
    which: Callable[[pa.Table], pa.Array | pa.ChunkedArray],
) -> int:
    """Remove rows from `sink`, so that the next run asks for them again; return their number.

    `which` maps a table of `columns` to booleans. Files are replaced one by one, each atomically:
    interrupted, this leaves some rows to be asked for and some as they were. Remove the stage's
    mark of completion first.
    """
    total = 0
    for name in files(workspace, sink):
        with workspace.open_in(sink, name) as file:
            mask = which(pq.ParquetFile(file).read(columns=columns))
        mask = mask.fill_null(False).to_numpy(zero_copy_only=False)
        if mask.any():
            drop_rows(workspace, sink, name, mask)
            total += int(mask.sum())
    return total


def forget_failed(workspace: Workspace, sink: str, column: str = "status") -> None:
    """Remove the rows of `sink` whose `column` is `failed`, and print their number."""
    rows = forget(workspace, sink, [column], lambda table: pc.equal(table[column], "failed"))  # pyright: ignore
    print(f"{workspace.uri(sink)}: {rows} failed rows will be done again", flush=True)


def drop_rows(workspace: Workspace, sink: str, name: str, mask: np.ndarray) -> None:
    """Replace a file of `sink` by one without the rows of `mask`, or remove it."""
    if mask.all():
        workspace.fs.delete_file(workspace.path(sink, name))
        return
    with workspace.open_in(sink, name) as file:
        table = pq.ParquetFile(file).read()
    put_table(workspace, table.filter(pa.array(~mask)), sink, name)


def files(workspace: Workspace, folder: str) -> dict[str, int]:
    """Return the parquet files of a folder: name -> size in bytes."""
    selector = pafs.FileSelector(workspace.path(folder), allow_not_found=True)
    infos = workspace.fs.get_file_info(selector)
    return {info.base_name: info.size for info in infos if info.path.endswith(".parquet")}


def remove_unfinished(workspace: Workspace, folder: str) -> None:
    """Remove the partial files of killed local writes. No reader sees them: they end in `.part`."""
    selector = pafs.FileSelector(workspace.path(folder), allow_not_found=True)
    for info in workspace.fs.get_file_info(selector):
        if PART.fullmatch(info.base_name):
            workspace.fs.delete_file(info.path)


def newest_epoch(workspace: Workspace, sink: str) -> int:
    """Return the largest epoch in the names of the files of `sink`; 0 without files."""
    found = map(EPOCH_AND_PASS.fullmatch, files(workspace, sink))
    return max((int(match[1]) for match in found if match), default=0)


def run_epoch(workspace: Workspace, sink: str) -> int:
    """Return the number of this run: that of its lease, and no smaller than that of any file of `sink`."""
    newest = newest_epoch(workspace, sink)
    lease = lease_of(workspace)
    return newest + 1 if lease is None else max(lease.epoch, newest)


def next_pass(names: Iterable[str], epoch: int) -> int:
    """Return a number of a pass that no file of this epoch has.

    Raises `RuntimeError` for files of a newer epoch: their run has replaced this one.
    """
    found = [match for match in map(EPOCH_AND_PASS.fullmatch, names) if match]
    newer = sum(int(match[1]) > epoch for match in found)
    if newer:
        raise RuntimeError(f"{newer} files are of a newer run than this one, of epoch {epoch}")
    return max((int(match[2]) + 1 for match in found if int(match[1]) == epoch), default=0)


def read_ids(workspace: Workspace, folder: str, id_column: str) -> np.ndarray:
    """Read the ids of all parquet files below a folder, sorted."""
    paths = [path for path in workspace.files(folder) if path.endswith(".parquet")]
    inside = [path.removeprefix(workspace.path("")) for path in paths]
    parts = ids_of_files(workspace, inside, id_column)
    return np.sort(np.concatenate([*parts, np.array([], "S1")]))


def ids_of_files(workspace: Workspace, paths: Sequence[str], id_column: str) -> list[np.ndarray]:
    """Read the ids of each file in the order of its rows. `paths` are relative to the workspace."""

    def read(path: str) -> np.ndarray:
        with workspace.open_in(path) as file:
            return id_array(pq.ParquetFile(file).read(columns=[id_column])[id_column])

    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(read, paths))


def id_array(column: pa.ChunkedArray) -> np.ndarray:
    """Strings -> fixed-width bytes, (n,): an array that processes share without a copy."""
    return np.array(pc.cast(column, pa.binary()).to_pylist(), dtype="S")


def id_sum(ids: np.ndarray) -> int:
    """Return the sum of a 64-bit hash of each id, which does not depend on their order."""
    digests = (hashlib.blake2b(value, digest_size=8).digest() for value in ids.tolist())
    return sum(int.from_bytes(digest, "big") for digest in digests) % 2**64


def scored(
    rows: Dataset,
    counters: StageCounters,
    recipe: Recipe,
    actor: type,
    arguments: tuple,
    rows_per_task: int,
) -> Dataset:
    """Map rows by `evaluate.replicas` actors, `actor(*arguments)`, on GPUs where there are any."""
    return rows.map_batches(
        WithCounters,  # pyright: ignore[reportArgumentType]
        fn_constructor_args=(actor, arguments, counters, lambda rows: {"rows": rows.num_rows}),
        batch_format="pyarrow",
        batch_size=rows_per_task,
        compute=ActorPoolStrategy(size=recipe.evaluate.replicas),
        num_cpus=ACTOR_CPUS,
        num_gpus=1 if uses_gpu(recipe.device) else 0,
    )


def progress_line(source: str, counts: Counter[str], seconds: float, to_do: int) -> str:
    """Format the default line of progress: `edits 3 of 20; 0:30 left`."""
    what, done = source.rsplit("/", 1)[-1].replace("_", " "), counts["rows"]
    return f"{what} {done:,} of {to_do:,}; {time_left(done, to_do, seconds)}"
