"""Stage 4: fine-tune the UNet to follow instructions, and export an editor that diffusers loads.

dataset/ -> encode once to latents/ -> train, with checkpoints under checkpoints/ -> model/
"""

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import ray
import ray.train
import torch
from ray.data import ActorPoolStrategy, SaveMode
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import get_device

from ip2p.cli import StageFlags, load_settings
from ip2p.errors import UserError
from ip2p.models import TextToImage, load_text_to_image
from ip2p.recipe import Recipe, locate
from ip2p.stage import Stage, fingerprint, short_digest
from ip2p.train.checkpoint import BrokenCheckpointError, load, save
from ip2p.train.dataset import (
    columns,
    content,
    dataset_files,
    file_splits,
    share_of_train,
    trained_pairs,
    validation_rows,
)
from ip2p.train.encode import SPLITS, PairEncoder
from ip2p.train.export import export
from ip2p.train.latents import LatentPairs, write_local_cache
from ip2p.train.loop import train
from ip2p.train.previews import contact_sheet
from ip2p.train.unet import widen_conv_in
from ip2p.workspace import Workspace
from runtime.board import Board
from runtime.connect import connect, uses_gpu
from runtime.exit import user_error_in
from runtime.job import job
from runtime.mlflow_board import MLflowBoard
from runtime.trainer import Trainer

CURVE = pa.schema(
    [("step", pa.int64())]
    + [(name, pa.float64()) for name in ("loss", "learning_rate", "grad_norm", "samples_per_second", "validation_loss")]
)
ROWS_PER_ENCODING_BATCH = 32
SECONDS_BETWEEN_LINES = 10


def run(recipe: Recipe, workspace: Workspace, data: Workspace | None = None, overwrite: bool = False) -> None:
    """Train on the workspace's dataset and write `model/`. The same call resumes an interrupted run.

    `data` is the workspace that holds complete latents/, where it is another one: several runs share them.
    Raises `UserError` when `latents/` or `model/` was made with another recipe.
    """
    # Ray Train would move its workers to another directory, where a recipe's relative paths mean nothing.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    recipe = with_base(recipe)
    if data is None:
        data = workspace
        encode(recipe, workspace, overwrite)
    stage = Stage(workspace, "model", recipe, inputs_in=data)
    if not stage.begin(overwrite):
        print(f"train: {workspace.uri('model')} is complete")
        return
    connect()
    checkpoint = fit(recipe, workspace, data, f"train-{short_digest(stage.what)}")
    stage.finish(write_model(recipe, workspace, data, checkpoint))
    print(f"train: {workspace.uri('model')} is written; diffusers loads it as it is")


def with_base(recipe: Recipe) -> Recipe:
    """The recipe with `train.base` filled in and its path absolute, the same for every process."""
    base = recipe.train.base or recipe.models.text_to_image
    base = base.model_copy(update={"path": locate(base.path, "train.base.path")})
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"base": base})})


def load_base(recipe: Recipe, device: str) -> TextToImage:
    """The model to train, its UNet widened."""
    assert recipe.train.base is not None
    model = load_text_to_image(recipe.train.base, recipe.models.vae, device, key="train.base")
    widen_conv_in(model.unet)
    return model


