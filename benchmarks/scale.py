"""Scale without a GPU: many captions through the real jobs.generate_pairs, with a stand-in for the models alone.

Prints rows/s and the driver's memory for each size, and what a resume after SIGKILL at half of the rows costs:

    python -m benchmarks.scale --rows '[100000, 1000000]' --json
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field
from pydantic_settings import BaseSettings, CliApp, CliImplicitFlag, SettingsConfigDict
from rich.console import Console
from rich.table import Table

from ip2p.cli import read_recipe
from ip2p.pairs.generate import NOTHING
from ip2p.recipe import Recipe
from ip2p.records import INSTRUCTIONS, PAIRS
from ip2p.workspace import Workspace
from jobs import generate_pairs

ROWS_PER_FILE = 50_000
SECONDS_PER_ROW = 50e-6  # of the stand-in: so little that what is measured is the job


class Settings(BaseSettings):
    __doc__ = __doc__
    model_config = SettingsConfigDict(cli_prog_name="python -m benchmarks.scale", extra="forbid")

    rows: list[int] = Field([100_000, 1_000_000], description="captions of each run")
    rows_per_block: int = Field(2000, ge=1, description="captions of a write task")
    as_json: CliImplicitFlag[bool] = Field(False, alias="json", description="print one JSON object as the last line")
    child: str | None = Field(None, description="(internal) the workspace of a run in a process of its own")


class StandIn:
    """In the place of PairGenerator: constant time for a row, candidates without images."""

    def __init__(self, recipe: Recipe):
        self.candidates = [
            {"seed": k, "shared_attention_fraction": 0.5, "guidance_scale": 2.0, "verdict": "direction < 0.2"}
            for k in range(recipe.pairs.candidates)
        ]

    def __call__(self, batch: pa.Table) -> pa.Table:
        time.sleep(SECONDS_PER_ROW * batch.num_rows)
        made = {"candidates": self.candidates, "status": "rejected", "reason": "direction < 0.2"}
        rows = [row | NOTHING | made for row in batch.select(INSTRUCTIONS.names).to_pylist()]
        return pa.Table.from_pylist(rows, schema=PAIRS)


def write_instructions(workspace: Workspace, count: int) -> None:
    for start in range(0, count, ROWS_PER_FILE):
        rows = [
            (f"{n:016x}", f"caption {n}", "make it red", f"red caption {n}", "ok", "", "colour", 1)
            for n in range(start, min(start + ROWS_PER_FILE, count))
        ]
        table = pa.table(dict(zip(INSTRUCTIONS.names, map(list, zip(*rows, strict=True)), strict=True)), INSTRUCTIONS)
        with workspace.open_out("instructions", f"part-{start:09d}.parquet") as file:
            pq.write_table(table, file)
    workspace.mark_done("instructions", captions=count)


def run_job(workspace: Workspace, rows_per_block: int) -> None:
    """The real job, but for its models."""
    recipe = read_recipe("recipes/miniature.yaml")
    recipe = recipe.model_copy(update={"pairs": recipe.pairs.model_copy(update={"rows_per_block": rows_per_block})})
    generate_pairs.PairGenerator = StandIn  # pyright: ignore[reportAttributeAccessIssue]
    generate_pairs.run(recipe, workspace)


def start(settings: Settings, workspace: Workspace) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.scale", "--child", workspace.location]
    command += ["--rows_per_block", str(settings.rows_per_block)]
    return subprocess.Popen(command, start_new_session=True, stdout=sys.stderr)


def largest_memory(job: subprocess.Popen) -> int:
    """Waits for the end of a job; the largest resident memory of its own process, in MiB."""
    process, largest = psutil.Process(job.pid), 0
    while job.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended in between
            largest = max(largest, process.memory_info().rss // 2**20)
        time.sleep(0.5)
    return largest


def measure_run(settings: Settings, count: int, folder: Path) -> dict[str, float]:
    """One uninterrupted run: seconds, rows/s, and the driver's largest memory."""
    workspace = Workspace(str(folder))
    write_instructions(workspace, count)
    started = time.perf_counter()
    job = start(settings, workspace)
    memory = largest_memory(job)
    if job.returncode:
        raise RuntimeError(f"the job ended with {job.returncode}")
    seconds = time.perf_counter() - started
    assert workspace.counts("pairs")["captions"] == count
    return {"rows": count, "seconds": seconds, "rows_per_second": count / seconds, "driver_mib": memory}


def measure_resume(settings: Settings, count: int, folder: Path) -> float:
    """Seconds of a run that is killed when half of its rows are written, and of the one that goes on, together."""
    workspace = Workspace(str(folder))
    write_instructions(workspace, count)
    started = time.perf_counter()
    job = start(settings, workspace)
    while sum(path.endswith(".parquet") for path in workspace.files("pairs")) < count // settings.rows_per_block // 2:
        if job.poll() is not None:
            raise RuntimeError(f"the job ended with {job.returncode} before half of its rows were written")
        time.sleep(0.2)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    if start(settings, workspace).wait():
        raise RuntimeError("the resumed job failed")
    seconds = time.perf_counter() - started
    ids = workspace.read_table("pairs", columns=["caption_id"])["caption_id"]
    assert len(ids) == len(set(ids.to_pylist())) == count, "rows were lost or doubled"
    return seconds


def main(argv: list[str] | None = None) -> None:
    settings = CliApp.run(Settings, cli_args=argv)
    if settings.child:
        run_job(Workspace(settings.child), settings.rows_per_block)
        return
    table = Table("rows", "seconds", "rows/s", "driver MiB")
    with tempfile.TemporaryDirectory() as folder:
        runs = [measure_run(settings, count, Path(folder, str(count))) for count in settings.rows]
        resumed = measure_resume(settings, int(runs[-1]["rows"]), Path(folder, "resumed"))
    for run in runs:
        table.add_row(*(f"{run[name]:,.0f}" for name in ("rows", "seconds", "rows_per_second", "driver_mib")))
    found = {f"{name}_{run['rows']:.0f}": run[name] for run in runs for name in ("rows_per_second", "driver_mib")}
    found["resume_cost"] = resumed / runs[-1]["seconds"] - 1
    table.caption = f"killed at half and resumed: {found['resume_cost']:+.1%} of the time of the uninterrupted run"
    Console().print(table)
    if settings.as_json:
        print(json.dumps({name: round(value, 4) for name, value in found.items()}))


if __name__ == "__main__":
    main()
