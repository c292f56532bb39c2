"""The whole of stage 4 at its smallest, on a real local Ray."""

import io
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.train
import torch
import yaml
from diffusers import StableDiffusionInstructPix2PixPipeline
from mlflow.tracking import MlflowClient
from PIL import Image
from ray._private.ray_constants import KV_NAMESPACE_DASHBOARD
from ray.train import ScalingConfig
from skimage import data
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ip2p import images
from ip2p.recipe import ClipRef, GrammarCaptions, MLflow, ModelRef, Models, Recipe, Sampling, Train
from ip2p.records import DATASET, caption_id, split_of
from ip2p.train.checkpoint import save
from ip2p.workspace import Workspace
from jobs import train
from runtime.mlflow_board import MLflowBoard
from runtime.trainer import Trainer

REPOSITORY = Path(__file__).parent.parent.parent
PHOTOS = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket()]


@pytest.fixture
def recipe(tiny_sd):
    ref = ModelRef(path=str(tiny_sd))
    return Recipe(
        name="smallest",
        device="cpu",
        models=Models(text_to_image=ref, clip=ClipRef(name="ViT-B-32", pretrained="openai"), llm=ref, editor=ref),
        captions=GrammarCaptions(),
        max_failed=0.2,
        train=Train(steps=4, batch_size=4, resolution=64, checkpoint_every=2, learning_rate=1e-3),
        sampling=Sampling(steps=2),
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


def board_events(workspace: Workspace) -> EventAccumulator:
    (folder,) = {path.rsplit("/", 1)[0] for path in workspace.files("tensorboard")}
    events = EventAccumulator(folder)
    events.Reload()
    return events


def test_from_dataset_to_diffusers(recipe, tmp_path, local_ray, capsys):
    workspace = Workspace(tmp_path / "run")
    write_dataset(workspace, "train", 5, broken=True)
    write_dataset(workspace, "validation", 3, broken=True)
    train.run(recipe.model_copy(update={"max_failed": 0.5}), workspace)

    latents = workspace.read_table("latents")
    statuses = sorted(zip(latents["split"].to_pylist(), latents["status"].to_pylist()))
    broken = [("train", "failed"), ("validation", "failed")]
    assert statuses == sorted(broken + 4 * [("train", "ok")] + 2 * [("validation", "ok")])
    curve = pq.read_table(workspace.path("model", "training.parquet"))
    assert curve["step"].to_pylist() == [2, 4]
    assert all(
        value > 0 for name in ("loss", "validation_loss", "samples_per_second") for value in curve[name].to_pylist()
    )
    counts = workspace.counts("model")
    assert (counts["pairs"], counts["unreadable_pairs_left_out"], counts["samples_seen"]) == (4, 2, 16)

    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(workspace.path("model"))
    pipeline.set_progress_bar_config(disable=True)
    image = torch.zeros(1, 3, 64, 64)
    result = pipeline("invert the colours", image=image, num_inference_steps=2, output_type="np").images
    assert result.shape == (1, 64, 64, 3)

    events = board_events(workspace)
    assert [event.step for event in events.Scalars("validation_loss")] == [2, 4]
    sheets = [np.asarray(Image.open(io.BytesIO(event.encoded_image_string))) for event in events.Images("edits")]
    before, edited, after = np.split(sheets[-1], 3, axis=1)
    assert before.shape == (2 * 64, 64, 3), "the two held-out pairs, one below the other"
    assert np.abs(255 - before.astype(int) - after).mean() < 8, "the pair's own images; one is a JPEG"
    assert not np.array_equal(edited, before) and not np.array_equal(sheets[0], sheets[1])

    printed = "".join(capsys.readouterr())
    assert "RayTrainWorker" in printed, "the workers' lines are among them"
    assert "Failed to query" not in printed, "this Ray has no dashboard to query"
    train.run(recipe, workspace)
    assert "is complete" in capsys.readouterr().out


def test_the_cleaner_runs_where_there_is_a_dashboard_to_ask(local_ray):
    def has_cleaner() -> bool:
        trainer = Trainer(lambda: None, scaling_config=ScalingConfig(num_workers=1))
        names = [type(callback).__name__ for callback in trainer._create_default_callbacks()]
        return "PlacementGroupCleanerCallback" in names

    assert not has_cleaner()
    address = partial(ray._private.worker.global_worker.gcs_client.internal_kv_put, b"webui:url")
    address(b"127.0.0.1:8265", True, KV_NAMESPACE_DASHBOARD)
    try:
        assert has_cleaner()
    finally:
        address(b"", True, KV_NAMESPACE_DASHBOARD)


@pytest.mark.slow
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
    stopped.fs.delete_file(stopped.path("model", "_SUCCESS"))
    with pytest.raises(ValueError, match=r"train\.steps: 3, but this run is at step 4 already; raise it"):
        train.run(recipe.model_copy(update={"train": train_section.model_copy(update={"steps": 3})}), stopped)


def test_the_published_dataset_as_it_is_an_adapter_and_the_best_checkpoint(recipe, tmp_path, local_ray, capsys):
    """No pair_id, no caption_id, one folder: rows are split by caption; a step is made of two passes."""
    captions = [f"a picture of {name}" for name in ("dog", "cat", "house", "tree", "boat", "car", "sea", "hill")]
    rows = [
        {
            "original_prompt": caption,
            "original_image": {"bytes": images.encode(PHOTOS[k % 4]), "path": None},
            "edit_prompt": "invert the colours",
            "edited_prompt": f"{caption}, inverted",
            "edited_image": {"bytes": images.encode(255 - PHOTOS[k % 4]), "path": None},
        }
        for k, caption in enumerate(captions)
    ]
    (tmp_path / "published" / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "published" / "data" / "train-00000-of-00001-ab12.parquet")
    others = {"dataset": str(tmp_path / "published"), "random_resize": (64.0, 72.0), "crops": 2, "lora_rank": 2}
    others |= {"micro_batch": 3, "export": "best", "keep": 1, "one_per_caption": True}
    section = recipe.train.model_copy(update=others)
    fraction = recipe.dataset.model_copy(update={"validation_fraction": 0.4})
    workspace = Workspace(tmp_path / "run")
    train.run(recipe.model_copy(update={"train": section, "dataset": fraction}), workspace)

    latents = workspace.read_table("latents").to_pylist()
    expected = {caption_id(caption): split_of(caption_id(caption), 0.4, 0) for caption in captions}
    assert {row["caption_id"]: row["split"] for row in latents} == expected
    assert set(expected.values()) == {"train", "validation"} and len({row["pair_id"] for row in latents}) == 8
    assert all(row["shape"][0] == 4 for row in latents), "two crops and their mirror images"
    curve = pq.read_table(workspace.path("model", "training.parquet"))
    assert workspace.counts("model")["validation_loss"] == pytest.approx(
        min(curve["validation_loss"].to_pylist()), 1e-3
    )
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(workspace.path("model"))
    assert not any("lora" in name for name in pipeline.unet.state_dict())


@pytest.fixture(scope="module")
def long_recipe(tiny_sd, tmp_path_factory):
    """A recipe file of 60 steps on two workers, with a checkpoint every ten."""
    ref = ModelRef(path=str(tiny_sd))
    recipe = Recipe(
        name="long",
        device="cpu",
        models=Models(text_to_image=ref, clip=ClipRef(name="ViT-B-32", pretrained="openai"), llm=ref, editor=ref),
        captions=GrammarCaptions(),
        train=Train(steps=60, batch_size=4, resolution=64, checkpoint_every=10, learning_rate=1e-3, workers=2),
    )
    file = tmp_path_factory.mktemp("recipes") / "long.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return file


def start_job(recipe: Path, workspace: Workspace) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "jobs.train", "--recipe", str(recipe), "--workspace", workspace.location],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def wait_for(job: subprocess.Popen[str], what: str) -> None:
    assert job.stdout is not None
    assert any(what in line for line in job.stdout), f"it ended without {what!r}"


