"""Stage 4: fine-tune the UNet to follow instructions, and export an editor that diffusers loads.

dataset/ -> encode once to latents/ -> train, with checkpoints under checkpoints/ -> model/
"""

import hashlib
import json
import os
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
from ray.train.torch import TorchTrainer, get_device

from cluster.connect import connect, uses_gpu
from ip2p.cli import load_settings
from ip2p.models import TextToImage, load_text_to_image
from ip2p.recipe import Recipe, locate
from ip2p.train.encode import PairEncoder
from ip2p.train.export import export
from ip2p.train.latents import LatentPairs
from ip2p.train.loop import train
from ip2p.train.unet import widen_conv_in
from ip2p.workspace import Workspace

CURVE = pa.schema(
    [("step", pa.int64())]
    + [(name, pa.float64()) for name in ("loss", "learning_rate", "grad_norm", "samples_per_second", "validation_loss")]
)
SPLITS = ("train", "validation")
ROWS_PER_ENCODING_BATCH = 32
SECONDS_BETWEEN_LINES = 10


def run(recipe: Recipe, workspace: Workspace) -> None:
    """Train on the workspace's dataset and write `model/`. The same call goes on where a killed one stopped."""
    if workspace.done("model"):
        print(f"train: done already, see {workspace.uri('model')}")
        return
    started = time.perf_counter()
    # Ray Train would move its workers to another directory, where a recipe's relative paths mean nothing.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    connect()
    recipe = with_base(recipe)
    encode(recipe, workspace)
    checkpoint = fit(recipe, workspace)
    counts = write_model(recipe, workspace, checkpoint)
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
    """dataset/{train,validation} -> latents/, unless that was done from the same pairs by the same model."""
    folders = [split for split in SPLITS if parquet_files(workspace, split)]
    if "train" not in folders or not workspace.read_table("dataset", "train", columns=["pair_id"]).num_rows:
        raise ValueError(
            f"no pairs in dataset/train of {workspace.location}: run jobs.export_dataset, or accept more pairs"
        )
    source = source_digest(recipe, workspace)
    if workspace.done("latents") and workspace.counts("latents")["source"] == source:
        return
    print(f"train: encoding dataset/ ({', '.join(folders)}) to latents/", flush=True)
    (
        ray.data.read_parquet(
            [workspace.path("dataset", split) for split in folders], filesystem=workspace.fs, include_paths=True
        )
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
    pairs = {split: sum(row["split"] == split and row["status"] == "ok" for row in rows) for split in SPLITS}
    workspace.mark_done("latents", source=source, **pairs, failed=len(failed))


def parquet_files(workspace: Workspace, split: str) -> list[str]:
    return [path for path in workspace.files("dataset", split) if path.endswith(".parquet")]


def source_digest(recipe: Recipe, workspace: Workspace) -> str:
    """Changes when the pairs, the model that encodes them or how it does may have changed."""
    files = workspace.fs.get_file_info([path for split in SPLITS for path in parquet_files(workspace, split)])
    names = [(file.path.removeprefix(workspace.path("dataset")), file.size) for file in files]
    section = recipe.train.model_dump(mode="json", include={"base", "resolution", "flip"})
    vae = recipe.models.vae and recipe.models.vae.model_dump(mode="json")
    return short_digest([names, section, vae])


def short_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def fit(recipe: Recipe, workspace: Workspace) -> ray.train.Checkpoint:
    """Run the training loop on Ray Train; returns its last checkpoint."""
    gpu = uses_gpu(recipe.device)
    cpus = (
        1 if gpu else cpus_per_worker(recipe.train.workers, [node["Resources"].get("CPU", 0) for node in ray.nodes()])
    )
    # Another recipe or other pairs start anew; more steps, or other intervals between checkpoints, go on.
    free = {"steps", "cooldown_steps", "checkpoint_every", "encode_replicas"}
    same = recipe.train.model_dump(mode="json", exclude=free)
    name = "train-" + short_digest([same, recipe.seed, workspace.counts("latents")["source"]])
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"recipe": recipe, "workspace": workspace, "cpus": cpus},
        scaling_config=ScalingConfig(
            num_workers=recipe.train.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": cpus} | ({"GPU": 1} if gpu else {}),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=workspace.path("checkpoints"),
            storage_filesystem=workspace.fs,
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=2),
        ),
    )
    checkpoint = trainer.fit().checkpoint
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
    recipe, workspace = config["recipe"], config["workspace"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(threads_per_worker(config["cpus"], context.get_local_world_size()))
    model = load_base(recipe, str(get_device()))
    latents = workspace.read_table("latents")
    pairs = LatentPairs(latents, "train")
    validation = LatentPairs(latents, "validation") if workspace.counts("latents")["validation"] else None
    state, curve = load_checkpoint(ray.train.get_checkpoint(), model.device)
    if state is not None and state["step"] > recipe.train.steps:
        raise ValueError(
            f"train.steps: {recipe.train.steps}, but this run is at step {state['step']} already; raise it"
        )
    if rank == 0:
        begin = f"from step {state['step']}" if state else "from the start"
        print(f"train: {pairs.count} pairs, {recipe.train.steps} steps, {begin}, on {world_size} x {model.device}")
    printer = Printer(recipe.train.steps)

    def report(metrics: dict[str, float], state: dict[str, Any] | None) -> None:
        if rank == 0:
            curve.append({name: metrics.get(name) for name in CURVE.names})
            printer(metrics, force=state is not None)
        if state is None:
            return
        with tempfile.TemporaryDirectory() as directory:
            checkpoint = None
            if rank == 0:
                torch.save({"state": state, "curve": curve}, Path(directory, "state.pt"))
                write_curve(workspace, curve)
                checkpoint = ray.train.Checkpoint.from_directory(directory)
            ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=f"step-{state['step']:07d}")

    train(
        model,
        pairs,
        recipe.train,
        seed=recipe.seed,
        report=report,
        validation=validation,
        state=state,
        rank=rank,
        world_size=world_size,
    )


