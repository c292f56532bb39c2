"""A vision-language model looks at every edit of the sweep and gives marks, with its reasons (`evaluate.judge`).

evaluation/metrics.parquet -> questions -> vLLM -> answers -> evaluation/judged.parquet, one row for each edit: the
columns of the sweep, three marks, and why there are none where there are none. jobs.evaluate does it after the sweep.
"""

import json
from collections import Counter
from typing import Any

import pyarrow as pa
from ray.data import ActorPoolStrategy, Dataset

from ip2p.cli import RowStageFlags, load_settings
from ip2p.errors import UserError
from ip2p.evaluate.judge import JUDGED, Questions, read_answer, schema
from ip2p.recipe import Judge, Recipe
from ip2p.records import Answer
from ip2p.report.page import write_report
from ip2p.stage import Stage
from ip2p.workspace import Workspace
from runtime.connect import connect
from runtime.job import job
from runtime.progress import StageCounters
from runtime.rows import ACTOR_CPUS, TASK_CPUS, chain, forget_failed, run_epoch
from runtime.vllm import Engines, Row, engine_config

SOURCE, SINK = "evaluation/metrics.parquet", "evaluation/judged.parquet"


def run(recipe: Recipe, workspace: Workspace, overwrite: bool = False, retry_failed: bool = False) -> None:
    """Write `evaluation/judged.parquet`. The same call resumes an interrupted run.

    Raises `UserError` without a judge in the recipe, before the sweep is complete, and for marks of another judge.
    """
    judge = recipe.evaluate.judge
    if judge is None:
        raise UserError("evaluate.judge is null: name a vision-language model, evaluate.judge: {model: {path: ...}}")
    stage = Stage(workspace, "judge", recipe)
    if not stage.begin(overwrite, retry_failed):
        print("judge_edits: all edits are judged")
        return
    if retry_failed:
        forget_failed(workspace, SINK, "judge_status")
    connect()
    print(f"judge_edits: {judge.replicas} vLLM engine(s) with {judge.model.path}", flush=True)

    engines = Engines()

    def steps(rows: Dataset, counters: StageCounters) -> Dataset:
        return judged(rows, counters, engines, recipe, judge, workspace)

    counters, epoch = StageCounters("evaluate"), run_epoch(workspace, SINK)
    with engines.cause_named():
        chain(workspace, SOURCE, SINK, "edit_id", judge.batch_size, steps, counters, epoch)
    rows = workspace.read_table(SINK, columns=["judge_status", "judge_error"]).to_pylist()
    counts: dict[str, Any] = dict(Counter(row["judge_status"] for row in rows))
    print("judge_edits: " + ", ".join(f"{counts.get(status, 0)} {status}" for status in ("ok", "failed")))
    for error, number in Counter(row["judge_error"] for row in rows if row["judge_error"]).most_common():
        print(f"  {number:6d} {error}")
    stage.finish(counts, rows=len(rows), failed=counts.get("failed", 0), example="see the reasons above")


def judged(
    rows: Dataset, counters: StageCounters, engines: Engines, recipe: Recipe, judge: Judge, workspace: Workspace
) -> Dataset:
    """Map METRICS to JUDGED by the model."""
    asked = rows.map_batches(
        Questions,  # pyright: ignore[reportArgumentType]
        fn_constructor_args=(workspace,),
        batch_format="pyarrow",
        batch_size=judge.batch_size,
        compute=ActorPoolStrategy(size=1),
        num_cpus=ACTOR_CPUS / 2,
    )
    return engines.answered(
        asked,
        engine_config(recipe, judge.model, "evaluate.judge.model.path", judge, chat=True, images=2),
        ask=lambda row: ask(row, judge.max_tokens),
        reader=lambda _device: Marks(),
        schema=JUDGED,
        id_column="row",
    ).map_batches(
        noted,  # pyright: ignore[reportArgumentType]
        fn_kwargs={"counters": counters},
        batch_format="pyarrow",
        batch_size=None,
        num_cpus=TASK_CPUS,
    )


def noted(rows: pa.Table, counters: StageCounters) -> pa.Table:
    """Count `rows` for the line of progress, and return them as they are."""
    counters.add({"rows": rows.num_rows})
    return rows


class Marks:
    """Reads what the model answered about each row of `Questions`. Each is asked once."""

    def read(self, asked: list[Row], answers: list[Answer], _attempt: int, _settled: list[Row]) -> list[Row]:
        """Return rows of JUDGED."""
        return [json.loads(row["row"]) | read_answer(answer) for row, answer in zip(asked, answers, strict=True)]

    def settled(self, _row: Row) -> bool:
        """Return True: failed marks stay."""
        return True


def ask(row: dict[str, Any], max_tokens: int) -> dict[str, Any]:
    """Return the columns for the engine. It gives its likeliest answer: the same edit has the same marks."""
    sampling = {"temperature": 0.0, "max_tokens": max_tokens, "structured_outputs": {"json": json.dumps(schema())}}
    return {"messages": json.loads(row["question"]), "sampling_params": sampling}


def main(argv: list[str] | None = None) -> None:
    recipe, workspace, flags = load_settings(__doc__ or "", RowStageFlags, argv=argv)
    assert workspace is not None
    with job("judge_edits", workspace):
        run(recipe, workspace, flags.overwrite, flags.retry_failed)
        write_report(recipe, workspace)


if __name__ == "__main__":
    main()
