"""A vision-language model looks at every edit of the sweep and gives marks, with its reasons (`evaluate.judge`).

evaluation/metrics.parquet -> questions -> vLLM -> answers -> evaluation/judged.parquet, one row for each edit: the
columns of the sweep, three marks, and why there are none where there are none. jobs.evaluate does it after the sweep.
"""

import json
from collections import Counter
from typing import Any

import pyarrow as pa
from ray.data import ActorPoolStrategy, Dataset
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

from ip2p.cli import StageFlags, load_settings
from ip2p.errors import UserError
from ip2p.evaluate.judge import JUDGED, Questions, read_answer, schema
from ip2p.recipe import Judge, Recipe, locate
from ip2p.report.page import write_report
from ip2p.stage import Stage
from ip2p.workspace import Workspace
from jobs.edit_captions import CPU_ENVIRONMENT, ENGINE_CPUS, ENGINE_RESTARTS
from runtime.connect import connect, uses_gpu
from runtime.job import job
from runtime.progress import StageCounters, WithCounters
from runtime.rows import ACTOR_CPUS, TASK_CPUS, chain, run_epoch

SOURCE, SINK = "evaluation/metrics.parquet", "evaluation/judged.parquet"


def run(recipe: Recipe, workspace: Workspace, overwrite: bool = False) -> None:
    """Write `evaluation/judged.parquet`. The same call resumes an interrupted run.

    Raises `UserError` without a judge in the recipe, before the sweep is complete, and for marks of another judge.
    """
    judge = recipe.evaluate.judge
    if judge is None:
        raise UserError("evaluate.judge is null: name a vision-language model, evaluate.judge: {model: {path: ...}}")
    stage = Stage(workspace, "judge", recipe)
    if not stage.begin(overwrite):
        print("judge_edits: all edits are judged")
        return
    connect()
    print(f"judge_edits: {judge.replicas} vLLM engine(s) with {judge.model.path}", flush=True)

    def steps(rows: Dataset, counters: StageCounters) -> Dataset:
        return judged(rows, counters, recipe, judge, workspace)

    counters, epoch = StageCounters("evaluate"), run_epoch(workspace, SINK)
    chain(workspace, SOURCE, SINK, "edit_id", judge.batch_size, steps, counters, epoch)
    rows = workspace.read_table(SINK, columns=["judge_status", "judge_error"]).to_pylist()
    counts: dict[str, Any] = dict(Counter(row["judge_status"] for row in rows))
    print("judge_edits: " + ", ".join(f"{counts.get(status, 0)} {status}" for status in ("ok", "failed")))
    for error, number in Counter(row["judge_error"] for row in rows if row["judge_error"]).most_common():
        print(f"  {number:6d} {error}")
    stage.finish(counts, rows=len(rows), failed=counts.get("failed", 0), example="see the reasons above")


def judged(rows: Dataset, counters: StageCounters, recipe: Recipe, judge: Judge, workspace: Workspace) -> Dataset:
    """METRICS -> questions -> the model -> JUDGED."""
    light: dict[str, Any] = {"num_cpus": TASK_CPUS}
    model = build_processor(
        engine_config(recipe, judge),
        preprocess=lambda row: ask(row, judge.max_tokens),
        postprocess=lambda row: answer_of(row, judge.max_tokens),
        preprocess_map_kwargs=light,
        postprocess_map_kwargs=light,
    )
    # As in jobs.edit_captions: Ray would start new engines for ever.
    model.get_stage_by_name("vLLMEngineStage").map_batches_kwargs["max_restarts"] = ENGINE_RESTARTS
    one: dict[str, Any] = {
        "batch_format": "pyarrow",
        "batch_size": judge.batch_size,
        "compute": ActorPoolStrategy(size=1),
        "num_cpus": ACTOR_CPUS / 2,
    }
    asked = rows.map_batches(Questions, fn_constructor_args=(workspace,), **one)  # pyright: ignore[reportArgumentType]
    return model(asked).map_batches(
        WithCounters,  # pyright: ignore[reportArgumentType]
        fn_constructor_args=(Marks, (), counters, lambda rows: {"rows": rows.num_rows}),
        **one,
    )


class Marks:
    """What comes back from the engine in, JUDGED out. Ray leads failed rows past `answer_of`: without its columns."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        wanted = {"row", "text", "cut", "__inference_error__"}  # the others of a failed row hold images
        rows = batch.select([name for name in batch.column_names if name in wanted]).to_pylist()
        return pa.Table.from_pylist([json.loads(row["row"]) | self._marks(row) for row in rows], schema=JUDGED)

    def _marks(self, row: dict[str, Any]) -> dict[str, Any]:
        return read_answer(row.get("text") or "", bool(row.get("cut")), row["__inference_error__"])


def engine_config(recipe: Recipe, judge: Judge) -> vLLMEngineProcessorConfig:
    """vLLM's engines in Ray Data: on GPUs where the recipe and the cluster have them, else on the CPU."""
    on_cpu, source = not uses_gpu(recipe.device), locate(judge.model.path, "evaluate.judge.model.path")
    engine: dict[str, Any] = {
        "dtype": judge.model.dtype,
        "revision": judge.model.revision,
        "max_model_len": judge.max_model_len,
        "limit_mm_per_prompt": {"image": 2},
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        "seed": recipe.seed,
    }
    if on_cpu:
        engine |= {"enforce_eager": True, "max_num_seqs": 16, "disable_log_stats": True}
    stage: dict[str, Any] = {"enabled": True, "num_cpus": TASK_CPUS}
    return vLLMEngineProcessorConfig(
        model_source=source,
        engine_kwargs=engine | judge.engine,
        concurrency=(judge.replicas, judge.replicas),
        batch_size=judge.batch_size,
        # "openai": the model's own chat template says where its images stand.
        prepare_multimodal_stage=stage
        | {"chat_template_content_format": "openai", "model_config_kwargs": {"revision": judge.model.revision}},
        chat_template_stage=stage,
        tokenize_stage=False,
        detokenize_stage=False,
        placement_group_config={"bundles": [{"CPU": ENGINE_CPUS}]} if on_cpu else None,
        runtime_env={"env_vars": CPU_ENVIRONMENT} if on_cpu else None,
        should_continue_on_error=True,
        log_engine_metrics=False,
    )


def ask(row: dict[str, Any], max_tokens: int) -> dict[str, Any]:
    """Columns for the engine. The likeliest answer: the same edit has the same marks."""
    sampling = {"temperature": 0.0, "max_tokens": max_tokens, "structured_outputs": {"json": json.dumps(schema())}}
    return {"messages": json.loads(row["question"]), "sampling_params": sampling}


def answer_of(row: dict[str, Any], max_tokens: int) -> dict[str, Any]:
    """What the engine wrote."""
    cut = row["num_generated_tokens"] >= max_tokens
    return {"row": row["row"], "text": row["generated_text"], "cut": cut}


def main(argv: list[str] | None = None) -> None:
    recipe, workspace, flags = load_settings(__doc__ or "", StageFlags, argv=argv)
    assert workspace is not None
    with job("judge_edits", workspace):
        run(recipe, workspace, flags.overwrite)
        write_report(recipe, workspace)


if __name__ == "__main__":
    main()
