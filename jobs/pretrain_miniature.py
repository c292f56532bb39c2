"""Train the miniature family from nothing, or measure the one that ships. The editor is trained by `make reproduce`.

    python -m jobs.pretrain_miniature --measure                      what the shipped models can do, on held-out scenes
    python -m jobs.pretrain_miniature                                train them, in order (hours on a CPU)
    python -m jobs.pretrain_miniature --models clip --steps.clip 200 one of them, shortly
    python -m jobs.pretrain_miniature --ship workspace               ship the editor that make reproduce trained there

Each model is trained by Ray Train on scenes drawn afresh, with fixed seeds; the same command goes on where it stopped.
Several workers average their gradients.
"""

import json
import time
from pathlib import Path
from typing import Any, Literal

import ray.train
import torch
from diffusers import AutoencoderKL, StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline
from pydantic import BaseModel, Field
from pydantic_settings import BaseSettings, CliImplicitFlag, SettingsConfigDict
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import get_device
from rich.console import Console
from rich.table import Table
from transformers import CLIPTokenizer

from ip2p.cli import parse_flags
from ip2p.errors import UserError
from ip2p.miniature.models import autoencoder, clip, editor, language_model, text_to_image
from ip2p.miniature.models.fit import Run
from ip2p.models import load_clip
from ip2p.recipe import ClipRef
from jobs.train import threads_per_worker
from runtime.connect import connect
from runtime.exit import exit_statuses
from runtime.trainer import Trainer

WEIGHTS = Path(__file__).parent.parent / "ip2p" / "miniature" / "weights"
Name = Literal["autoencoder", "text_to_image", "clip", "language_model"]


class Steps(BaseModel):
    """Training steps; the defaults made what ships."""

    autoencoder: int = 1300
    text_encoder: int = 1500
    text_to_image: int = 9000
    clip: int = 3000
    language_model: int = language_model.STEPS


class Settings(BaseSettings):
    model_config = SettingsConfigDict(cli_prog_name="python -m jobs.pretrain_miniature", extra="forbid")

    models: list[Name] = Field(
        ["autoencoder", "text_to_image", "clip", "language_model"], description="which to train, in this order"
    )
    steps: Steps = Steps()
    output: Path = Field(WEIGHTS, description="where the models are written, or measured")
    checkpoints: Path = Field(Path("runs/pretrain"), description="where the state of unfinished training is kept")
    workers: int = Field(1, ge=1, description="training processes; each draws its own scenes")
    device: Literal["cpu", "cuda"] = Field("cpu", description="cuda takes one GPU for each worker")
    seed: int = 0
    ship: Path | None = Field(None, description="train nothing; ship the editor of this workspace of make reproduce")
    measure: CliImplicitFlag[bool] = Field(
        False, description="train nothing; print the table of what the models in --output can do"
    )
    scenes: int = Field(512, ge=64, description="held-out scenes for --measure")


def train_one(config: dict[str, Any]) -> None:
    """Train one model on this worker; the first worker logs and saves."""
    name: Name = config["name"]
    settings: Settings = config["settings"]
    out, steps = settings.output, settings.steps
    device = str(get_device()) if settings.device == "cuda" else "cpu"
    torch.set_num_threads(threads_per_worker(config["cpus"], ray.train.get_context().get_local_world_size()))
    started = time.monotonic()

    def log(facts: dict[str, float]) -> None:
        said = "  ".join(f"{key} {value:.4g}" for key, value in facts.items())
        print(f"{name}  {time.monotonic() - started:6.0f} s  {said}", flush=True)

    run = Run(settings.checkpoints.absolute(), settings.seed, device, log)
    pretrained = out / "text_to_image"
    if name == "autoencoder":
        autoencoder.train_autoencoder(pretrained / "vae", run, steps=steps.autoencoder)
    elif name == "text_to_image":
        vae = AutoencoderKL.from_pretrained(pretrained / "vae", torch_dtype=torch.float32)
        text_to_image.train_text_to_image(
            pretrained, run, vae, text_steps=steps.text_encoder, steps=steps.text_to_image
        )
    elif name == "clip":
        vae = AutoencoderKL.from_pretrained(pretrained / "vae", torch_dtype=torch.float32)
        clip.train_clip(out / "clip", run, vae, steps=steps.clip)
    else:
        language_model.train(
            out / "language_model",
            steps=steps.language_model,
            seed=run.seed,
            device=run.device,
            log=run.log,
            checkpoint=run.checkpoints / "language_model.state",
        )
    ray.train.report({"seconds": time.monotonic() - started})


def train_all(settings: Settings) -> None:
    connect()
    if settings.workers > 1 and "language_model" in settings.models:
        raise UserError("--workers: the language model trains on one worker; give --models without it, or --workers 1")
    cpus = max(1, int(ray.cluster_resources()["CPU"]) // settings.workers)
    for name in settings.models:
        Trainer(
            train_one,
            train_loop_config={"name": name, "settings": settings, "cpus": cpus},
            scaling_config=ScalingConfig(
                num_workers=settings.workers,
                use_gpu=settings.device == "cuda",
                resources_per_worker={"CPU": cpus},
            ),
            run_config=RunConfig(
                name=f"{name}-{time.time_ns()}", storage_path=str((settings.checkpoints / "ray").absolute())
            ),
        ).fit()
        print(f"{name}: written to {settings.output}")


def measure_all(settings: Settings) -> dict[str, dict[str, float]]:
    """Every model's figures on held-out scenes, from the directories that ship."""
    out, count = settings.output, settings.scenes
    pipeline = StableDiffusionPipeline.from_pretrained(out / "text_to_image", torch_dtype=torch.float32)
    contrastive = load_clip(ClipRef(name=f"local-dir:{out / 'clip'}"), settings.device)
    shipped = StableDiffusionInstructPix2PixPipeline.from_pretrained(out / "editor", torch_dtype=torch.float32)
    pipeline.to(settings.device)
    shipped.to(settings.device)
    return {
        "autoencoder": autoencoder.measure_autoencoder(pipeline.vae, count, settings.device),
        "text-to-image": text_to_image.measure_text_to_image(pipeline, count),
        "text-to-image, unseen wordings": text_to_image.measure_text_to_image(pipeline, count, unseen=True),
        "CLIP": clip.measure_clip(contrastive.model, CLIPTokenizer.from_pretrained(out / "clip"), settings.device),
        "language model": language_model.measure(out / "language_model", count),
        "language model, unseen wordings": language_model.measure(out / "language_model", count, unseen=True),
        "editor, unseen wordings": editor.measure_editor(shipped, count),
    }


def show(figures: dict[str, dict[str, float]]) -> None:
    table = Table("model", "on held-out scenes")
    for name, values in figures.items():
        table.add_row(name, "\n".join(f"{key} {value:.3f}" for key, value in values.items()), end_section=True)
    Console().print(table)


def main() -> None:
    with exit_statuses():
        settings = parse_flags(Settings)
        if settings.ship:
            editor.ship_editor(settings.ship / "model", settings.output / "editor")
            print(f"editor: written to {settings.output / 'editor'}")
        elif settings.measure:
            figures = measure_all(settings)
            show(figures)
            (settings.output / "measured.json").write_text(json.dumps(figures, indent=1) + "\n")
        else:
            train_all(settings)


if __name__ == "__main__":
    main()