def load_checkpoint(checkpoint: ray.train.Checkpoint | None, device: str) -> tuple[dict[str, Any] | None, list[dict]]:
    """(state of the loop, loss curve so far)."""
    if checkpoint is None:
        return None, []
    with checkpoint.as_directory() as directory:
        saved = torch.load(Path(directory, "state.pt"), map_location=device, weights_only=True)
    return saved["state"], saved["curve"]


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


def write_model(recipe: Recipe, workspace: Workspace, checkpoint: ray.train.Checkpoint) -> dict[str, Any]:
    """Export the averaged weights of a checkpoint to model/; returns what the model card says."""
    state, curve = load_checkpoint(checkpoint, "cpu")
    assert state is not None
    write_curve(workspace, curve)
    encoded = workspace.counts("latents")
    last = curve[-1]
    counts = {
        "pairs": encoded["train"],
        "unreadable_pairs_left_out": encoded["failed"],
        "steps": state["step"],
        "samples_seen": state["step"] * recipe.train.batch_size,
        "loss": round(last["loss"], 5),
        "validation_loss": last["validation_loss"] and round(last["validation_loss"], 5),
    }
    example = workspace.read_table("dataset", "train", columns=["edit_prompt"])["edit_prompt"][0].as_py()
    with tempfile.TemporaryDirectory() as directory:
        export(load_base(recipe, "cpu"), state["ema"], recipe, counts, example, directory)
        workspace.fs.create_dir(workspace.path("model"), recursive=True)
        pafs.copy_files(directory, workspace.path("model"), destination_filesystem=workspace.fs)
    return counts


def main(argv: list[str] | None = None) -> None:
    recipe, workspace, _ = load_settings(__doc__ or "", argv=argv, needs=("workspace", "models.text_to_image"))
    assert workspace is not None
    run(recipe, workspace)


if __name__ == "__main__":
    main()
