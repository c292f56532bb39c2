"""Stage 5: sweep the two guidance scales over held-out images, judge every edit and every pair, write the report.

test images x (editors, scales, seeds) -> EditScorer -> evaluation/metrics.parquet; where truth is known also
instructions/ -> sample -> PairTruth -> evaluation/pair_truth.parquet; then report.html
"""

import json
import time
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import ActorPoolStrategy, DataContext, SaveMode
from ray.data.checkpoint import CheckpointConfig

from cluster.connect import connect, uses_gpu
from cluster.job import job
from cluster.progress import Counted, Tally, time_left
from ip2p.cli import load_settings
from ip2p.evaluate.editors import available
from ip2p.evaluate.pair_truth import PairTruth, sample_captions
from ip2p.evaluate.report import write_report
from ip2p.evaluate.scorer import EditScorer
from ip2p.evaluate.summary import Summary
from ip2p.evaluate.sweep import SHIPPED, plan_edits
from ip2p.evaluate.truth import test_set
from ip2p.recipe import Recipe, locate
from ip2p.records import digest
from ip2p.workspace import Workspace

# Less than a whole CPU each: on two cores a resumed run's checkpoint filter holds one, and tasks need room as well.
ACTOR_CPUS = 0.4
TASK_CPUS = 0.1
CHECKPOINT_FILTER_BYTES = 64 * 2**20  # at least; Ray asks for more when the ids need more
CAPTIONS_PER_TASK = 4


def run(recipe: Recipe, workspace: Workspace) -> Summary:
    """Write `evaluation/` and `report.html`. The same call goes on where a killed one stopped.

    Another model, or another recipe for it, starts anew. Raises `ValueError` when there is nothing to evaluate.
    """
    started = time.perf_counter()
    check(recipe)
    names = editors(recipe, workspace)
    plan = fingerprint(recipe, workspace, names)
    if workspace.done("evaluation") and workspace.counts("evaluation")["plan"] == plan:
        print(f"evaluate: done already, see {workspace.uri('report.html')}")
        return write_report(recipe, workspace)
    begin(workspace, plan)
    test = test_set(recipe, workspace)
    edits = plan_edits(recipe, test, names)
    print(f"evaluate: {edits.num_rows} edits of {test.num_rows} test images by {', '.join(names)} and the baselines")
    write_part(workspace, test, "test")
    write_part(workspace, edits, "edits")
    connect()
    rows_per_task = recipe.evaluate.batch_size
    source, sink = "evaluation/edits", "evaluation/metrics.parquet"
    chain(recipe, workspace, source, sink, "edit_id", EditScorer, (recipe, workspace, test), rows_per_task)
    counts: dict[str, Any] = {"edits": edits.num_rows, "test_images": test.num_rows}
    if recipe.truth == "oracle" and workspace.exists("instructions"):
        captions = sample_captions(recipe, workspace)
        print(f"evaluate: pairs of {captions.num_rows} captions, with and without attention sharing, by the oracle")
        write_part(workspace, captions, "pair_captions")
        source, sink = "evaluation/pair_captions", "evaluation/pair_truth.parquet"
        chain(recipe, workspace, source, sink, "caption_id", PairTruth, (recipe,), CAPTIONS_PER_TASK)
        counts["pair_captions"] = captions.num_rows
    workspace.mark_done("evaluation", plan=plan, **counts)
    seconds = time.perf_counter() - started
    workspace.record("evaluate", recipe=recipe.model_dump(mode="json"), seconds=seconds, **counts)
    summary = write_report(recipe, workspace)
    print(f"evaluate: {workspace.uri('report.html')} is written")
    return summary


def check(recipe: Recipe) -> None:
    """Raises `ValueError`, naming the key, when the shipped editor is to be evaluated and is not there."""
    if recipe.evaluate.shipped:
        locate(recipe.models.editor.path, "models.editor.path")


def editors(recipe: Recipe, workspace: Workspace) -> list[str]:
    """Names of the editors to evaluate."""
    names = [name for name in available(workspace) if recipe.evaluate.shipped or name != SHIPPED]
    if not names:
        raise ValueError(
            f"{workspace.location} has no model: run jobs.train, or evaluate the shipped one (evaluate.shipped: true)"
        )
    return names


