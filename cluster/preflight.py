"""Look at every machine of a cluster before a job does: GPUs, driver, storage, weights, clock, memory, disks, versions.

    python -m cluster.preflight --recipe recipes/sd15.yaml --workspace s3://bucket/run --pools vllm,training

Prints a table with what to do about each failure, and ends with status 1 when there is one. Machines that are not
started are not seen: --pools starts one of each of these kinds (the label `pool`).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import psutil
import ray
from pydantic import BaseModel, Field
from ray._private import worker
from ray.exceptions import GetTimeoutError, RayError
from rich.console import Console
from rich.table import Table

from cluster.prefetch import Model, missing, models, nodes, on_node
from ip2p.cli import load_settings
from ip2p.errors import UserError
from ip2p.recipe import Recipe
from ip2p.workspace import Workspace, versions
from runtime.connect import FEWEST_CPUS, connect
from runtime.exit import exit_statuses

GB = 1e9
MAX_SKEW = 5.0  # seconds; buckets refuse a quarter of an hour, and logs and leases are read by people
MIN_FREE_DISK_GB = 10.0
FULL_DISK = 0.9  # Ray stops to spill objects at 0.95
BLOCKS_IN_STORE = 8  # blocks of pairs that are on their way at once
NONE_NOW = "none now: jobs wait until the autoscaler starts some, which --pools tries"

# In a process of its own: Ray hides GPUs from tasks that ask for none, and CUDA would stay in the worker.
LOOK_AT_GPUS = """
import json, torch
found = {"error": "", "cuda": torch.version.cuda, "gpus": []}
try:
    torch.cuda.init()
    for n in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(n)
        found["gpus"].append([torch.cuda.get_device_name(n), total / 1e9, free / 1e9])
except (RuntimeError, AssertionError) as error:
    found["error"] = str(error).splitlines()[0]
