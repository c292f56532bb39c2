"""Evaluate editors on a benchmark of the field: parquet files with the columns of MagicBrush or Emu Edit.

benchmark -> benchmark/sessions/ (the turns of an image together) -> BenchmarkScorer (edit, measure) -> benchmark/edits/
-> benchmark/metrics.parquet, one row for each edit; a table, and a section of report.html. A session with several turns
is edited twice: each turn on its own source image, and each on the result of the turn before it.
"""

from itertools import count, islice

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field
from rich.console import Console
from rich.table import Table

from ip2p.cli import StageFlags, load_settings
from ip2p.errors import UserError
from ip2p.evaluate.benchmark.layouts import (
    BENCHMARK,
    MULTI,
    SESSIONS,
    SINGLE,
    Layout,
    benchmark_files,
    detect,
    read_sessions,
)
from ip2p.evaluate.benchmark.scorer import BenchmarkScorer
from ip2p.evaluate.bootstrap import Estimate
from ip2p.recipe import Recipe
from ip2p.report.benchmark import BenchmarkTable, summarize_benchmark
from ip2p.report.page import write_report
from ip2p.stage import Stage, short_digest
from ip2p.workspace import Workspace
from jobs.evaluate import check, editors
from runtime.connect import connect
from runtime.job import job
from runtime.progress import StageCounters
from runtime.rows import chain, run_epoch, scored

SESSIONS_PER_FILE = 32  # some MB each
SESSIONS_PER_TASK = 4  # what a crash can cost


class Flags(StageFlags):
    benchmark: str = Field(
        description="parquet file or folder with MagicBrush's or Emu Edit's columns, local or s3://…"
    )


def run(recipe: Recipe, workspace: Workspace, benchmark: str, overwrite: bool = False) -> list[BenchmarkTable]:
    """Write `benchmark/` and `report.html`. The same call goes on where a killed one stopped.

    Raises `UserError` when there is no editor, for files that are no benchmark, and when `benchmark/` was made with
    another benchmark, model or recipe.
    """
    check(recipe)
    names = editors(recipe, workspace)
    source = Workspace(benchmark)
    files = benchmark_files(source)
    layout = detect(source, files)
    stage = stage_of(recipe, workspace, source, names)
    if not stage.begin(overwrite):
        print("evaluate_benchmark: the benchmark is complete")
    else:
        group(workspace, source, files, layout)
        counts = workspace.counts("benchmark/sessions")
        print(
            f"evaluate_benchmark: {counts['turns']} edits of {counts['sessions']} images of {layout.name} by "
            f"{', '.join(names)} and the unchanged input",
            flush=True,
        )
        connect()
        modes = (SINGLE, MULTI) if layout.turn else (SINGLE,)
        arguments = (recipe, workspace, names, modes)
        chain(
            workspace,
            "benchmark/sessions",
            "benchmark/edits",
            "id",
            SESSIONS_PER_TASK,
            lambda rows, counters: scored(rows, counters, recipe, BenchmarkScorer, arguments, SESSIONS_PER_TASK),
            StageCounters("evaluate"),
            run_epoch(workspace, "benchmark/edits"),
        )
        counts |= write_metrics(workspace)
        stage.finish(counts, rows=counts["edits"], failed=counts["failed"], example="see benchmark/metrics.parquet")
    write_report(recipe, workspace)
    tables = summarize_benchmark(workspace)
    show(tables)
    print(f"evaluate_benchmark: {workspace.uri('benchmark/metrics.parquet')} and report.html are written")
    return tables


def stage_of(recipe: Recipe, workspace: Workspace, source: Workspace, names: list[str]) -> Stage:
    """Return the stage of evaluating the editors `names` on the benchmark in `source`, told by its files."""
    infos = source.fs.get_file_info(benchmark_files(source))
    files = short_digest([[info.path.removeprefix(source.root), info.size] for info in infos])
    return Stage(workspace, "benchmark", recipe, also={"editors": names, "--benchmark": f"files {files}"})


def group(workspace: Workspace, source: Workspace, files: list[str], layout: Layout) -> None:
    """The benchmark -> benchmark/sessions/, one row for each session: a job reads and checkpoints whole rows."""
    if workspace.done("benchmark/sessions"):
        return
    print(f"evaluate_benchmark: reading {len(files)} files of {source.location}", flush=True)
    sessions, counts = read_sessions(source, files, layout), {"sessions": 0, "turns": 0}
    for part in count():
        rows = list(islice(sessions, SESSIONS_PER_FILE))
        if not rows:
            break
        with workspace.open_out("benchmark/sessions", f"part-{part:05d}.parquet") as file:
            pq.write_table(pa.Table.from_pylist(rows, schema=SESSIONS), file)
        counts["sessions"] += len(rows)
        counts["turns"] += sum(len(row["turns"]) for row in rows)
    if not counts["sessions"]:
        raise UserError(f"benchmark: the files of {source.location!r} have no rows")
    workspace.mark_done("benchmark/sessions", **counts)


def write_metrics(workspace: Workspace) -> dict[str, int]:
    """benchmark/edits/ -> benchmark/metrics.parquet, one row for each edit, without images; returns the counts."""
    sessions = workspace.read_table("benchmark", "edits", columns=["id", "edits"]).to_pylist()
    assert len(sessions) == workspace.counts("benchmark/sessions")["sessions"], "a session was lost or doubled"
    rows = [{"id": session["id"]} | edit for session in sessions for edit in session["edits"]]
    rows.sort(key=lambda row: (row["model"], row["mode"], row["id"], row["turn"] or 0))
    with workspace.open_out("benchmark", "metrics.parquet", "part-0.parquet") as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=BENCHMARK), file)
    return {"edits": len(rows), "failed": sum(row["status"] != "ok" for row in rows)}


def show(tables: list[BenchmarkTable]) -> None:
    for found in tables:
        table = Table("mean (95% interval)", *found.models, title=found.title)
        for name, means in found.means.items():
            table.add_row(name, *map(interval, means))
        table.add_row("edits", *map(str, found.edits))
        if any(found.failed):
            table.add_row("failed", *map(str, found.failed))
        Console().print(table)


def interval(mean: Estimate) -> str:
    return f"{mean.mean:.3f} ({mean.low:.3f}–{mean.high:.3f})" if mean.count else "–"


def main(argv: list[str] | None = None) -> None:
    needs = ("workspace", "models.clip", "models.dino")
    recipe, workspace, flags = load_settings(__doc__ or "", Flags, argv=argv, needs=needs)
    assert workspace is not None
    with job("evaluate_benchmark", workspace):
        run(recipe, workspace, flags.benchmark, flags.overwrite)


if __name__ == "__main__":
    main()
