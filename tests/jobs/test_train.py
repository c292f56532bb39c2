"""The whole of stage 4 at its smallest, on a real local Ray."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from skimage import data

from ip2p import images
from ip2p.recipe import ClipRef, GrammarCaptions, ModelRef, Models, Recipe, Train
from ip2p.records import DATASET
from ip2p.workspace import Workspace
from jobs import train

PHOTOS = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket()]


@pytest.fixture
def recipe(tiny_sd):
    ref = ModelRef(path=str(tiny_sd))
    return Recipe(
        name="smallest",
        device="cpu",
        models=Models(text_to_image=ref, clip=ClipRef(name="ViT-B-32", pretrained="openai"), llm=ref, editor=ref),
        captions=GrammarCaptions(),
        train=Train(steps=4, batch_size=4, resolution=64, checkpoint_every=2, learning_rate=1e-3),
    )


def write_dataset(workspace, split, count, broken=False):
    rows = []
    for k in range(count):
        original, edited = images.encode(PHOTOS[k % 4]), images.encode(255 - PHOTOS[k % 4], format="jpeg")
        row = dict.fromkeys(DATASET.names) | {"pair_id": f"{split}{k}", "caption_id": f"{split}{k}"}
        row |= {"edit_prompt": "invert the colours" if k % 2 else "put it on the left"}
        row |= {"original_image": {"bytes": original}, "edited_image": {"bytes": edited}}
        rows.append(row)
    if broken:
        rows[0]["edited_image"] = {"bytes": b""}
    with workspace.open_out("dataset", split, "part.parquet") as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=DATASET), file)


def test_from_dataset_to_diffusers(recipe, tmp_path, local_ray, capsys):
    workspace = Workspace(tmp_path / "run")
    write_dataset(workspace, "train", 5, broken=True)
    write_dataset(workspace, "validation", 2)
    train.run(recipe, workspace)

    latents = workspace.read_table("latents")
    statuses = sorted(zip(latents["split"].to_pylist(), latents["status"].to_pylist()))
    assert statuses == [("train", "failed")] + 4 * [("train", "ok")] + 2 * [("validation", "ok")]
    curve = pq.read_table(workspace.path("model", "training.parquet"))
    assert curve["step"].to_pylist() == [2, 4]
    assert all(
        value > 0 for name in ("loss", "validation_loss", "samples_per_second") for value in curve[name].to_pylist()
    )
    counts = workspace.counts("model")
    assert (counts["pairs"], counts["unreadable_pairs_left_out"], counts["samples_seen"]) == (4, 1, 16)

    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(workspace.path("model"))
    pipeline.set_progress_bar_config(disable=True)
    image = torch.zeros(1, 3, 64, 64)
    result = pipeline("invert the colours", image=image, num_inference_steps=2, output_type="np").images
    assert result.shape == (1, 64, 64, 3)

    capsys.readouterr()
    train.run(recipe, workspace)
    assert "done already" in capsys.readouterr().out


def test_goes_on_from_the_last_checkpoint_as_if_never_stopped(recipe, tmp_path, local_ray):
    """A run of 2 steps, then of 4 in the same workspace, equals one of 4: two ranks, each with its own noise."""
    stopped, whole = Workspace(tmp_path / "stopped"), Workspace(tmp_path / "whole")
    train_section = recipe.train.model_copy(update={"workers": 2})
    recipe = recipe.model_copy(update={"train": train_section})
    for workspace in (stopped, whole):
        write_dataset(workspace, "train", 4)
    train.run(recipe.model_copy(update={"train": train_section.model_copy(update={"steps": 2})}), stopped)
    stopped.fs.delete_file(stopped.path("model", "_SUCCESS"))
    train.run(recipe, stopped)
    train.run(recipe, whole)
    for column in ("step", "loss", "grad_norm"):
        curves = [pq.read_table(w.path("model", "training.parquet"))[column].to_pylist() for w in (stopped, whole)]
        assert curves[0] == curves[1] and len(curves[0]) == 2
    unets = [
        StableDiffusionInstructPix2PixPipeline.from_pretrained(w.path("model")).unet.state_dict()
        for w in (stopped, whole)
    ]
    assert all(torch.equal(unets[0][name], unets[1][name]) for name in unets[0])


def test_no_pairs_is_told_before_anything_starts(recipe, tmp_path, local_ray):
    with pytest.raises(ValueError, match="no pairs in dataset/train"):
        train.run(recipe, Workspace(tmp_path))


@pytest.mark.parametrize(
    ("workers", "node_cpus", "expected"),
    [
        (1, [2.0], 2),
        (2, [2.0], 1),
        (3, [3.0, 3.0], 1),
        (2, [8.0, 8.0], 8),
        (4, [8.0, 8.0], 4),
        (5, [2.0], 1),
        (1, [], 1),
    ],
)
def test_every_worker_fits_on_a_node(workers, node_cpus, expected):
    assert train.cpus_per_worker(workers, node_cpus) == expected


def test_workers_share_the_threads_that_the_machine_has(monkeypatch):
    monkeypatch.setattr(train.os, "cpu_count", lambda: 8)
    assert train.threads_per_worker(cpus=4, workers_here=1) == 4, "no more than Ray gave it"
    assert train.threads_per_worker(cpus=4, workers_here=4) == 2, "where Ray counts more CPUs than there are"
    assert train.threads_per_worker(cpus=1, workers_here=16) == 1
