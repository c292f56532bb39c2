"""Stage 4: fine-tune the UNet to follow instructions, and export an editor that diffusers loads.

dataset/ -> encode once to latents/ -> train, with checkpoints under checkpoints/ -> model/
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import ray
import ray.train
import torch
from ray.data import ActorPoolStrategy, SaveMode
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import get_device

from ip2p.cli import load_settings
from ip2p.errors import UserError
from ip2p.models import TextToImage, load_text_to_image
from ip2p.recipe import Recipe, locate
from ip2p.train.encode import REQUIRED, SPLITS, WELCOME, PairEncoder
from ip2p.train.export import export
from ip2p.train.latents import LatentPairs, lay_out, some_captions
from ip2p.train.loop import train
from ip2p.train.previews import contact_sheet, is_readable
from ip2p.train.unet import widen_conv_in
from ip2p.workspace import Workspace
from runtime.board import Board
from runtime.connect import connect, uses_gpu
from runtime.job import job
from runtime.mlflow_board import MLflowBoard
from runtime.trainer import Trainer

CURVE = pa.schema(
    [("step", pa.int64())]
    + [(name, pa.float64()) for name in ("loss", "learning_rate", "grad_norm", "samples_per_second", "validation_loss")]
)
ROWS_PER_ENCODING_BATCH = 32
STATE = "state.pt"  # of a checkpoint
SECONDS_BETWEEN_LINES = 10
# Keys with which a run goes on; others start anew.
FREE = {"steps", "cooldown_steps", "checkpoint_every", "keep", "export", "pictures", "micro_batch", "max_broken"}
FREE |= {"gradient_checkpointing", "encode_replicas", "workers", "parallel", "compile", "mlflow"}


def run(recipe: Recipe, workspace: Workspace, data: Workspace | None = None) -> None:
    """Train on the workspace's dataset and write `model/`. The same call goes on where a killed one stopped.

    `data` is the workspace that holds dataset/ and latents/, where it is another one: several runs encode them once.
    """
    data = data or workspace
    if workspace.done("model"):
        print(f"train: done already, see {workspace.uri('model')}")
        return
    started = time.perf_counter()
    # Ray Train would move its workers to another directory, where a recipe's relative paths mean nothing.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    connect()
    recipe = with_base(recipe)
    encode(recipe, data)
    checkpoint = fit(recipe, workspace, data)
    counts = write_model(recipe, workspace, data, checkpoint)
    workspace.mark_done("model", **counts)
    workspace.record("train", recipe=recipe.model_dump(mode="json"), seconds=time.perf_counter() - started, **counts)
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


def encode(recipe: Recipe, workspace: Workspace) -> None:
    """The dataset -> latents/, unless that was done from the same files by the same model.

    Raises `UserError` when there is nothing to train on, or too much of it is unreadable.
    """
    source, paths = dataset_files(recipe, workspace)
    nothing = f"no pairs to train on in {source.location}: run jobs.export_dataset, or accept more pairs"
    if not paths:
        raise UserError(nothing)
    digest = source_digest(recipe, source, paths)
    if workspace.done("latents") and workspace.counts("latents")["source"] == digest:
        return
    print(f"train: encoding {len(paths)} files of {source.location} to latents/", flush=True)
    (
        ray.data.read_parquet(paths, filesystem=source.fs, columns=columns(source, paths[0]), include_paths=True)
        .map_batches(
            PairEncoder,
            fn_constructor_args=(recipe,),
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
    if len(failed) > recipe.train.max_broken * len(rows):
        raise UserError(
            f"{len(failed)} of {len(rows)} pairs are unreadable, more than train.max_broken {recipe.train.max_broken:g}"
            f" of them, e.g. {failed[0]['pair_id']}: {failed[0]['reason']}"
        )
    pairs = {split: sum(row["split"] == split and row["status"] == "ok" for row in rows) for split in SPLITS}
    if not pairs["train"]:
        raise UserError(nothing)
    workspace.mark_done("latents", source=digest, **pairs, failed=len(failed))


def dataset_files(recipe: Recipe, workspace: Workspace) -> tuple[Workspace, list[str]]:
    """Where the dataset is (the workspace's own unless the recipe names another), and its files but those for tests."""
    source = Workspace(recipe.train.dataset or workspace.uri("dataset"))
    files = [path for path in source.files() if path.endswith(".parquet") and path.split("/")[-2] != "test"]
    return source, files


def columns(source: Workspace, path: str) -> list[str]:
    """Those of a dataset's file that training reads. Raises `UserError` when one of them is missing."""
    names = pq.ParquetFile(source.fs.open_input_file(path)).schema_arrow.names
    if missing := [name for name in REQUIRED if name not in names]:
        raise UserError(f"{path} has no column {', '.join(missing)}; it has {', '.join(names)}")
    return [name for name in (*REQUIRED, *WELCOME) if name in names]


def source_digest(recipe: Recipe, source: Workspace, paths: list[str]) -> str:
    """Changes when the pairs, the model that encodes them or how it does may have changed."""
    names = [(info.path.removeprefix(source.root), info.size) for info in source.fs.get_file_info(paths)]
    how = {"base", "resolution", "flip", "random_resize", "crops"}
    section = recipe.train.model_dump(mode="json", include=how)
    vae = recipe.models.vae and recipe.models.vae.model_dump(mode="json")
    crops = recipe.train.random_resize and recipe.seed  # all that the seed decides about latents
    return short_digest([names, section, vae, recipe.dataset.validation_fraction, crops])


def short_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def fit(recipe: Recipe, workspace: Workspace, data: Workspace) -> ray.train.Checkpoint:
    """Run the training loop on Ray Train; returns the checkpoint that becomes the model."""
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
    same = recipe.train.model_dump(mode="json", exclude=FREE)
    name = "train-" + short_digest([same, recipe.seed, encoded["source"]])
    trainer = Trainer(
        train_loop_per_worker,
        train_loop_config={"recipe": recipe, "workspace": workspace, "data": data, "cpus": cpus, "name": name},
        scaling_config=ScalingConfig(
            num_workers=recipe.train.workers,  # a range is elastic
            use_gpu=gpu,
            resources_per_worker={"CPU": cpus} | ({"GPU": 1} if gpu else {}),
        ),
        run_config=RunConfig(
            name=name,
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
        mistakes = [failure for failure in error.worker_failures.values() if isinstance(failure, ValueError)]
        if not mistakes:
            raise
        raise mistakes[0] from error  # Ray has printed the workers' tracebacks; what a user can mend is the last word
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
    state, curve, again = go_on_from(ray.train.get_checkpoint(), model.device)
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
            save_checkpoint(state, curve, directory)
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
    made = data.fs.get_file_info(data.path("latents", "_SUCCESS")).mtime_ns
    which = short_digest([data.uri("latents"), made, *share_of_train(recipe)])
    here = Path(tempfile.gettempdir(), f"ip2p-latents-{which}")
    folders = {split: here / split for split in SPLITS if counts[split]}
    if ray.train.get_context().get_local_rank() == 0:
        paths = [path for path in data.files("latents") if path.endswith(".parquet")]
        for split, folder in folders.items():
            fraction, seed = share_of_train(recipe) if split == "train" else (1.0, 0)
            lay_out(data.fs, paths, split, folder, fraction, seed)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return here, folders


def share_of_train(recipe: Recipe) -> tuple[float, int]:
    """(fraction, seed): which of the encoded captions are trained on."""
    return recipe.train.fraction, recipe.seed if recipe.train.fraction < 1 else 0


def trained_pairs(recipe: Recipe, data: Workspace) -> int:
    """How many pairs `train.fraction` leaves."""
    table = data.read_table("latents", columns=["caption_id", "split", "status"])
    captions = table.filter((pc.field("split") == "train") & (pc.field("status") == "ok"))["caption_id"].to_pylist()
    kept = some_captions(captions, *share_of_train(recipe))
    return sum(caption in kept for caption in captions)


def validation_rows(recipe: Recipe, workspace: Workspace) -> list[dict[str, Any]]:
    """The first held-out pairs that can be read, each with another instruction; none where there is no such folder."""
    source, paths = dataset_files(recipe, workspace)
    held_out = [path for path in paths if path.split("/")[-2] == "validation"]
    if not held_out or not recipe.train.pictures:
        return []
    file = pq.ParquetFile(source.fs.open_input_file(held_out[0]))
    chosen: dict[str, dict[str, Any]] = {}
    for batch in file.iter_batches(recipe.train.pictures, columns=list(REQUIRED)):
        for row in batch.to_pylist():
            if row["edit_prompt"] not in chosen and is_readable(row):
                chosen[row["edit_prompt"]] = row
        if len(chosen) >= recipe.train.pictures:
            break
    return list(chosen.values())[: recipe.train.pictures]


class BrokenCheckpointError(Exception):
    """Its file is here, and torch cannot read it."""


def go_on_from(
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
            print(f"train: {folder}/{name}/{STATE} is broken ({error}); going on from the one before", flush=True)
            continue
        return state, curve, "" if name == last else f"-{short_digest(names)}"
    raise UserError(f"no checkpoint in {folder} can be read: remove that folder to train from the start")


def load_checkpoint(checkpoint: ray.train.Checkpoint, device: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(state of the loop, loss curve so far). Raises `BrokenCheckpointError`, and what a network that fails raises."""
    with checkpoint.as_directory() as directory:
        try:
            saved = torch.load(Path(directory, STATE), map_location=device, weights_only=True)
        except (RuntimeError, EOFError, OSError, UnpicklingError) as error:
            raise BrokenCheckpointError(str(error)) from error
    return saved["state"], saved["curve"]


def save_checkpoint(state: dict[str, Any], curve: list[dict[str, Any]], directory: str) -> None:
    """What `load_checkpoint` reads. Raises `OSError` that says what to do, where the disk is full for example."""
    try:
        torch.save({"state": state, "curve": curve}, Path(directory, STATE))
    except (OSError, RuntimeError) as error:  # torch's own writer raises the second
        raise OSError(
            f"the checkpoint of step {state['step']} could not be written to {directory} ({error}): make room there "
            "(or set TMPDIR to a larger disk) and run the same command again; it goes on from the checkpoint before"
        ) from error


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
    example = (
        pq.ParquetFile(source.fs.open_input_file(paths[0])).read(columns=["edit_prompt"])["edit_prompt"][0].as_py()
    )
    with tempfile.TemporaryDirectory() as directory:
        export(load_base(recipe, "cpu"), state["ema"], recipe, counts, example, directory)
        workspace.fs.create_dir(workspace.path("model"), recursive=True)
        pafs.copy_files(directory, workspace.path("model"), destination_filesystem=workspace.fs)
    return counts


def main(argv: list[str] | None = None) -> None:
    recipe, workspace, _ = load_settings(__doc__ or "", argv=argv, needs=("workspace", "models.text_to_image"))
    assert workspace is not None
    with job("train", workspace):
        run(recipe, workspace)


if __name__ == "__main__":
    main()