def encode(recipe: Recipe, workspace: Workspace, overwrite: bool = False) -> None:
    """Write the dataset's `latents/`, unless that was done from the same files by the same model.

    With `overwrite` latents of another recipe are replaced; equal ones are kept. Raises `UserError` when there is
    nothing to train on, or too much of it is unreadable.
    """
    source, paths = dataset_files(recipe, workspace)
    also: dict[str, Any] = {"train.dataset": f"files {short_digest(content(source, paths))}"}
    if recipe.train.random_resize:
        also["seed"] = recipe.seed  # of the crops: nothing else about latents is random
    stage = Stage(workspace, "latents", recipe, also=also)
    if not stage.begin(overwrite and bool(stage.changes())):
        return
    wanted = columns(source, paths)
    connect()
    print(f"train: encoding {len(paths)} files of {source.location} to latents/", flush=True)
    (
        ray.data.read_parquet(paths, filesystem=source.fs, columns=wanted, include_paths=True, partitioning=None)
        .map_batches(
            PairEncoder,
            fn_constructor_args=(recipe, file_splits(source, paths)),
            batch_format="pyarrow",
            batch_size=ROWS_PER_ENCODING_BATCH,
            compute=ActorPoolStrategy(size=recipe.train.encode_replicas),
            num_gpus=1 if uses_gpu(recipe.device) else 0,
        )
        .write_parquet(workspace.path("latents"), filesystem=workspace.fs, mode=SaveMode.OVERWRITE)
    )
    rows = workspace.read_table("latents", columns=["pair_id", "split", "status", "reason"]).to_pylist()
    failed = [row for row in rows if row["status"] != "ok"]
    for row in failed[:5]:
        print(f"train: pair {row['pair_id']} is left out: {row['reason']}")
    pairs = {split: sum(row["split"] == split and row["status"] == "ok" for row in rows) for split in SPLITS}
    if not pairs["train"]:
        raise UserError(f"no pair of {source.location} can be read: see the reasons above, and run jobs.export_dataset")
    example = f"{failed[0]['pair_id']}: {failed[0]['reason']}" if failed else ""
    stage.finish(pairs | {"failed": len(failed)}, rows=len(rows), failed=len(failed), example=example)


