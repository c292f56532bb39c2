"""Teach the language model to answer captions with edits, on triplets that people wrote.

triplets -> check and split by caption -> tune (Ray Train, a checkpoint an epoch) -> language_model/, which vLLM loads:
`python -m jobs.edit_captions --models.llm.path WORKSPACE/language_model --instructions.prompt tuned ...`
"""

import os
import random
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.huggingface.transformers import RayTrainReportCallback, prepare_trainer
from transformers import TrainerCallback

from ip2p.captions.answers import names_type
from ip2p.captions.triplets import TRIPLETS, Triplet, read_triplets
from ip2p.captions.tune import export, make_trainer, split, usable
from ip2p.cli import StageFlags, load_settings
from ip2p.errors import UserError
from ip2p.miniature.edits import EDIT_KINDS
from ip2p.miniature.triplets import draw_triplet
from ip2p.recipe import GrammarCaptions, Recipe, locate
from ip2p.records import digest
from ip2p.stage import Stage, short_digest
from ip2p.workspace import Workspace
from runtime.connect import connect, uses_gpu
from runtime.job import job
from runtime.trainer import Trainer


def run(recipe: Recipe, workspace: Workspace, overwrite: bool = False) -> None:
    """Write `language_model/`. The same call resumes an interrupted run.

    Raises `UserError` when there are no triplets to train on, and when it was made with another recipe or triplets.
    """
    names = names_type(recipe)
    triplets = usable(read(recipe), names)
    if not names:
        triplets = [triplet._replace(edit_type=None) for triplet in triplets]
    stage = Stage(workspace, "language_model", recipe, also={"triplets": short_digest(triplets)})
    if not stage.begin(overwrite):
        print(f"tune_caption_editor: {workspace.uri('language_model')} is complete")
        return
    recipe = with_model(recipe)
    chosen, held_out = split(triplets, recipe.tune)
    print(f"tune_caption_editor: {len(chosen)} triplets, {len(held_out)} held out, {recipe.tune.epochs} epochs")
    # Ray Train would move its workers to another directory, where a recipe's relative paths mean nothing.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    connect()
    checkpoint, metrics = fit(recipe, workspace, chosen, held_out)
    with checkpoint.as_directory() as source, tempfile.TemporaryDirectory() as folder:
        export(recipe, Path(source, RayTrainReportCallback.CHECKPOINT_NAME), folder)
        workspace.fs.create_dir(workspace.path("language_model"), recursive=True)
        pafs.copy_files(folder, workspace.path("language_model"), destination_filesystem=workspace.fs)
    stage.finish(
        {"triplets": len(chosen), "held_out": len(held_out), "validation_loss": round(metrics["eval_loss"], 4)}
    )
    print(
        f"tune_caption_editor: {workspace.uri('language_model')} is written; ask it with jobs.edit_captions "
        f"--models.llm.path {workspace.uri('language_model')} --instructions.prompt tuned"
    )


def read(recipe: Recipe) -> list[Triplet]:
    """The triplets that the recipe names."""
    if recipe.tune.triplets is not None:
        try:
            return read_triplets(recipe.tune.triplets)
        except OSError as error:
            raise UserError(f"tune.triplets: {recipe.tune.triplets}: {error.strerror}") from error
    if recipe.truth == "none":
        return list(TRIPLETS)
    kinds = (recipe.captions.kinds if isinstance(recipe.captions, GrammarCaptions) else None) or EDIT_KINDS
    rng = random.Random(digest("tune", recipe.seed))
    drawn = (draw_triplet(rng, kinds[n % len(kinds)], held_out=False) for n in range(recipe.tune.count))
    return [Triplet(one.caption, one.instruction, one.edited_caption) for one in drawn]


def with_model(recipe: Recipe) -> Recipe:
    """The recipe with an absolute path to its language model, the same for every process."""
    llm = recipe.models.llm.model_copy(update={"path": locate(recipe.models.llm.path, "models.llm.path")})
    return recipe.model_copy(update={"models": recipe.models.model_copy(update={"llm": llm})})


def fit(
    recipe: Recipe, workspace: Workspace, triplets: list[Triplet], held_out: list[Triplet]
) -> tuple[ray.train.Checkpoint, dict[str, Any]]:
    """Tune on Ray Train; returns the last checkpoint and its metrics."""
    gpu = uses_gpu(recipe.device)
    result = Trainer(
        train_loop_per_worker,
        train_loop_config={"recipe": recipe, "triplets": triplets, "held_out": held_out, "gpu": gpu},
        scaling_config=ScalingConfig(num_workers=recipe.tune.workers, use_gpu=gpu),
        run_config=RunConfig(
            name="language_model",
            storage_path=workspace.path("checkpoints"),
            storage_filesystem=workspace.fs,
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            failure_config=FailureConfig(max_failures=2),
        ),
    ).fit()
    assert result.checkpoint is not None and result.metrics is not None
    return result.checkpoint, result.metrics


def train_loop_per_worker(config: dict[str, Any]) -> None:
    """One rank: load, resume from the last checkpoint if there is one, tune and report."""
    with tempfile.TemporaryDirectory() as folder:
        callbacks = [RayTrainReportCallback(), Line()]
        trainer = prepare_trainer(
            make_trainer(
                config["recipe"], config["triplets"], config["held_out"], folder, callbacks, on_gpu=config["gpu"]
            )
        )
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            trainer.train()
            return
        with checkpoint.as_directory() as source:
            trainer.train(resume_from_checkpoint=str(Path(source, RayTrainReportCallback.CHECKPOINT_NAME)))


class Line(TrainerCallback):
    """A line of progress an epoch."""

    def on_evaluate(self, args: Any, state: Any, *_: Any, metrics: dict[str, float], **__: Any) -> None:
        if state.is_world_process_zero:
            loss = next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), float("nan"))
            print(
                f"tune_caption_editor: epoch {state.epoch:.0f}/{args.num_train_epochs:.0f}, loss {loss:.4f}, "
                f"held-out triplets {metrics['eval_loss']:.4f}",
                flush=True,
            )


def main(argv: list[str] | None = None) -> None:
    recipe, workspace, flags = load_settings(__doc__ or "", StageFlags, argv=argv, needs=("workspace", "models.llm"))
    assert workspace is not None
    with job("tune_caption_editor", workspace):
        run(recipe, workspace, flags.overwrite)


if __name__ == "__main__":
    main()