print(json.dumps(found))
"""


class Flags(BaseModel):
    pools: str = Field("", description="kinds of machines (their label `pool`, e.g. vllm,training) to start one of")
    gpu_gb: float = Field(20.0, ge=0, description="GB that must be free on every GPU")
    patience: float = Field(600.0, gt=0, description="seconds that machines may take to start and to answer")


@dataclass
class Facts:
    """What one machine says of itself."""

    versions: dict[str, str] = field(default_factory=dict)
    gpus: list[tuple[str, float, float]] = field(default_factory=list)  # name, GB, GB free
    gpu_error: str = ""
    cuda: str | None = None  # that torch was built for
    driver: str = ""  # NVIDIA's, "" without
    storage_error: str = ""
    missing: dict[str, str] = field(default_factory=dict)  # key of the recipe: what is not there
    disks: dict[str, tuple[float, float]] = field(default_factory=dict)  # folder: GB free, share used
    shared_memory_gb: float = 0.0


@dataclass(frozen=True)
class Finding:
    node: str
    check: str
    well: bool
    found: str
    advice: str = ""


def look(has_gpus: bool, location: str, token: str, wanted: Sequence[Model]) -> Facts:
    """Run on the machine itself."""
    facts = Facts(versions=versions(), storage_error=try_storage(location, token))
    if has_gpus:
        look_at_gpus(facts)
    facts.missing = {model.key: problem for model in wanted if (problem := missing(model))}
    session = worker._global_node.get_session_dir_path()  # pyright: ignore[reportAttributeAccessIssue]
    for folder in {session, tempfile.gettempdir(), os.environ.get("HF_HOME", "")} - {""}:
        if os.path.isdir(folder):  # noqa: PTH112
            usage = psutil.disk_usage(folder)
            facts.disks[folder] = (usage.free / GB, usage.percent / 100)
    facts.shared_memory_gb = psutil.disk_usage("/dev/shm").total / GB
    return facts


def try_storage(location: str, token: str) -> str:
    """Read what the driver wrote, and answer with it; what went wrong, or ""."""
    workspace = Workspace(location)
    me = ray.get_runtime_context().get_node_id()
    try:
        with workspace.reached(), workspace.open_in("preflight", token, "driver") as file:
            read = file.read().decode()
        if read != token:
            return f"read {read[:40]!r} where the driver wrote {token!r}"
        with workspace.reached():
            workspace.write(me, "preflight", token, me)
    except UserError as error:
        return str(error)
    return ""


def look_at_gpus(facts: Facts) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    looked = subprocess.run(
        [sys.executable, "-c", LOOK_AT_GPUS], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    if looked.returncode:
        facts.gpu_error = (looked.stderr.splitlines() or ["torch does not start"])[-1]
        return
    found = json.loads(looked.stdout.splitlines()[-1])
    facts.gpu_error, facts.cuda = found["error"], found["cuda"]
    facts.gpus = [(name, total, free) for name, total, free in found["gpus"]]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        facts.driver = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        facts.driver = ""


def judge(
    node: str, facts: Facts, resources: Mapping[str, float], expected: Mapping[str, str], recipe: Recipe, gpu_gb: float
) -> Iterator[Finding]:
    """What is to be thought of a machine; `resources` as Ray has them, `expected` the versions of the driver."""
    other = [f"{n} {facts.versions.get(n)}, not {v}" for n, v in expected.items() if facts.versions.get(n) != v]
    other += [f"{name} {facts.versions[name]}, not there on the driver" for name in facts.versions.keys() - expected]
    yield Finding(
        node, "versions", not other, "; ".join(other) or f"as the driver's: ray {facts.versions.get('ray')}",
        "one image for all machines (cluster/Dockerfile): pull it anew, then restart the node",
    )  # fmt: skip
    yield from judge_gpus(node, facts, int(resources.get("GPU", 0)), gpu_gb)
    yield Finding(node, "storage", not facts.storage_error, facts.storage_error or "read and written", "see there")
    yield Finding(
        node, "weights", not facts.missing,
        "; ".join(f"{key}: {what}" for key, what in facts.missing.items()) or "there",
        "python -m cluster.prefetch --recipe ..., or a directory on storage that all machines mount",
    )  # fmt: skip
    need = BLOCKS_IN_STORE * block_gb(recipe)
    store = resources.get("object_store_memory", 0) / GB
    fits = facts.shared_memory_gb >= store
    shown = f"{store:.2f} GB of {facts.shared_memory_gb:.2f} GB shared memory"
    yield Finding(
        node, "object store", store >= need and fits, shown,
        f"at least {need:.2f} GB for {BLOCKS_IN_STORE} blocks (pairs.rows_per_block), and no more than /dev/shm: more "
        "memory for the pod, or --shm-size for the container",
    )  # fmt: skip
    for folder, (free, used) in facts.disks.items():
        yield Finding(
            node, "disk", free >= MIN_FREE_DISK_GB and used < FULL_DISK,
            f"{folder}: {free:.0f} GB free, {used:.0%} used",
            f"free {MIN_FREE_DISK_GB:.0f} GB at least: Ray spills objects there, and does not when it is 95% full",
        )  # fmt: skip


def judge_gpus(node: str, facts: Facts, promised: int, gpu_gb: float) -> Iterator[Finding]:
    """`promised`: how many GPUs Ray counts there."""
    if not promised:
        yield Finding(node, "GPUs", True, "none")
        return
    if "driver" in facts.gpu_error.lower():
        yield Finding(
            node, "driver", False, f"driver {facts.driver or '?'}, torch for CUDA {facts.cuda}: {facts.gpu_error}",
            f"install a driver that knows CUDA {facts.cuda}, or start from a machine image that has one",
        )  # fmt: skip
        return
    names = ", ".join(f"{name} {total:.0f} GB ({free:.0f} free)" for name, total, free in facts.gpus)
    yield Finding(
        node, "GPUs", len(facts.gpus) == promised and not facts.gpu_error,
        f"{len(facts.gpus)} of {promised}: {names or facts.gpu_error or 'torch sees none'}",
        "nvidia-smi on the machine; in a container --gpus all and the NVIDIA container toolkit, in a pod the limit "
        "nvidia.com/gpu; ray start --num-gpus says no more than there are",
    )  # fmt: skip
    small = [name for name, _, free in facts.gpus if free < gpu_gb]
    yield Finding(
        node, "GPU memory", not small, f"less than {gpu_gb:g} GB free: {', '.join(small)}" if small else "free",
        "end what else runs there (nvidia-smi), or take larger GPUs; --gpu_gb says what is enough",
    )  # fmt: skip


def block_gb(recipe: Recipe) -> float:
    """A block of pairs, its images as PNG."""
    pairs = recipe.pairs
    return pairs.rows_per_block * pairs.max_pairs * 2 * pairs.height * pairs.width * 1.8 / GB


def judge_cluster(machines: Mapping[str, Mapping[str, Any]], recipe: Recipe) -> Iterator[Finding]:
    """Judge all machines together.

    Having none of a resource now is no failure: Ray does not report what its autoscaler could start.
    """
    cpus = sum(node["Resources"].get("CPU", 0) for node in machines.values())
    yield Finding(
        "cluster", "CPUs", not cpus or cpus >= FEWEST_CPUS, f"{cpus:g}" if cpus else NONE_NOW,
        f"{FEWEST_CPUS} at least, or resumed jobs wait for ever: --num-cpus counts tickets, not cores",
    )  # fmt: skip
    gpus = sum(node["Resources"].get("GPU", 0) for node in machines.values())
    if recipe.device == "cuda":
        yield Finding("cluster", "GPUs", True, f"{gpus:g}" if gpus else NONE_NOW)


def clock() -> float:
    """What time it is there (Ray runs no built-in functions)."""
    return time.time()


def skew(node_id: str, deadline: float) -> float:
    """Seconds that the clock there is ahead of ours, at least: by the quickest of three answers, less half its way."""
    best = (float("inf"), 0.0)
    for _ in range(3):
        sent = time.time()
        there = ray.get(on_node(node_id, clock), timeout=max(deadline - time.monotonic(), 1))
        back = time.time()
        best = min(best, (back - sent, there - (sent + back) / 2))
    way, ahead = best
    return max(abs(ahead) - way / 2, 0.0) * (1 if ahead > 0 else -1)


def start_pools(pools: Sequence[str], deadline: float) -> Iterator[Finding]:
    """Have the autoscaler start a machine of each kind, and wait for it."""
    come = {pool: ray.remote(num_cpus=0, label_selector={"pool": pool})(clock).remote() for pool in pools}
    for pool, ref in come.items():
        ready, _ = ray.wait([ref], timeout=max(deadline - time.monotonic(), 0))
        yield Finding(
            "cluster", f"pool {pool}", bool(ready), "has a machine" if ready else "no machine came",
            "quota, spot capacity, image: `ray status` and the autoscaler's log (monitor.out) on the head",
        )  # fmt: skip
        if not ready:
            ray.cancel(ref)


def run(recipe: Recipe, workspace: Workspace, flags: Flags) -> list[Finding]:
    """Look at all machines. Raises `UserError` when the driver itself does not reach the workspace."""
    deadline = time.monotonic() + flags.patience
    wanted, token = models(recipe), uuid4().hex
    connect()
    findings = list(start_pools([pool for pool in flags.pools.split(",") if pool], deadline))
    machines = nodes()
    findings += judge_cluster(machines, recipe)
    with workspace.reached():
        workspace.write(token, "preflight", token, "driver")
    answers = {
        node_id: on_node(node_id, look, node["Resources"].get("GPU", 0) > 0, workspace.uri(), token, wanted)
        for node_id, node in machines.items()
    }
    for node_id, answer in answers.items():
        name = described(machines[node_id])
        try:
            facts = ray.get(answer, timeout=max(deadline - time.monotonic(), 1))
            if not facts.storage_error and not workspace.exists("preflight", token, node_id):
                facts.storage_error = "the driver does not see what this machine wrote: it is not the same storage"
            findings += judge(name, facts, machines[node_id]["Resources"], versions(), recipe, flags.gpu_gb)
            ahead = skew(node_id, deadline)
            found = f"{ahead:+.1f} s"
            findings.append(Finding(name, "clock", abs(ahead) <= MAX_SKEW, found, "let chrony or NTP set the clock"))
        except GetTimeoutError:
            findings.append(Finding(name, "answer", False, "none", "ray status; ray logs on that machine; restart it"))
        except RayError as error:
            findings.append(Finding(name, "answer", False, str(error).splitlines()[-1], "look at its logs (ray logs)"))
    workspace.fs.delete_dir(workspace.path("preflight"))
    return findings


def described(node: Mapping[str, Any]) -> str:
    """`head 10.0.0.1`, `vllm 10.0.0.7`: what it is for, where it is, and which of those."""
    head = "node:__internal_head__" in node["Resources"]
    pool = node.get("Labels", {}).get("pool") or ("head" if head else "node")
    return f"{pool} {node['NodeManagerAddress']} {node['NodeID'][:6]}"


def show(findings: Sequence[Finding], console: Console) -> None:
    table = Table("machine", "check", "", "found", "what to do")
    for one in findings:
        table.add_row(one.node, one.check, "ok" if one.well else "FAIL", one.found, "" if one.well else one.advice)
    console.print(table)
    bad = sum(not one.well for one in findings)
    console.print(f"preflight: {bad} of {len(findings)} checks failed" if bad else "preflight: all is well")


def main(argv: list[str] | None = None) -> None:
    recipe, workspace, flags = load_settings(__doc__ or "", Flags, argv=argv)
    assert workspace is not None
    with exit_statuses():
        findings = run(recipe, workspace, flags)
    show(findings, Console(highlight=False))
    sys.exit(any(not one.well for one in findings))


if __name__ == "__main__":
    main()
