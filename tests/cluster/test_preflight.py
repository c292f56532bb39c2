"""Preflight and prefetch: on a real cluster of a head and two machines, one of which has almost everything wrong."""

import os
import subprocess
import sys

import pytest
import yaml
from ray.cluster_utils import Cluster

from cluster.prefetch import Model, chosen, missing
from cluster.preflight import Facts, judge, judge_cluster, judge_gpus
from ip2p.recipe import REPOSITORY, GrammarCaptions, ModelRef, Models, Recipe
from tests.cluster.hub import COMMIT, hub
from tests.runtime import s3

HERE = {"python": "3.11.1", "torch": "2.13.0"}


@pytest.fixture
def recipe(tiny_sd, tiny_clip) -> Recipe:
    ref = ModelRef(path=str(tiny_sd))
    models = Models(text_to_image=ref, clip={"name": f"local-dir:{tiny_clip}"}, llm=ref, editor=ref)  # pyright: ignore
    return Recipe(name="smallest", models=models, captions=GrammarCaptions())


def well(**changes) -> Facts:
    facts = Facts(versions=dict(HERE), disks={"/tmp": (50.0, 0.5)}, shared_memory_gb=8.0)
    for name, value in changes.items():
        setattr(facts, name, value)
    return facts


def failures(recipe: Recipe, facts: Facts, **resources: float) -> dict[str, str]:
    """What is found, by check."""
    all_resources = {"object_store_memory": 4e9, "CPU": 4} | resources
    found = judge("n", facts, all_resources, HERE, recipe, gpu_gb=20)
    return {one.check: f"{one.found} -> {one.advice}" for one in found if not one.well}


H100 = ("NVIDIA H100", 85.0, 84.0)


@pytest.mark.parametrize(
    ("facts", "resources", "check", "found"),
    [
        (well(), {}, None, ""),
        (well(gpus=[H100], cuda="13.0", driver="580.1"), {"GPU": 1}, None, ""),
        (well(versions={"python": "3.11.1", "torch": "2.12.0"}), {}, "versions", "torch 2.12.0, not 2.13.0"),
        (well(versions={**HERE, "vllm": "1"}), {}, "versions", "vllm 1, not there on the driver"),
        (well(gpus=[H100]), {"GPU": 2}, "GPUs", "1 of 2: NVIDIA H100 85 GB"),
        (well(gpus=[("L4", 24.0, 3.0)]), {"GPU": 1}, "GPU memory", "less than 20 GB free: L4"),
        (
            well(
                gpu_error="The NVIDIA driver on your system is too old (found version 11040)", cuda="13.0", driver="470"
            ),
            {"GPU": 1},
            "driver",
            "driver 470, torch for CUDA 13.0",
        ),
        (well(storage_error="credentials"), {}, "storage", "credentials"),
        (well(missing={"models.llm": "a/b is not in the cache"}), {}, "weights", "models.llm: a/b is not in the cache"),
        (well(), {"object_store_memory": 5e7}, "object store", "0.05 GB of 8.00 GB"),
        (well(shared_memory_gb=0.06), {}, "object store", "4.00 GB of 0.06 GB shared memory"),
        (well(disks={"/tmp": (3.0, 0.5)}), {}, "disk", "/tmp: 3 GB free"),
        (well(disks={"/tmp": (30.0, 0.97)}), {}, "disk", "97% used"),
    ],
)
def test_what_is_wrong_with_a_machine(recipe, facts, resources, check, found):
    wrong = failures(recipe, facts, **resources)
    assert list(wrong) == ([check] if check else [])
    if check:
        assert found in wrong[check] and len(wrong[check].split(" -> ")[1]) > 2


def test_a_cpu_machine_needs_no_gpu():
    (one,) = judge_gpus("n", well(), promised=0, gpu_gb=20)
    assert one.well and one.found == "none"


@pytest.mark.parametrize(
    ("nodes", "cpus_are_enough", "gpus"),
    [
        ([{"CPU": 0.0}, {"CPU": 2.0}], False, "none now"),
        ([{"CPU": 0.0}], True, "none now"),  # a head whose pools are at 0
        ([{"CPU": 4.0, "GPU": 2.0}, {"CPU": 4.0}], True, "2"),
    ],
)
def test_a_cluster_that_has_none_of_a_resource_yet_passes(recipe, nodes, cpus_are_enough, gpus):
    machines = {str(n): {"Resources": resources} for n, resources in enumerate(nodes)}
    cuda = recipe.model_copy(update={"device": "cuda"})
    found = {one.check: one for one in judge_cluster(machines, cuda)}
    assert (found["CPUs"].well, found["GPUs"].well) == (cpus_are_enough, True)
    assert found["GPUs"].found.startswith(gpus)


