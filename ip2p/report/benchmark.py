"""What a benchmark came to: means of every metric by mode and model, from `benchmark/metrics.parquet` alone."""

from dataclasses import dataclass

from ip2p.evaluate.benchmark.layouts import METRICS, MULTI, SINGLE
from ip2p.evaluate.bootstrap import Estimate, by_case, estimate
from ip2p.evaluate.sweep import UNCHANGED, editors_of
from ip2p.report.summary import Row, name_of
from ip2p.workspace import Workspace

LABELS = {
    "l1": "L1",
    "l2": "L2",
    "clip_i": "CLIP-I",
    "dino": "DINO",
    "clip_t": "CLIP-T",
    "clip_dir": "CLIP direction",
    "input_l1": "L1 to the input",
    "input_clip_i": "CLIP-I to the input",
    "input_dino": "DINO to the input",
}
assert list(LABELS) == METRICS.names
LESS_IS_BETTER = ("l1", "l2")  # but nearer to the input is no better: the unchanged one is nearest


@dataclass(frozen=True)
class BenchmarkTable:
    """One mode. `means` has, for each metric that there is, the mean of each model; edits and failed, how many."""

    title: str
    models: list[str]
    means: dict[str, list[Estimate]]
    edits: list[int]
    failed: list[int]


def summarize_benchmark(workspace: Workspace) -> list[BenchmarkTable]:
    """A table for each mode; none before `jobs.evaluate_benchmark` has run.

    MagicBrush reports all turns on their ground truth, and of the iterated ones the last of each session.
    """
    if not workspace.exists("benchmark", "metrics.parquet"):
        return []
    rows = workspace.read_table("benchmark", "metrics.parquet").to_pylist()
    last: dict[str, int] = {}
    for row in rows:
        last[row["id"]] = max(last.get(row["id"], 0), row["turn"] or 0)
    iterated = [row for row in rows if row["mode"] == MULTI]
    modes = {
        "single-turn: each turn on its own source image": [row for row in rows if row["mode"] == SINGLE],
        "multi-turn: each turn on the result of the turn before it": iterated,
        "multi-turn: the last turns alone": [row for row in iterated if (row["turn"] or 0) == last[row["id"]]],
    }
    return [_table(title, some) for title, some in modes.items() if some]


def _table(title: str, rows: list[Row]) -> BenchmarkTable:
    """The interval is over sessions: the turns of one are not independent."""
    models = [*editors_of(rows), UNCHANGED]
    ok, failed = (
        [sum((row["status"] == "ok") is done and row["model"] == m for row in rows) for m in models]
        for done in (True, False)
    )
    means = {
        LABELS[name] + (" ↓" if name in LESS_IS_BETTER else ""): estimate(
            *by_case(rows, name, models, lambda row: row["model"], case="id")
        )
        for name in METRICS.names
        if any(row[name] is not None for row in rows)
    }
    return BenchmarkTable(title, [name_of(model) for model in models], means, ok, failed)
