"""What the jobs that evaluate have in common: a folder -> a chain of steps -> another folder, resumable."""

import json
from collections.abc import Callable
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, SaveMode
from ray.data.checkpoint import CheckpointConfig

from ip2p.recipe import Recipe
from ip2p.workspace import Workspace
from runtime.connect import uses_gpu
from runtime.progress import Counted, Tally, time_left

# Less than a whole CPU each: on two cores a resumed run's checkpoint filter holds one, and tasks need room as well.
ACTOR_CPUS = 0.4
TASK_CPUS = 0.1
CHECKPOINT_FILTER_BYTES = 64 * 2**20  # at least; Ray asks for more when the ids need more


def begin(workspace: Workspace, plan: str, folders: tuple[str, ...]) -> None:
    """Remove `folders` unless they are of this plan, which the first of them holds."""
    if workspace.exists(folders[0], "plan.json"):
        with workspace.open_in(folders[0], "plan.json") as file:
            if json.loads(file.read()) == plan:
                return
        print(f"{folders[0]}: the model or the recipe has changed, it is made anew")
    for folder in folders:
        if workspace.exists(folder):
            workspace.fs.delete_dir(workspace.path(folder))
    with workspace.open_out(folders[0], "plan.json") as file:
        file.write(json.dumps(plan).encode())


def chain(
    workspace: Workspace,
    source: str,
    sink: str,
    id_column: str,
    rows_per_task: int,
    steps: Callable[[Dataset, Tally], Dataset],
) -> None:
    """`source` -> `steps` -> `sink`, one row for each row; those written before are passed by.

    A step tells the tally, or nobody sees how far it is, how many "rows" it has done.
    """
    checkpoints = CheckpointConfig(
        id_column=id_column,
        checkpoint_path=workspace.path("checkpoints", source),
        override_filesystem=workspace.fs,
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
            rows = ray.data.read_parquet(workspace.path(source), filesystem=workspace.fs, num_cpus=TASK_CPUS)
            steps(rows.repartition(target_num_rows_per_block=rows_per_task), tally).write_parquet(
                workspace.path(sink), filesystem=workspace.fs, mode=SaveMode.APPEND, ray_remote_args=light
            )
    finally:
        context.checkpoint_config = None  # it is the whole process's, and other stages have other ids


def scored(rows: Dataset, tally: Tally, recipe: Recipe, actor: type, arguments: tuple, rows_per_task: int) -> Dataset:
    """The step of `evaluate.replicas` actors, made with `arguments`, on GPUs where there are any."""
    return rows.map_batches(
        Counted,  # pyright: ignore[reportArgumentType]
        fn_constructor_args=(actor, arguments, tally, lambda rows: {"rows": rows.num_rows}),
        batch_format="pyarrow",
        batch_size=rows_per_task,
        compute=ActorPoolStrategy(size=recipe.evaluate.replicas),
        num_cpus=ACTOR_CPUS,
        num_gpus=1 if uses_gpu(recipe.device) else 0,
    )


def progress_line(what: str, done: int, to_do: int, seconds: float) -> str:
    return f"{what.replace('_', ' ')} {done:,} of {to_do:,}; {time_left(done, to_do, seconds)}"
