"""Workers that die and GPUs that break, on a local Ray with pretended GPUs: to Ray they are numbers."""

import os
import subprocess
import sys
from collections import Counter

import pyarrow as pa
import pytest
import ray

from ip2p.errors import DeviceError
from ip2p.recipe import REPOSITORY
from ip2p.workspace import Workspace
from runtime import guard, rows

# A chain with a guard on two GPUs. `Worker` stands for a model's class; each row is a caption.
JOB = """
import os, signal, sys, time
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy
from ip2p.errors import DeviceError
from ip2p.workspace import Workspace
from runtime.connect import connect
from runtime.guard import CrashGuard, CrashLedger
from runtime.progress import StageCounters
from runtime.rows import TASKS_PER_ACTOR, chain

class Worker:
    def __init__(self, fault):
        self.fault, self.calls = fault, 0
        if fault == "load" and ray.get_gpu_ids()[0] == 0:
            raise DeviceError("CUDA error: uncorrectable ECC error encountered")
    def __call__(self, table):
        self.calls += 1
        for n in range(table.num_rows):
            time.sleep(0.2)
            row = table.slice(n, 1)
            broken = self.fault == "gpu" and ray.get_gpu_ids()[0] == 0 and self.calls > 1
            poison = self.fault == "row" and row["caption_id"][0].as_py() == "0003"
            if broken or poison or self.fault == "all":
                raise DeviceError("CUDA error: uncorrectable ECC error encountered")
            yield outcome(row, "ok", "")

def outcome(row, status, reason):
    gpu = pa.array([ray.get_gpu_ids()[0]])
    return (row.select(["caption_id"]).append_column("status", pa.array([status]))
            .append_column("reason", pa.array([reason])).append_column("gpu", gpu))

ray.init("local", num_cpus=4, num_gpus=2, include_dashboard=False)
connect()
ledger = CrashLedger()
def steps(dataset, counters):
    ledger.start_pass()
    arguments = (Worker, (sys.argv[2],), ledger, lambda row, reason: outcome(row, "failed", reason))
    return dataset.map_batches(
        CrashGuard, fn_constructor_args=arguments, batch_format="pyarrow", batch_size=2, num_cpus=0.1,
        num_gpus=1, compute=ActorPoolStrategy(size=2, max_tasks_in_flight_per_actor=TASKS_PER_ACTOR),
    )
chain(Workspace(sys.argv[1]), "source", "sink", "caption_id", 2, steps, StageCounters("test"), 1,
      lost_blocks=TASKS_PER_ACTOR)
"""


def run_job(workspace: Workspace, fault: str, count: int = 24) -> tuple[subprocess.CompletedProcess, list[dict]]:
    table = pa.table({"caption_id": [f"{k:04d}" for k in range(count)]})
    rows.put_table(workspace, table, "source", "a.parquet")
    command = [sys.executable, "-c", JOB, workspace.location, fault]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    found = workspace.read_table("sink").to_pylist() if rows.files(workspace, "sink") else []
    return done, sorted(found, key=lambda row: row["caption_id"])


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["gpu", "load"])
def test_a_gpu_that_breaks_again_and_again_is_held_and_its_rows_are_done_elsewhere(tmp_path, fault):
    """It breaks at work, in each process from its second batch on, or when the models are loaded."""
    done, found = run_job(Workspace(tmp_path / "run"), fault)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["caption_id"] for row in found] == [f"{k:04d}" for k in range(24)]
    assert {row["status"] for row in found} == {"ok"}
    said = done.stdout + done.stderr
    assert "GPU 0 of node" in said and "(3 of 3)" in said and "(4 of 3)" not in said
    assert Counter(row["gpu"] for row in found)[1] > 12, "the healthy GPU did most of the work"


@pytest.mark.slow
def test_a_row_that_breaks_two_gpus_is_failed(tmp_path):
    """The first GPU is blamed until a second one breaks at the same row."""
    done, found = run_job(Workspace(tmp_path / "run"), "row")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(found) == 24
    assert [(row["caption_id"], row["reason"]) for row in found if row["status"] == "failed"] == [
        ("0003", "broke 2 GPUs: CUDA error: uncorrectable ECC error encountered")
    ]


@pytest.mark.slow
def test_without_a_healthy_gpu_the_job_ends_with_the_devices_error(tmp_path):
    done, found = run_job(Workspace(tmp_path / "run"), "all")
    assert done.returncode == 1
    assert "DeviceError" in done.stderr and "uncorrectable ECC" in done.stderr
    assert found == []


# ---- the ledger's rules, without Ray ----


def ledger() -> guard._Ledger:
    held = guard._Ledger()
    held._hold = lambda device: held.holders.append(device)
    return held


def test_a_row_is_given_up_after_two_deaths_alone():
    book = ledger()
    assert [book.begin_alone("a") for _ in range(3)] == ["", "", "killed its worker 3 times"]
    book.end("a")
    assert book.begin_alone("a") == ""


def test_a_batch_that_comes_again_is_known():
    book = ledger()
    assert [book.begin(("a", "b")), book.begin(("a", "b"))] == [0, 1]
    book.end(("a", "b"))
    assert book.begin(("a", "b")) == 0


def test_breaks_of_one_gpu_are_no_deaths_of_a_row():
    book = ledger()
    book.join("first")
    book.join("second")
    for n in range(1, 4):
        assert book.begin_alone("a") == ""
        assert book.note_break(("node", "0"), "ECC", "a", "first") == (n, 1)
    assert book.begin_alone("a") == "", "a healthy GPU has not tried it yet"
    assert book.note_break(("node", "1"), "ECC", "a", "second") == (1, 0)
    assert book.begin_alone("a") == "broke 2 GPUs: ECC"


def test_a_gpu_is_held_once_from_its_third_break():
    book = ledger()
    for _ in range(5):
        book.note_break(("node", "0"), "ECC", None, "first")
        book.note_break(("other", "0"), "ECC", None, "second") if not book.holders else None
    assert book.holders == [("node", "0")]
    assert book.is_held(("node", "0")) and not book.is_held(("other", "0"))
    assert not book.is_held(None)


def test_without_a_gpu_a_devices_error_is_a_plain_one(local_ray):
    """There is nothing to hold: the error is shown."""

    class Broken:
        def __call__(self, _):
            raise DeviceError("CUDA error")

    guarded = guard.CrashGuard(Broken, (), guard.CrashLedger(), lambda row, _: row)
    assert ray.get_gpu_ids() == [] and os.environ.get("CUDA_VISIBLE_DEVICES") in (None, "")
    with pytest.raises(DeviceError):
        list(guarded(pa.table({"caption_id": ["a"]})))
