"""The line about requests that stay pending: its text, and what Ray itself reports."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

from ip2p.recipe import REPOSITORY
from runtime.pending import ClusterState, Request, report

GPU, CPU = Request((("GPU", 1.0),)), Request((("CPU", 1.0),))
HEAD, GPU_MACHINE = {"memory": 1e9}, {"CPU": 8.0, "GPU": 2.0}

SCALED_TO_ZERO = ClusterState(
    pending=Counter({GPU: 4}),
    unplaceable=Counter(),
    starting=Counter(gpu=1),
    failed={},
    machines=[HEAD],
    free=Counter(),
    autoscaled=True,
)


@pytest.mark.parametrize(
    ("changes", "grows", "line"),
    [
        ({}, True, "4 x {GPU: 1} pending, 1 node starting (gpu), 0 of 0 GPUs in use"),
        (
            {"starting": Counter(gpu=2, cpu=1), "machines": [GPU_MACHINE], "free": Counter(GPU=0.5)},
            True,
            "4 x {GPU: 1} pending, 3 nodes starting (2 gpu, 1 cpu), 1.5 of 2 GPUs in use",
        ),
        (
            {"pending": Counter({CPU: 2, Request((), ("pool=vllm",)): 1}), "starting": Counter()},
            True,
            "2 x {CPU: 1}, 1 x {} with pool=vllm pending, no node starting, 0 of 0 CPUs in use",
        ),
        (
            {"unplaceable": Counter({GPU: 3, CPU: 1}), "failed": {"gpu": "quota\nexceeded"}},
            True,
            "4 x {GPU: 1} pending, 1 node starting (gpu), 0 of 0 GPUs in use; "
            "a gpu node could not be started: quota exceeded; "
            "the autoscaler starts no node for 3 x {GPU: 1}: "
            "no pool has such nodes, or those that do are at their maximum",
        ),
        (
            {"autoscaled": False},
            True,
            "4 x {GPU: 1} pending, 0 of 0 GPUs in use; "
            "no machine that is up can hold this: without an autoscaler it will wait for ever",
        ),
        (
            {"autoscaled": False},
            False,
            "4 x {GPU: 1} pending, 0 of 0 GPUs in use; "
            "this Ray has 0 GPUs and starts no nodes: it will wait for ever; "
            "start one with more GPUs, or set device: cpu",
        ),
        (
            {"autoscaled": False, "pending": Counter({CPU: 1})},
            False,
            "1 x {CPU: 1} pending, 0 of 0 CPUs in use; "
            "this Ray is too small and starts no nodes: it will wait for ever",
        ),
        (
            {"autoscaled": False, "machines": [GPU_MACHINE]},
            False,
            "4 x {GPU: 1} pending, 2 of 2 GPUs in use",
        ),
    ],
)  # fmt: skip
def test_line_says_what_waits_and_why(changes, grows, line):
    assert report([replace(SCALED_TO_ZERO, **changes)], grows) == line


def test_only_requests_pending_at_every_look_are_reported():
    looks = [
        replace(SCALED_TO_ZERO, pending=Counter(pending)) for pending in ({GPU: 4, CPU: 1}, {GPU: 2}, {GPU: 3, CPU: 9})
    ]
    assert report([*looks, None], True).startswith("2 x {GPU: 1} pending, ")
    assert report([*looks, replace(SCALED_TO_ZERO, pending=Counter())], True) == ""


def test_a_head_that_never_answers_is_reported():
    assert report([None, None], True) == "its head does not answer"


LOCAL = """
import time
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from runtime import pending
from runtime.connect import connect
pending.INTERVAL, pending.LOOKS = 1.0, 2
connect()
time.sleep(2.5)
print("asked", flush=True)
nothing = ray.remote(lambda: None)
tasks = [nothing.options(num_cpus=0, num_gpus=1).remote() for _ in range(4)]
group = ray.util.placement_group([{"GPU": 2}, {"GPU": 2}])
inside = PlacementGroupSchedulingStrategy(ray.util.placement_group([{"CPU": 1}]))
sleep = ray.remote(lambda: time.sleep(60)).options(num_cpus=1, scheduling_strategy=inside)
tasks += [sleep.remote() for _ in range(3)]
time.sleep(8)
for waiting in tasks:
    ray.cancel(waiting, force=True)
ray.util.remove_placement_group(group)
time.sleep(3)
print("cancelled", flush=True)
time.sleep(2.5)
"""


def test_a_ray_without_gpus_or_autoscaler_says_that_it_waits_for_ever():
    ran = subprocess.run(
        [sys.executable, "-c", LOCAL], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )  # fmt: skip
    before, _, rest = ran.stdout.partition("asked\n")
    during, cancelled, after = rest.partition("cancelled\n")
    assert cancelled and (before, after) == ("", ""), ran.stdout + ran.stderr
    lines = [line for line in during.splitlines() if "4 x {GPU: 1}" in line and "2 x {GPU: 2}" in line]
    assert lines, ran.stdout + ran.stderr
    assert "0 of 0 GPUs in use" in lines[-1] and "it will wait for ever" in lines[-1]
    assert "_group_" not in during, "tasks of a placement group wait for their own kind, not for machines"
