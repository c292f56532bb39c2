"""Scale without a GPU: many captions through the real jobs.generate_pairs, with a stand-in for the models alone.

Prints the time until a job's first rows are written, rows/s from then on and the driver's memory for each size, and
what a resume after SIGKILL at half of the rows costs. That is one more start, which weighs less the longer a run is:

    python -m benchmarks.scale --rows '[100000, 1000000]' --json
    python -m benchmarks.scale --rows '[1000000]' --milliseconds_per_row 2 --json
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


class Settings(BaseSettings):
    __doc__ = __doc__
    model_config = SettingsConfigDict(cli_prog_name="python -m benchmarks.scale", extra="forbid")

    rows: list[int] = Field([100_000, 1_000_000], description="captions of each run")
    rows_per_block: int = Field(2000, ge=1, description="captions of a write task")
    milliseconds_per_row: float = Field(0.05, gt=0, description="of the stand-in; so little that the job is measured")
    as_json: CliImplicitFlag[bool] = Field(False, alias="json", description="print one JSON object as the last line")
    child: str | None = Field(None, description="(internal) the workspace of a run in a process of its own")


class StandIn:
    """In the place of PairGenerator: constant time for a row, candidates without images."""

    milliseconds_per_row: float

    def __init__(self, recipe: Recipe):
        self.candidates = [
            {"seed": k, "shared_attention_fraction": 0.5, "guidance_scale": 2.0, "verdict": "direction < 0.2"}
            for k in range(recipe.pairs.candidates)
        ]

    def __call__(self, batch: pa.Table) -> pa.Table:
        time.sleep(self.milliseconds_per_row / 1000 * batch.num_rows)
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


def run_job(settings: Settings, workspace: Workspace) -> None:
    """The real job, but for its models."""
    recipe = read_recipe("recipes/miniature.yaml")
    recipe = recipe.model_copy(
        update={"pairs": recipe.pairs.model_copy(update={"rows_per_block": settings.rows_per_block})}
    )
    stand_in = type("StandIn", (StandIn,), {"milliseconds_per_row": settings.milliseconds_per_row})
    generate_pairs.PairGenerator = stand_in  # pyright: ignore[reportAttributeAccessIssue]
    generate_pairs.run(recipe, workspace)


def start(settings: Settings, workspace: Workspace) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.scale", "--child", workspace.location]
    for name in ("rows_per_block", "milliseconds_per_row"):
        command += [f"--{name}", str(getattr(settings, name))]
    return subprocess.Popen(command, start_new_session=True, stdout=sys.stderr)


def written(workspace: Workspace) -> int:
    """Blocks that are."""
    return sum(path.endswith(".parquet") for path in workspace.files("pairs"))


def measure_run(settings: Settings, count: int, folder: Path) -> dict[str, float]:
    """One uninterrupted run: seconds, those until its first rows were written, rows/s from then on, and the largest
    memory of the driver, in MiB."""
    workspace = Workspace(str(folder))
    write_instructions(workspace, count)
    began = time.perf_counter()
    job = start(settings, workspace)
    driver, memory, first = psutil.Process(job.pid), 0, None
    while job.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended in between
            memory = max(memory, driver.memory_info().rss // 2**20)
        if first is None and (blocks := written(workspace)):
            first = (time.perf_counter() - began, blocks * settings.rows_per_block)
        time.sleep(0.2)
    if job.returncode:
        raise RuntimeError(f"the job ended with {job.returncode}")
    seconds = time.perf_counter() - began
    assert workspace.counts("pairs")["captions"] == count and first is not None
    rate = (count - first[1]) / (seconds - first[0])
    return {"rows": count, "seconds": seconds, "start": first[0], "rows_per_second": rate, "driver_mib": memory}


def measure_resume(settings: Settings, count: int, folder: Path) -> float:
    """Seconds of a run that is killed when half of its rows are written, and of the one that goes on, together."""
    workspace = Workspace(str(folder))
    write_instructions(workspace, count)
    started = time.perf_counter()
    job = start(settings, workspace)
    while written(workspace) < count // settings.rows_per_block // 2:
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
        run_job(settings, Workspace(settings.child))
        return
    table = Table("rows", "seconds", "of these until the first rows", "rows/s from then on", "driver MiB")
    with tempfile.TemporaryDirectory() as folder:
        runs = [measure_run(settings, count, Path(folder, str(count))) for count in settings.rows]
        resumed = measure_resume(settings, int(runs[-1]["rows"]), Path(folder, "resumed"))
    for run in runs:
        table.add_row(*(f"{run[name]:,.0f}" for name in ("rows", "seconds", "start", "rows_per_second", "driver_mib")))
    columns = ("start", "rows_per_second", "driver_mib")
    found = {f"{name}_{run['rows']:.0f}": run[name] for run in runs for name in columns}
    found["resume_seconds"] = resumed - runs[-1]["seconds"]
    found["resume_cost"] = resumed / runs[-1]["seconds"] - 1
    table.caption = (
        f"killed at half and resumed: {found['resume_seconds']:+.0f} s, {found['resume_cost']:+.1%} of the "
        "uninterrupted run"
    )
    Console().print(table)
    if settings.as_json:
        print(json.dumps({name: round(value, 4) for name, value in found.items()}))


if __name__ == "__main__":
    main()
