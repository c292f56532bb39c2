"""The resumable chain: no row lost, none doubled, whatever is killed, late or forgotten."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import ray
from ray.data._internal.execution.interfaces import TaskContext

from ip2p.errors import UserError
from ip2p.recipe import REPOSITORY
from ip2p.workspace import Workspace
from runtime import rows
from runtime.progress import StageCounters
from runtime.rows import Sink, Written, adds_up, chain, forget, id_sum, newest_epoch, read_ids, reconcile
from tests.runtime import s3

WRITE = """
import sys
import pyarrow as pa
from ray.data._internal.execution.interfaces import TaskContext
from ip2p.workspace import Workspace
from runtime.rows import Sink
sink = Sink(Workspace(sys.argv[1]), "sink", "id", sys.argv[2], 4)
print(sink.write([pa.table({"id": ["a", "b"]}), pa.table({"id": ["c"]})], TaskContext(0, "Write")))
"""

JOB = """
import sys
from ip2p.workspace import Workspace
from runtime.connect import connect
from runtime.progress import StageCounters
from runtime.rows import chain, newest_epoch
workspace = Workspace(sys.argv[1])
connect()
def steps(rows, counters):
    return rows.map_batches(lambda table: table, batch_format="pyarrow", num_cpus=0.1)
epoch = newest_epoch(workspace, "sink") + 1
chain(workspace, "source", "sink", "id", 4, steps, StageCounters("test"), epoch)
"""


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace(tmp_path / "run")


@pytest.fixture
def bucket(monkeypatch):
    """Address of an S3 server, which pyarrow in this process finds."""
    with s3.s3_server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield environment["AWS_ENDPOINT_URL"]


def write(workspace: Workspace, folder: str, name: str, ids: list[str], **columns: list) -> None:
    table = pa.table({"id": pa.array(ids, pa.string()), **columns})
    rows.put_table(workspace, table, folder, f"{name}.parquet")


def ids_in(workspace: Workspace, folder: str) -> list[str]:
    return [value.decode() for value in read_ids(workspace, folder, "id")]


def source_of(workspace: Workspace, count: int) -> list[str]:
    """Write `source/` in two files, and return its ids."""
    ids = [f"{k:04d}" for k in range(count)]
    write(workspace, "source", "a", ids[: count // 3])
    write(workspace, "source", "b", ids[count // 3 :])
    return ids


def run(workspace: Workspace, steps=lambda dataset, _: dataset, **how):
    epoch = newest_epoch(workspace, "sink") + 1
    return chain(workspace, "source", "sink", "id", 4, steps, StageCounters("test"), epoch, **how)


# ---- the files ----


def test_a_task_writes_one_file_and_its_retry_the_same(workspace):
    sink = Sink(workspace, "sink", "id", "000003-1", 4, count=lambda table: {"rows": table.num_rows})
    blocks = [pa.table({"id": ["a", "b"]}), pa.table({"id": []}), pa.table({"id": ["c"]})]
    first = sink.write(blocks, TaskContext(12, "Write"))
    assert first == sink.write(blocks, TaskContext(12, "Write"))
    assert (first.name, first.rows, first.counts) == ("000003-1-000012.parquet", 3, {"rows": 3})
    assert workspace.files("sink") == [workspace.path("sink", "000003-1-000012.parquet")]
    assert rows.files(workspace, "sink") == {first.name: first.size}
    assert ids_in(workspace, "sink") == ["a", "b", "c"]
    assert sink.write([pa.table({"id": []})], TaskContext(13, "Write")).rows == 0
    assert len(workspace.files("sink")) == 1


def test_a_write_that_fails_leaves_the_file_as_it_was(workspace):
    write(workspace, "sink", "000001-0-000000", ["a"])

    class Failing(pafs.LocalFileSystem):
        def move(self, *_):
            raise OSError("no space left")

    failing = Workspace(workspace.location)
    failing.fs = Failing()
    with pytest.raises(OSError, match="no space left"):
        write(failing, "sink", "000001-0-000000", ["a", "b"])
    assert len(workspace.files("sink")) == 2
    # No reader sees the partial file.
    assert ids_in(workspace, "sink") == ["a"]
    assert workspace.read_table("sink")["id"].to_pylist() == ["a"]
    rows.remove_unfinished(workspace, "sink")
    assert len(workspace.files("sink")) == 1


def test_files_of_a_newer_run_end_this_one():
    names = ["000002-0-000000.parquet", "000002-1-000007.parquet", "part-0.parquet"]
    assert rows.next_pass(names, 2) == 2
    assert rows.next_pass(names, 3) == 0
    with pytest.raises(RuntimeError, match="2 files are of a newer run"):
        rows.next_pass(names, 1)


def test_a_million_ids_are_cheap():
    ids = np.sort(np.array([f"{k * 7919 % 10**6:016x}".encode() for k in range(10**6)]))
    assert ids.dtype == "S16" and ids.nbytes == 16 * 10**6
    some = pa.table({"id": [f"{k:016x}" for k in range(999_990, 1_000_010)]})
    ref = ids

    class Ref:  # as ray.get gives it: read-only
        pass

    ref.flags.writeable = False
    started = time.perf_counter()
    original, ray.get = ray.get, lambda _: ref
    try:
        kept = [rows.rows_among(Ref(), "id", some) for _ in range(100)]  # pyright: ignore
    finally:
        ray.get = original
    assert time.perf_counter() - started < 5
    assert kept[0]["id"].to_pylist() == some["id"].to_pylist()[:10]


# ---- reconciling ----


def test_of_doubled_rows_the_newest_is_kept(workspace):
    write(workspace, "sink", "000001-0-000000", ["a", "b"], by=[1, 1])
    write(workspace, "sink", "000001-0-000001", ["c"], by=[1])
    write(workspace, "sink", "000002-0-000000", ["b", "c", "d", "d"], by=[2, 2, 2, 3])
    names, missing = reconcile(workspace, "sink", "id", np.array([b"a", b"b", b"c", b"d", b"e"]))
    assert list(names) == ["000001-0-000000.parquet", "000002-0-000000.parquet"]
    assert missing.tolist() == [b"e"]
    table = workspace.read_table("sink").to_pylist()
    assert [(row["id"], row["by"]) for row in table] == [("a", 1), ("b", 2), ("c", 2), ("d", 2)]


def test_rows_that_the_source_does_not_have_are_the_users_decision(workspace):
    write(workspace, "sink", "000001-0-000000", ["a", "x", "y"])
    with pytest.raises(UserError, match=r"sink has 2 rows that its source does not have, .*--overwrite"):
        reconcile(workspace, "sink", "id", np.array([b"a", b"b"]))
    assert ids_in(workspace, "sink") == ["a", "x", "y"]


def failed_rows(table: pa.Table):
    return pc.equal(table["status"], "failed")  # pyright: ignore[reportAttributeAccessIssue]


def test_forgotten_rows_are_missing_and_the_others_stay(workspace):
    write(workspace, "sink", "000001-0-000000", ["a", "b"], status=["ok", "failed"])
    write(workspace, "sink", "000001-0-000001", ["c"], status=["failed"])
    write(workspace, "sink", "000001-0-000002", ["d", "e"], status=["ok", None])
    assert forget(workspace, "sink", ["status"], failed_rows) == 2
    assert ids_in(workspace, "sink") == ["a", "d", "e"]
    assert len(workspace.files("sink")) == 2
    assert forget(workspace, "sink", ["status"], failed_rows) == 0


def test_forgetting_may_be_interrupted_at_any_write(workspace, monkeypatch):
    wanted = np.array([f"{k}".encode() for k in range(6)])
    for at in range(3):
        for part in range(3):
            status = ["failed", "ok" if part else "failed"]
            write(workspace, "sink", f"000001-0-{part:06d}", [f"{2 * part}", f"{2 * part + 1}"], status=status)
        done, drop = [], rows.drop_rows

        def interrupted(*arguments, at=at, done=done, drop=drop):
            if len(done) == at:
                raise KeyboardInterrupt
            done.append(drop(*arguments))

        with monkeypatch.context() as patch:
            patch.setattr(rows, "drop_rows", interrupted)
            with pytest.raises(KeyboardInterrupt):
                forget(workspace, "sink", ["status"], failed_rows)
        # A plain run asks for what was forgotten; the same command forgets the rest.
        _, missing = reconcile(workspace, "sink", "id", wanted)
        assert len(missing) + len(ids_in(workspace, "sink")) == 6
        forget(workspace, "sink", ["status"], failed_rows)
        _, missing = reconcile(workspace, "sink", "id", wanted)
        assert missing.tolist() == [b"0", b"1", b"2", b"4"]


# ---- the chain on Ray ----


def test_the_chain_resumes_and_adds_what_the_source_gained(workspace, local_ray):
    ids = source_of(workspace, 30)
    seen = Path(workspace.path("seen"))

    def steps(dataset, counters):
        def note(table: pa.Table) -> pa.Table:
            with seen.open("a") as file:
                file.writelines(f"{id_}\n" for id_ in table["id"].to_pylist())
            return table

        return dataset.map_batches(note, batch_format="pyarrow")

    written = run(workspace, steps, count=lambda table: {"rows": table.num_rows})
    assert ids_in(workspace, "sink") == ids
    assert sum(file.counts["rows"] for file in written) == 30
    assert {file.name: file.size for file in written} == rows.files(workspace, "sink")
    assert all(file.name.startswith("000001-0-") for file in written)
    before = rows.files(workspace, "sink")
    assert run(workspace, steps) == [] and rows.files(workspace, "sink") == before

    write(workspace, "source/key=value", "c", ["more"])  # hive partitioning would add a column
    [file] = run(workspace, steps)
    assert (file.name[:9], file.rows) == ("000002-0-", 1)
    assert sorted(seen.read_text().split()) == [*ids, "more"]
    assert workspace.read_table("sink").column_names == ["id"]


def test_missing_rows_are_asked_for_again_and_only_those(workspace, local_ray):
    ids = source_of(workspace, 20)
    passes = []

    def forgetful(dataset, counters):
        passes.append(dataset)
        if len(passes) > 1:
            assert dataset.count() == 2
            return dataset
        return dataset.filter(lambda row: row["id"] not in ("0003", "0017"))

    written = run(workspace, forgetful)
    assert ids_in(workspace, "sink") == ids
    assert sorted({file.name[:8] for file in written}) == ["000001-0", "000001-1"]


def test_rows_that_never_come_are_a_bug_with_a_count(workspace, local_ray):
    source_of(workspace, 8)
    with pytest.raises(RuntimeError, match="2 of 8 rows of source are missing after 2 passes"):
        run(workspace, lambda dataset, _: dataset.filter(lambda row: row["id"] not in ("0003", "0005")))


def test_one_row_lost_and_one_doubled_are_seen_although_the_counts_agree(workspace, local_ray):
    ids = source_of(workspace, 8)
    passes = []

    def swap(dataset, counters):
        passes.append(dataset)
        if len(passes) > 1:
            return dataset

        def replaced(table: pa.Table) -> pa.Table:
            return pa.table({"id": ["0001" if id_ == "0002" else id_ for id_ in table["id"].to_pylist()]})

        return dataset.map_batches(replaced, batch_format="pyarrow")

    run(workspace, swap)
    assert ids_in(workspace, "sink") == ids


def test_the_late_write_of_a_replaced_run_is_dropped(workspace, local_ray):
    """It comes while this run is at work: the run has listed the files before."""
    ids = source_of(workspace, 12)
    write(workspace, "sink", "000004-0-000000", ids[:3])

    def steps(dataset, counters):
        write(workspace, "sink", "000004-0-000001", ids[3:7])
        return dataset

    run(workspace, steps)
    assert ids_in(workspace, "sink") == ids
    assert "000004-0-000001.parquet" not in rows.files(workspace, "sink")


@pytest.mark.slow
def test_large_rows_leave_their_actor_before_its_batch_is_done(workspace, local_ray):
    """The first file is there while the actor is still at the last rows of its only batch."""
    write(workspace, "source", "a", [f"{k}" for k in range(6)])

    class Slow:
        def __call__(self, table: pa.Table):
            for n in range(table.num_rows):
                time.sleep(2)
                image = pa.array([os.urandom(2 * rows.BLOCK_BYTES)])
                yield table.slice(n, 1).append_column("image", image)
                Path(workspace.path("out")).write_text(f"{n}")

    def steps(dataset, counters):
        return dataset.map_batches(
            Slow, batch_format="pyarrow", batch_size=6, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=0.4
        )

    epoch = newest_epoch(workspace, "sink") + 1
    chain(workspace, "source", "sink", "id", 6, steps, StageCounters("test"), epoch, rows_per_file=1)
    times = [Path(path).stat().st_mtime for path in workspace.files("sink")]
    assert len(times) == 6 and max(times) - min(times) > 6


# ---- an object store, and a kill after every request ----


def test_a_writer_killed_after_any_request_leaves_all_or_nothing(bucket):
    """The process that writes a file is killed after each of its requests, in turn."""
    workspace = Workspace("s3://bucket/run")
    requests: list[int] = []
    with s3.counting_proxy(bucket, "sink", lambda number, _: requests.append(number)) as address:
        start(WRITE, address, "s3://bucket/dry", "000001-0").wait()
    assert len(requests) == 3, "create, part, complete"
    for at in requests:
        job: list[subprocess.Popen] = []

        def kill(number: int, _: int, at=at, job=job) -> None:
            if number == at:
                job[0].kill()
                job[0].wait()

        with s3.counting_proxy(bucket, "sink", kill) as address:
            job.append(start(WRITE, address, "s3://bucket/run", f"{at:06d}-0"))
            assert job[0].wait(timeout=120) == -signal.SIGKILL
        found = ids_in(workspace, "sink")
        assert found == (["a", "b", "c"] if at == len(requests) else [])
    assert reconcile(workspace, "sink", "id", np.array([b"a", b"b", b"c"]))[1].tolist() == []


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_job_killed_after_any_request_of_a_commit_loses_and_doubles_nothing(bucket):
    """The whole job dies, one request later each time; the same command follows."""
    workspace = Workspace("s3://bucket/run")
    ids: list[str] = []
    done = 0
    for at in range(1, 8):
        # Workers may outlive their driver for a moment and finish what they have begun.
        more = [f"{at}{k:03d}" for k in range(16)]
        write(workspace, "source", f"{at}", more)
        ids += more
        job: list[subprocess.Popen] = []

        def kill(number: int, _: int, at=at, job=job) -> None:
            if number == at:
                os.killpg(job[0].pid, signal.SIGKILL)
                job[0].wait()

        with s3.counting_proxy(bucket, "sink", kill) as address:
            job.append(start(JOB, address, "s3://bucket/run"))
            assert job[0].wait(timeout=200) == -signal.SIGKILL
        found = ids_in(workspace, "sink")
        assert len(found) == len(set(found)) >= done
        done = len(found)
    assert done > 0
    assert start(JOB, bucket, "s3://bucket/run").wait(timeout=200) == 0
    assert ids_in(workspace, "sink") == ids


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_workers_killed_after_requests_of_a_commit_are_replaced(bucket):
    """Create, part and complete, each the last request of a worker."""
    workspace = Workspace("s3://bucket/run")
    ids = source_of(workspace, 12)
    killed: list[int] = []

    def kill(number: int, port: int) -> None:
        if number in (1, 3, 6):
            for connection in psutil.net_connections("tcp"):
                if connection.laddr.port == port and connection.pid not in (None, os.getpid()):
                    os.kill(connection.pid, signal.SIGKILL)
                    killed.append(number)

    with s3.counting_proxy(bucket, "sink", kill) as address:
        assert start(JOB, address, "s3://bucket/run").wait(timeout=400) == 0
    assert killed == [1, 3, 6]
    assert ids_in(workspace, "sink") == ids


def start(code: str, address: str, *arguments: str) -> subprocess.Popen:
    """Python code in a process group of its own, whose S3 is at `address`."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=REPOSITORY,
        start_new_session=True,
        env={**os.environ, "AWS_ENDPOINT_URL": address},
    )


@pytest.mark.parametrize(
    ("ids", "foreign", "right"),
    [
        (["c", "d"], False, True),
        (["c", "c"], False, False),  # as many rows, and one of them twice
        (["c", "x"], False, False),
        (["c"], False, False),
        (["c", "d"], True, False),  # somebody else writes there, too
    ],
)
def test_a_pass_adds_up_only_with_the_missing_rows_and_no_other_file(tmp_path, ids, foreign, right):
    workspace = Workspace(tmp_path)
    before = {}
    for name, kept in {"000001-0-000000.parquet": ["a", "b"], "000001-1-000000.parquet": ids}.items():
        with workspace.open_out("sink", name) as file:
            pq.write_table(pa.table({"id": kept}), file)
        size = (tmp_path / "sink" / name).stat().st_size
        if name.startswith("000001-0"):
            before[name] = size
    if foreign:
        shutil.copy(tmp_path / "sink" / name, tmp_path / "sink" / "000001-1-000009.parquet")
    written = Written(name, len(ids), size, id_sum(np.array(ids, "S")))
    assert adds_up(workspace, "sink", before, np.array(["c", "d"], "S"), [written]) == right
