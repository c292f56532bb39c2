"""A vision-language model looks at every edit of the sweep and gives marks, with its reasons (`evaluate.judge`).

evaluation/metrics.parquet -> questions -> vLLM -> answers -> evaluation/judged.parquet, one row for each edit: the
columns of the sweep, three marks, and why there are none where there are none. jobs.evaluate does it after the sweep.
"""

import json
import time
from collections import Counter
from typing import Any

import pyarrow as pa
from ray.data import ActorPoolStrategy, Dataset

from ip2p.cli import load_settings
from ip2p.errors import UserError
from ip2p.evaluate.judge import JUDGED, Questions, read_answer, schema
from ip2p.recipe import Judge, Recipe
from ip2p.records import Answer, digest
from ip2p.report.page import write_report
from ip2p.workspace import Workspace
from runtime.connect import connect
from runtime.job import job
from runtime.progress import Tally
from runtime.rows import ACTOR_CPUS, TASK_CPUS, begin, chain
from runtime.vllm import Engines, Row, engine_config

SOURCE, SINK, DONE = "evaluation/metrics.parquet", "evaluation/judged.parquet", "evaluation/judge"


def run(recipe: Recipe, workspace: Workspace) -> None:
    """Write `evaluation/judged.parquet`. The same call goes on where a killed one stopped; another judge begins anew.

    Raises `UserError` without a judge in the recipe, or before the sweep has run.
    """
    started, judge = time.perf_counter(), recipe.evaluate.judge
    if judge is None:
        raise UserError("evaluate.judge is null: name a vision-language model, evaluate.judge: {model: {path: ...}}")
    if not workspace.done("evaluation"):
        raise UserError(f"{workspace.uri(SOURCE)} is not whole: run jobs.evaluate first")
    plan = fingerprint(recipe, judge, workspace)
    if workspace.done(DONE) and workspace.counts(DONE)["plan"] == plan:
        print("judge_edits: done already")
        return
    begin(workspace, plan, (DONE, SINK, f"checkpoints/{SOURCE}"))
    connect()
    print(f"judge_edits: {judge.replicas} vLLM engine(s) with {judge.model.path}", flush=True)

    engines = Engines()

    def steps(rows: Dataset, tally: Tally) -> Dataset:
        return judged(rows, tally, engines, recipe, judge, workspace)

    with engines.cause_named():
        chain(workspace, SOURCE, SINK, "edit_id", judge.batch_size, steps)
    rows = workspace.read_table(SINK, columns=["judge_status", "judge_error"]).to_pylist()
    counts: dict[str, Any] = dict(Counter(row["judge_status"] for row in rows))
    workspace.mark_done(DONE, plan=plan, **counts)
    workspace.record("judge_edits", seconds=time.perf_counter() - started, **counts)
    print("judge_edits: " + ", ".join(f"{counts.get(status, 0)} {status}" for status in ("ok", "failed")))
    for error, number in Counter(row["judge_error"] for row in rows if row["judge_error"]).most_common():
        print(f"  {number:6d} {error}")


def fingerprint(recipe: Recipe, judge: Judge, workspace: Workspace) -> str:
    """Changes when marks would: with the judge and the edits."""
    keys = [judge.model.model_dump(mode="json"), judge.max_tokens, recipe.seed, workspace.counts("evaluation")["plan"]]
    return f"{digest(json.dumps(keys, sort_keys=True)):016x}"


def judged(
    rows: Dataset, tally: Tally, engines: Engines, recipe: Recipe, judge: Judge, workspace: Workspace
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
        fn_kwargs={"tally": tally},
        batch_format="pyarrow",
        batch_size=None,
        num_cpus=TASK_CPUS,
    )


def noted(rows: pa.Table, tally: Tally) -> pa.Table:
    """Count `rows` for the line of progress, and return them as they are."""
    tally.add({"rows": rows.num_rows})
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
    recipe, workspace, _ = load_settings(__doc__ or "", argv=argv)
    assert workspace is not None
    with job("judge_edits", workspace):
        run(recipe, workspace)
        write_report(recipe, workspace)


if __name__ == "__main__":
    main()
