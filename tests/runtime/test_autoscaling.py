"""GPUs that do not exist yet: Ray's own autoscaler (v2) starts pools that are at 0.

The machines are raylets on this one (Ray's fake node provider); the autoscaler, its state and the requests are real.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from ip2p.recipe import REPOSITORY
from tests.cluster.conftest import free_ports

HEAD = "f" * 51 + "00000"  # the provider's id of the head
STORE = {"object_store_memory": 100_000_000}

DRIVER = """
import os
import sys
import ray
from ray.data import ActorPoolStrategy
from ip2p.recipe import Recipe
from jobs.generate_pairs import generator_resources
from runtime import pending
from runtime.connect import connect, uses_gpu

pending.INTERVAL, pending.LOOKS = 2.0, 4
connect()
print("auto", uses_gpu("auto"), "cuda", uses_gpu("cuda"), "GPUs", ray.cluster_resources().get("GPU", 0))
nothing = ray.remote(num_cpus=0)(lambda: None)
never = nothing.options(num_gpus=8).remote()

class Where:
    def __call__(self, batch):
        batch["pool"] = [os.environ["RAY_NODE_TYPE_NAME"]] * len(batch["id"])
        batch["gpus"] = [len(ray.get_gpu_ids())] * len(batch["id"])
        return batch

recipe = Recipe.model_validate_json(sys.argv[1])
rows = ray.data.range(4).map_batches(
    Where, batch_size=4, compute=ActorPoolStrategy(size=1), **generator_resources(recipe)
).take_all()
print("ran", {(row["pool"], row["gpus"]) for row in rows})
"""


@pytest.fixture
def cluster() -> Iterator[str]:
    """Address of a Ray whose head has no CPUs and whose pools have no machines yet."""
    gcs, client, agent, grpc = free_ports(4)
    config = {
        "cluster_name": "fake", "max_workers": 4, "upscaling_speed": 1.0, "idle_timeout_minutes": 5,
        "provider": {
            # By its class: the wheel lacks the defaults of the type `fake_multinode`.
            "type": "external", "launch_multiple": True, "head_node_id": HEAD,
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"{ray.util.get_node_ip_address()}:{gcs}",
        },
        "head_node_type": "ray.head.default",  # the only name that the provider knows
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "cpu": {"resources": {"CPU": 4, **STORE}, "node_config": {}, "min_workers": 0, "max_workers": 2},
            "gpu": {"resources": {"CPU": 4, "GPU": 1, **STORE}, "node_config": {}, "min_workers": 0, "max_workers": 1},
        },
        "file_mounts_sync_continuously": False,
        **{key: [] for key in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        **{key: [] for key in ("initialization_commands", "setup_commands", "head_setup_commands")},
        **{key: [] for key in ("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")},
    }  # fmt: skip
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {
        "RAY_AUTH_MODE": "disabled", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1", "RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
    }  # fmt: skip
    # Ray's sockets lie there, and their paths must be short.
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder, "autoscaling.json"), Path(folder, "head.log")
        file.write_text(json.dumps(config))
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=0",
            f"--port={gcs}", f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
            f"--dashboard-agent-grpc-port={grpc}", "--include-dashboard=false", "--disable-usage-stats",
            "--object-store-memory=200000000", f"--temp-dir={folder}", f"--autoscaling-config={file}",
        ]  # fmt: skip
        with log.open("w") as out:
            head = subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=out, stderr=out, start_new_session=True)
        try:
            deadline = time.monotonic() + 120
            while "Ray runtime started" not in log.read_text():
                assert head.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield f"{ray.util.get_node_ip_address()}:{gcs}"
        finally:
            started = psutil.Process(head.pid).children(recursive=True)
            os.killpg(head.pid, signal.SIGKILL)  # the machines' raylets are in the head's group
            head.wait()
            psutil.wait_procs(started, timeout=30)


@pytest.mark.slow
def test_a_job_with_cuda_waits_for_a_gpu_that_the_autoscaler_starts(cluster, smallest, tmp_path):
    recipe, output = smallest.model_copy(update={"device": "cuda"}), tmp_path / "output"
    with output.open("w") as out:
        job = subprocess.Popen(
            [sys.executable, "-c", DRIVER, recipe.model_dump_json()], cwd=REPOSITORY, stdout=out, stderr=out,
            env={**os.environ, "RAY_ADDRESS": cluster, "RAY_AUTH_MODE": "disabled"},
        )  # fmt: skip
        try:
            status = job.wait(timeout=120)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            job.kill()
    text = output.read_text()
    assert status == 0, text
    assert "auto False cuda True GPUs 0\n" in text
    assert "ran {('gpu', 1)}\n" in text
    waiting = [line for line in text.splitlines() if line.startswith("waiting for the cluster: ")]
    assert any("1 x {GPU: 1}" in line and "0 of 0 GPUs in use" in line for line in waiting), text
    assert any("the autoscaler starts no node for 1 x {GPU: 8}: " in line for line in waiting), text
