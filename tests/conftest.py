"""Fixtures that are dear to make: one of each for a whole test session."""

from pathlib import Path

import pytest
import ray
import torch

from ip2p.recipe import ClipRef, GrammarCaptions, ModelRef, Models, Pairs, Recipe, Sharing, Thresholds
from runtime.connect import connect
from serve import proxy
from tests import tiny

torch.set_num_threads(1)  # tiny models: more threads only wait for each other


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a StableDiffusionPipeline with SD 1.5's layout, random weights."""
    return tiny.make_sd(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="session")
def tiny_editor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a StableDiffusionInstructPix2PixPipeline with SD 1.5's layout, random weights."""
    return tiny.make_editor(tmp_path_factory.mktemp("models") / "editor")


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of an open_clip model, random weights: `local-dir:<directory>`."""
    return tiny.make_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="session")
def tiny_dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a vision transformer as transformers saves it, random weights."""
    return tiny.make_dino(tmp_path_factory.mktemp("models") / "dino")


@pytest.fixture(scope="session")
def smallest(tiny_sd, tiny_clip) -> Recipe:
    """The real path at its smallest: SD 1.5's layout, random weights, everything accepted that changes at all."""
    ref = ModelRef(path=str(tiny_sd))
    return Recipe(
        name="smallest",
        device="cpu",
        models=Models(text_to_image=ref, clip=ClipRef(name=f"local-dir:{tiny_clip}"), llm=ref, editor=ref),
        captions=GrammarCaptions(),
        pairs=Pairs(
            candidates=3,
            max_pairs=2,
            steps=2,
            height=64,
            width=64,
            batch_size=4,
            rows_per_block=2,
            sharing=Sharing(modes=["replace", "refine"]),
            thresholds=Thresholds(image=-1, direction=-1, agreement=-1),
        ),
    )


@pytest.fixture(scope="session")
def local_ray():
    """The Ray that a job or the endpoint starts on this machine."""
    proxy.install()
    connect()
    yield
    ray.shutdown()