def result(workspace: Workspace) -> tuple[list[tuple[int, float]], dict[str, torch.Tensor]]:
    """(losses by step, the model's weights)."""
    curve = pq.read_table(workspace.path("model", "training.parquet")).to_pylist()
    unet = StableDiffusionInstructPix2PixPipeline.from_pretrained(workspace.path("model")).unet
    return [(row["step"], row["loss"]) for row in curve], unet.state_dict()


@pytest.fixture(scope="module")
def uninterrupted(long_recipe, tmp_path_factory):
    workspace = Workspace(tmp_path_factory.mktemp("whole"))
    write_dataset(workspace, "train", 4)
    job = start_job(long_recipe, workspace)
    job.communicate(timeout=600)
    assert job.returncode == 0
    return result(workspace)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker", "job"])
def test_what_is_killed_goes_on_and_ends_as_if_nothing_had_happened(victim, long_recipe, uninterrupted, tmp_path):
    """SIGKILL between two checkpoints: of one of two workers, or of the job and all that it has started."""
    workspace = Workspace(tmp_path / "run")
    write_dataset(workspace, "train", 4)
    job = start_job(long_recipe, workspace)
    wait_for(job, "step 20/60")
    if victim == "worker":
        processes = psutil.Process(job.pid).children(recursive=True)
        workers = [process for process in processes if "RayTrainWorker" in "".join(process.cmdline())]
        assert len(workers) == 2
        workers[1].kill()
    else:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        assert not workspace.done("model")
        job = start_job(long_recipe, workspace)
    printed, _ = job.communicate(timeout=600)
    assert job.returncode == 0
    assert re.search(r"60 steps, from step [1-5]0,", printed), "from a checkpoint"
    losses, weights = result(workspace)
    expected_losses, expected_weights = uninterrupted
    assert losses == expected_losses
    assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)