@pytest.mark.parametrize(
    ("files", "kept"),
    [
        (  # a pipeline: its parts, not all in one file, in one format and precision
            ["model_index.json", "README.md", "v1-5-pruned.safetensors", "v1-5-pruned.ckpt", "unet/config.json",
             "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.safetensors",
             "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors",
             "tokenizer/merges.txt", "vae/diffusion_pytorch_model.bin"],
            ["model_index.json", "tokenizer/merges.txt", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
             "vae/diffusion_pytorch_model.bin"],
        ),
        (["config.json", "pytorch_model.bin", "tf_model.h5"], ["config.json", "pytorch_model.bin"]),
        (
            ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
             "model.safetensors.index.json", "pytorch_model.bin"],
            ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
             "model.safetensors.index.json"],
        ),
    ],
)  # fmt: skip
def test_files_that_are_loaded_are_fetched(files, kept):
    assert chosen(files) == kept


def test_half_a_model_is_missing(tmp_path):
    assert "is not there" in missing(Model("k", str(tmp_path / "no"), None))
    (tmp_path / "config.json").write_text("{}")
    assert "has no weights" in missing(Model("k", str(tmp_path), None))
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "broken-off")
    assert "has no weights" in missing(Model("k", str(tmp_path), None))
    (tmp_path / "broken-off").write_text("x")
    assert missing(Model("k", str(tmp_path), None)) == ""


def command(module: str, address: str, environment: dict[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *flags], cwd=REPOSITORY, capture_output=True, text=True, timeout=280,
        env={**os.environ, **environment, "RAY_ADDRESS": address, "COLUMNS": "400"}, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_cluster_with_a_bad_machine(recipe, tmp_path, monkeypatch):
    files = {"config.json": b"{}", "model.safetensors": b"weights", "pytorch_model.bin": b"weights, too"}
    with s3.s3_server() as storage, hub(files) as models:
        address = f"http://127.0.0.1:{models.server_address[1]}"
        good = {**storage, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "shared")}
        bad = {**good, "AWS_ENDPOINT_URL": "http://127.0.0.1:1", "HF_ENDPOINT": f"{address}/nothing"}
        bad["HF_HOME"] = str(tmp_path / "own")
        (tmp_path / "own").mkdir()
        llm = ModelRef(path="me/tiny", revision=COMMIT)
        text = recipe.model_copy(update={"models": recipe.models.model_copy(update={"llm": llm})})
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.dump(text.model_dump(mode="json")))
        flags = ["--recipe", str(file), "--workspace", "s3://bucket/run"]
        memory = {"object_store_memory": 700_000_000}
        cluster = Cluster()
        try:
            cluster.add_node(num_cpus=0, env_vars=good, **memory)
            cluster.add_node(num_cpus=4, labels={"pool": "cpu"}, env_vars=good, **memory)
            cluster.add_node(num_cpus=1, num_gpus=1, labels={"pool": "vllm"}, env_vars=bad, **memory)
            fetched = command("cluster.prefetch", cluster.address, good, *flags)
            looked = command("cluster.preflight", cluster.address, good, *flags, "--pools", "cpu,vllm")
        finally:
            cluster.shutdown()
    assert fetched.returncode == 1, fetched.stderr
    said = fetched.stdout.splitlines()
    assert sum(" models.llm: /" in line for line in said) == 2, fetched.stdout + fetched.stderr
    assert sum(" error: models.llm: me/tiny" in line for line in said) == 1
    downloads = [call for call in models.calls if "/resolve/" in call]  # pyright: ignore[reportAttributeAccessIssue]
    assert not any("pytorch_model.bin" in call for call in downloads)
    (snapshot,) = (tmp_path / "shared").rglob("model.safetensors")
    assert COMMIT in str(snapshot) and snapshot.read_bytes() == b"weights"

    assert looked.returncode == 1, looked.stdout + looked.stderr
    assert "Traceback" not in looked.stderr, looked.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in looked.stdout.splitlines() if "│" in line]
    failed = {(row[0].split()[0], row[1]) for row in rows if len(row) == 5 and row[2] == "FAIL"}
    broken_gpu = {machine for machine, check in failed if check in ("GPUs", "driver")}  # Ray was told of a GPU
    assert broken_gpu == {"vllm"}, looked.stdout
    assert {one for one in failed if one[1] not in ("GPUs", "driver")} == {("vllm", "storage"), ("vllm", "weights")}
    assert all(row[4] for row in rows if row[2] == "FAIL"), "each with what to do"
    checks = {check for machine, check in ((row[0].split()[0], row[1]) for row in rows if row[0]) if machine == "cpu"}
    assert checks >= {"versions", "GPUs", "storage", "weights", "object store", "disk", "clock"}
    assert {row[0].split()[0] for row in rows if row[0]} >= {"head", "cpu", "vllm", "cluster"}