def fingerprint(recipe: Recipe, workspace: Workspace, names: list[str]) -> str:
    """Changes when results would: with the recipe's keys that matter here, and with the trained model."""
    keys = recipe.model_dump(mode="json", include={"seed", "truth", "models", "pairs", "sampling", "evaluate"})
    for how_fast in ("batch_size", "replicas"):
        del keys["evaluate"][how_fast]
    del keys["models"]["dino"]  # of jobs.evaluate_benchmark
    trained = workspace.counts("model") if workspace.done("model") else None
    return f"{digest(json.dumps([keys, trained, names], sort_keys=True)):016x}"


def begin(workspace: Workspace, plan: str) -> None:
    """Remove what another plan has left behind."""
    if workspace.exists("evaluation", "plan.json"):
        with workspace.open_in("evaluation", "plan.json") as file:
            if json.loads(file.read()) == plan:
                return
        print("evaluate: the model or the recipe has changed, evaluating anew")
    for folder in ("evaluation", "checkpoints/evaluation"):
        if workspace.exists(folder):
            workspace.fs.delete_dir(workspace.path(folder))
    with workspace.open_out("evaluation", "plan.json") as file:
        file.write(json.dumps(plan).encode())


def write_part(workspace: Workspace, table: pa.Table, folder: str) -> None:
    with workspace.open_out("evaluation", folder, "part-0.parquet") as file:
        pq.write_table(table, file)


def chain(
    recipe: Recipe,
    workspace: Workspace,
    source: str,
    sink: str,
    id_column: str,
    actor: type,
    arguments: tuple,
    rows_per_task: int,
) -> None:
    """`source` -> actors -> `sink`, one row for each row; those written before are passed by."""
    checkpoints = CheckpointConfig(
        id_column=id_column,
        checkpoint_path=workspace.uri("checkpoints", source),
        delete_checkpoint_on_success=False,
    )
    checkpoints.checkpoint_actor_pool_max_size = 1
    checkpoints.checkpoint_actor_memory_bytes = CHECKPOINT_FILTER_BYTES
    context = DataContext.get_current()
    context.checkpoint_config = checkpoints
    light: dict[str, Any] = {"num_cpus": TASK_CPUS}
    tally, to_do = Tally("evaluate"), workspace.read_table(source, columns=[id_column]).num_rows
    if workspace.exists(sink):
        to_do -= workspace.read_table(sink, columns=[id_column]).num_rows
    name = source.rsplit("/", 1)[-1]
    try:
        with tally.shown(lambda counts, seconds: progress_line(name, counts["rows"], to_do, seconds)):
            (
                ray.data.read_parquet(workspace.path(source), filesystem=workspace.fs, num_cpus=TASK_CPUS)
                .repartition(target_num_rows_per_block=rows_per_task)
                .map_batches(
                    Counted,  # pyright: ignore[reportArgumentType]
                    fn_constructor_args=(actor, arguments, tally, lambda rows: {"rows": rows.num_rows}),
                    batch_format="pyarrow",
                    batch_size=rows_per_task,
                    compute=ActorPoolStrategy(size=recipe.evaluate.replicas),
                    num_cpus=ACTOR_CPUS,
                    num_gpus=1 if uses_gpu(recipe.device) else 0,
                )
                .write_parquet(
                    workspace.path(sink),
                    filesystem=workspace.fs,
                    mode=SaveMode.APPEND,
                    ray_remote_args=light,
                )
            )
    finally:
        context.checkpoint_config = None  # it is the whole process's, and other stages have other ids


def progress_line(what: str, done: int, to_do: int, seconds: float) -> str:
    return f"{what.replace('_', ' ')} {done:,} of {to_do:,}; {time_left(done, to_do, seconds)}"


def main(argv: list[str] | None = None) -> None:
    needs = ("workspace", "models.text_to_image", "models.clip")
    recipe, workspace, _ = load_settings(__doc__ or "", argv=argv, needs=needs)
    assert workspace is not None
    with job("evaluate", workspace):
        run(recipe, workspace)


if __name__ == "__main__":
    main()