def checkpoint_of(folder: Path, step: int) -> ray.train.Checkpoint:
    path = folder / f"step-{step:07d}"
    path.mkdir(parents=True)
    save({"step": step, "x": torch.ones(1000)}, [{"step": step}], str(path))
    return ray.train.Checkpoint.from_directory(path)


def test_a_broken_checkpoint_is_named_and_the_one_before_it_loads(tmp_path, capsys):
    for step in (20, 40):
        checkpoint = checkpoint_of(tmp_path, step)
    state, curve, again = train.load_last_readable_checkpoint(checkpoint, "cpu")
    assert state is not None and state["step"] == 40 and curve == [{"step": 40}] and again == ""
    file = tmp_path / "step-0000040" / "state.pt"
    file.write_bytes(file.read_bytes()[:-500])
    state, curve, again = train.load_last_readable_checkpoint(checkpoint, "cpu")
    assert state is not None and state["step"] == 20 and curve == [{"step": 20}]
    assert again, "Ray removes the broken one by its name"
    assert re.search(r"step-0000040 is broken \(.+\): resuming from the one before", capsys.readouterr().out)
    (tmp_path / "step-0000020" / "state.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=f"no checkpoint in {tmp_path} can be read: --overwrite"):
        train.load_last_readable_checkpoint(checkpoint, "cpu")


def test_mlflow_has_what_the_board_has(recipe, tmp_path, monkeypatch):
    """In a folder, which this version of MLflow wants to be asked for; a run that goes on is the same run."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    settings = MLflow(tracking_uri=f"file://{tmp_path}/mlflow", experiment="edits")
    for step in (10, 20):
        board = MLflowBoard(settings, Workspace(tmp_path / "run"), "train-abc", recipe)
        board.scalars({"loss": 1 / step, "grad_norm": 2.0}, step)
        board.image("edits", np.zeros((8, 24, 3), np.uint8), step)
        board.publish()
        board.finish()
    client = MlflowClient(settings.tracking_uri)
    experiment = client.get_experiment_by_name("edits")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [(10, 0.1), (20, 0.05)]
    assert run.data.params["train.steps"] == "4" and run.data.params["models.clip.name"] == "ViT-B-32"
    pictures = [file.path for file in client.list_artifacts(run.info.run_id, "edits")]
    assert pictures == ["edits/step-0000010.png", "edits/step-0000020.png"]
    MLflowBoard(settings, Workspace(tmp_path / "other"), "train-abc", recipe)
    assert len(client.search_runs([experiment.experiment_id])) == 2


ELASTIC = """
import sys, threading, time
import ray
from ray.cluster_utils import Cluster
from ip2p.cli import read_recipe
from ip2p.workspace import Workspace
from jobs import train

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
ray.init(cluster.address)
recipe, workspace = read_recipe(sys.argv[1]), Workspace(sys.argv[2])

def lose_a_node():
    while not any("step-0000020" in path for path in workspace.files("checkpoints")):  # the one before is whole
        time.sleep(0.2)
    print("a node is lost", flush=True)
    cluster.remove_node(nodes[1], allow_graceful=False)

threading.Thread(target=lose_a_node, daemon=True).start()
train.run(recipe, workspace)
ray.shutdown()  # before its cluster is killed, or Ray ends this process with status 1
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_lost_node_shrinks_the_group_and_training_goes_on(long_recipe, tmp_path):
    """Of two machines with a worker each one dies after the second checkpoint; the loss is that of one worker alone."""
    settings = yaml.safe_load(long_recipe.read_text())
    settings["train"] |= {"workers": [1, 2], "steps": 200, "encode_replicas": 1}
    recipe = tmp_path / "elastic.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    workspace, alone = Workspace(tmp_path / "run"), Workspace(tmp_path / "alone")
    for one in (workspace, alone):
        write_dataset(one, "train", 4)
    done = subprocess.run(
        [sys.executable, "-u", "-c", ELASTIC, str(recipe), workspace.location],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"200 steps, from the start, on 2 x cpu", done.stdout)
    lost = done.stdout.index("a node is lost")
    assert re.search(r"200 steps, from step \d+, on 1 x cpu", done.stdout[lost:]), done.stdout
    settings["train"]["workers"] = 1
    recipe.write_text(yaml.safe_dump(settings))
    assert start_job(recipe, alone).wait(600) == 0
    for (step, loss), (same_step, expected) in zip(result(workspace)[0], result(alone)[0], strict=True):
        assert step == same_step and loss == pytest.approx(expected, rel=0.05)


def test_too_many_broken_images_end_the_job(recipe, tmp_path, local_ray):
    workspace = Workspace(tmp_path)
    write_dataset(workspace, "train", 4, broken=True)
    with pytest.raises(
        ValueError,
        match=r"1 of 4 rows of .*latents failed, more than max_failed 0.2.*\(train0: edited_image is missing",
    ):
        train.run(recipe, workspace)


def test_a_column_that_is_missing_is_named(recipe, tmp_path, local_ray):
    (tmp_path / "other").mkdir()
    pq.write_table(pa.table({"image": ["a"], "edit_prompt": ["b"]}), tmp_path / "other" / "a.parquet")
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"dataset": str(tmp_path / "other")})})
    with pytest.raises(ValueError, match="has no column original_image, edited_image; it has image, edit_prompt"):
        train.run(other, Workspace(tmp_path / "run"))


def test_no_pairs_is_told_before_anything_starts(recipe, tmp_path, local_ray):
    with pytest.raises(ValueError, match=r"no pairs to train on in .*/dataset"):
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