def fit(recipe: Recipe, workspace: Workspace, data: Workspace, name: str) -> ray.train.Checkpoint:
    """Run the training loop on Ray Train; returns the checkpoint that becomes the model.

    `name` is that of the run in TensorBoard and MLflow.
    """
    gpu = uses_gpu(recipe.device)
    node_cpus = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    cpus = 1 if gpu else cpus_per_worker(recipe.train.worker_range[1], node_cpus)
    encoded = data.counts("latents")
    validates = bool(encoded["validation"])
    if recipe.train.export == "best" and not validates:
        raise UserError(
            "train.export: best, but there are no held-out pairs to tell by; see dataset.validation_fraction"
        )
    if recipe.train.compile and not gpu:
        print("train: train.compile is for GPUs and is ignored: on CPUs it takes minutes and gains nothing")
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": False})})
    trainer = Trainer(
        train_loop_per_worker,
        train_loop_config={"recipe": recipe, "workspace": workspace, "data": data, "cpus": cpus, "name": name},
        scaling_config=ScalingConfig(
            num_workers=recipe.train.workers,  # a range is elastic
            use_gpu=gpu,
            resources_per_worker={"CPU": cpus} | ({"GPU": 1} if gpu else {}),
        ),
        run_config=RunConfig(
            name="model",
            storage_path=workspace.path("checkpoints"),
            storage_filesystem=workspace.fs,
            checkpoint_config=CheckpointConfig(
                num_to_keep=recipe.train.keep,
                checkpoint_score_attribute="validation_loss" if validates else None,
                checkpoint_score_order="min",
            ),
            failure_config=FailureConfig(max_failures=2),
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.WorkerGroupError as error:
        mistakes = [failure for failure in error.worker_failures.values() if user_error_in(failure)]
        if not mistakes:
            raise
        raise UserError(user_error_in(mistakes[0])) from error
    best = recipe.train.export == "best"
    checkpoint = result.get_best_checkpoint("validation_loss", "min") if best else result.checkpoint
    assert checkpoint is not None
    return checkpoint


def cpus_per_worker(workers: int, node_cpus: list[float]) -> int:
    """The most CPUs that every worker can have, where none spans two nodes; 1 if the cluster has yet to grow."""
    largest = int(max(node_cpus, default=1))
    return next((c for c in range(largest, 0, -1) if sum(cpus // c for cpus in node_cpus) >= workers), 1)


def threads_per_worker(cpus: int, workers_here: int) -> int:
    """As many as it has CPUs, but no more than its share of this machine has: Ray may count more CPUs."""
    return max(1, min(cpus, (os.cpu_count() or 1) // workers_here))


def train_loop_per_worker(config: dict[str, Any]) -> None:
    """One rank: load, resume from the last checkpoint if there is one, train and report."""
    recipe, workspace, data = config["recipe"], config["workspace"], config["data"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(threads_per_worker(config["cpus"], context.get_local_world_size()))
    model = load_base(recipe, str(get_device()))
    here, folders = local_latents(recipe, data)
    pairs = LatentPairs(folders["train"], recipe.train.one_per_caption)
    validation = LatentPairs(folders["validation"]) if "validation" in folders else None
    state, curve, again = load_last_readable_checkpoint(ray.train.get_checkpoint(), model.device)
    if state is not None and state["step"] > recipe.train.steps:
        raise UserError(f"train.steps: {recipe.train.steps}, but this run is at step {state['step']} already; raise it")
    if rank == 0:
        begin = f"from step {state['step']}" if state else "from the start"
        print(f"train: {pairs.count} samples, {recipe.train.steps} steps, {begin}, on {world_size} x {model.device}")
    printer = Printer(recipe.train.steps)
    boards: list[Board | MLflowBoard] = []
    if rank == 0:
        boards.append(Board(workspace, config["name"], state["step"] if state else 0))
    if rank == 0 and recipe.train.mlflow is not None:
        boards.append(MLflowBoard(recipe.train.mlflow, workspace, config["name"], recipe))
    shown = validation_rows(recipe, data)

    def look(step: int) -> None:
        sheet = contact_sheet(model, shown, recipe)
        for board in boards:
            board.image("edits", sheet, step)

    def report(metrics: dict[str, float], state: dict[str, Any] | None) -> None:
        if rank == 0:
            curve.append({name: metrics.get(name) for name in CURVE.names})
            printer(metrics, force=state is not None)
            for board in boards:
                board.scalars(
                    {name: metrics[name] for name in CURVE.names[1:] if name in metrics}, int(metrics["step"])
                )
        if state is None:
            return
        checkpoint = None
        if rank == 0:
            directory = tempfile.mkdtemp()  # Ray Train removes it once it is uploaded
            save(state, curve, directory)
            write_curve(workspace, curve)
            for board in boards:
                board.publish()
            checkpoint = ray.train.Checkpoint.from_directory(directory)
        ray.train.report(
            metrics,
            checkpoint=checkpoint,
            checkpoint_dir_name=f"step-{state['step']:07d}{again}",
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        )

    train(
        model,
        pairs,
        recipe.train,
        seed=recipe.seed,
        report=report,
        validation=validation,
        state=state,
        look=look if shown else None,
        rank=rank,
        world_size=world_size,
    )
    for board in boards:
        board.finish()
    if context.get_local_rank() == 0:
        shutil.rmtree(here)


def local_latents(recipe: Recipe, data: Workspace) -> tuple[Path, dict[str, Path]]:
    """A folder of this machine, and in it those of each split that has pairs; the machine's first worker makes them."""
    counts = data.counts("latents")
    which = short_digest([data.uri("latents"), fingerprint(data, "latents"), *share_of_train(recipe)])
    here = Path(tempfile.gettempdir(), f"ip2p-latents-{which}")
    folders = {split: here / split for split in SPLITS if counts[split]}
    if ray.train.get_context().get_local_rank() == 0:
        paths = [path for path in data.files("latents") if path.endswith(".parquet")]
        for split, folder in folders.items():
            fraction, seed = share_of_train(recipe) if split == "train" else (1.0, 0)
            write_local_cache(data.fs, paths, split, folder, fraction, seed)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return here, folders


def load_last_readable_checkpoint(
    checkpoint: ray.train.Checkpoint | None, device: str
) -> tuple[dict[str, Any] | None, list[dict[str, Any]], str]:
    """(state of the loop, loss curve so far, what to add to the names of new checkpoints); (None, [], "") at first.

    Of the last checkpoint, or where it is broken of the one before it that is not. The broken one keeps its name, by
    which Ray will remove it in its turn: a new one of that step must have another.

    Raises `UserError` when none can be read.
    """
    if checkpoint is None:
        return None, [], ""
    assert checkpoint.filesystem is not None
    folder, _, last = checkpoint.path.rpartition("/")
    infos = checkpoint.filesystem.get_file_info(pafs.FileSelector(folder))
    names = sorted(info.base_name for info in infos if info.base_name.startswith("step-"))
    for name in [name for name in reversed(names) if name <= last]:
        try:
            state, curve = load_checkpoint(ray.train.Checkpoint(f"{folder}/{name}", checkpoint.filesystem), device)
        except BrokenCheckpointError as error:
            print(f"train: checkpoint {folder}/{name} is broken ({error}): resuming from the one before", flush=True)
            continue
        return state, curve, "" if name == last else f"-{short_digest(names)}"
    raise UserError(f"no checkpoint in {folder} can be read: --overwrite trains from the start")


def load_checkpoint(checkpoint: ray.train.Checkpoint, device: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return (state of the loop, loss curve). Raises `BrokenCheckpointError`, or the error of a failed download."""
    with checkpoint.as_directory() as directory:
        return load(directory, device)


def write_curve(workspace: Workspace, curve: list[dict]) -> None:
    """model/training.parquet, whole at every checkpoint."""
    with workspace.open_out("model", "training.parquet") as file:
        pq.write_table(pa.Table.from_pylist(curve, schema=CURVE), file)


class Printer:
    """A line of progress now and then."""

    def __init__(self, steps: int) -> None:
        self.steps, self.last = steps, 0.0

    def __call__(self, metrics: dict[str, float], force: bool) -> None:
        if not force and time.monotonic() - self.last < SECONDS_BETWEEN_LINES:
            return
        self.last = time.monotonic()
        minutes, seconds = divmod(round(metrics["eta_seconds"]), 60)
        validation = f", validation {metrics['validation_loss']:.4f}" if "validation_loss" in metrics else ""
        print(
            f"train: step {metrics['step']}/{self.steps}, loss {metrics['loss']:.4f}{validation}, "
            f"{metrics['samples_per_second']:.1f} samples/s, {minutes}:{seconds:02d} left",
            flush=True,
        )


def write_model(
    recipe: Recipe, workspace: Workspace, data: Workspace, checkpoint: ray.train.Checkpoint
) -> dict[str, Any]:
    """Export the averaged weights of a checkpoint to model/; returns what the model card says."""
    state, curve = load_checkpoint(checkpoint, "cpu")
    write_curve(workspace, curve)
    last = curve[-1]
    assert last["step"] == state["step"]
    counts = {
        "pairs": trained_pairs(recipe, data),
        "unreadable_pairs_left_out": data.counts("latents")["failed"],
        "steps": state["step"],
        "samples_seen": state["step"] * recipe.train.batch_size,
        "loss": round(last["loss"], 5),
        "validation_loss": last["validation_loss"] and round(last["validation_loss"], 5),
    }
    source, paths = dataset_files(recipe, data)
    prompts = pq.ParquetFile(source.fs.open_input_file(paths[0])).read(columns=["edit_prompt"])["edit_prompt"]
    example = next((prompt for prompt in prompts.to_pylist() if prompt), "make it night")
    with tempfile.TemporaryDirectory() as directory:
        export(load_base(recipe, "cpu"), state["ema"], recipe, counts, example, directory)
        workspace.fs.create_dir(workspace.path("model"), recursive=True)
        pafs.copy_files(directory, workspace.path("model"), destination_filesystem=workspace.fs)
    return counts


def main(argv: list[str] | None = None) -> None:
    needs = ("workspace", "models.text_to_image")
    recipe, workspace, flags = load_settings(__doc__ or "", StageFlags, argv=argv, needs=needs)
    assert workspace is not None
    with job("train", workspace):
        run(recipe, workspace, overwrite=flags.overwrite)


if __name__ == "__main__":
    main()
