"""Which Ray cluster a job runs on, and whether it has GPUs."""

import os

import ray
from ray._private.state import state as ray_state
from ray.data import DataContext

from ip2p.errors import UserError

# In a resumed run the checkpoint's filter and a stage's actors hold a CPU each to the end, and Ray's own listing and
# repartitioning tasks want a whole one: with two they would wait for ever. Ray's CPUs are tickets, not cores.
FEWEST_CPUS = 4


def connect() -> None:
    """Connect to the cluster that RAY_ADDRESS names (Ray's job submission sets it), else start one on this machine.

    Plain `ray.init()` would also join whatever cluster was last started here, and wait minutes for one that is gone.
    """
    # The newer reader starts 32 actors to read the footers of a few files: on two cores that takes minutes.
    DataContext.get_current().use_datasource_v2 = False
    # Jobs say themselves how far they are, in a line that means something to their users.
    DataContext.get_current().enable_progress_bars = False
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it prints every line of a training worker twice
    if not ray.is_initialized():
        if address := os.environ.get("RAY_ADDRESS"):
            ray.init(address)
        else:
            ray.init("local", include_dashboard=False, num_cpus=max(FEWEST_CPUS, os.cpu_count() or 1))


def uses_gpu(device: str) -> bool:
    """Whether a recipe's `device` means that its actors ask Ray for GPUs: the cluster has them, or can grow them.

    Raises `UserError` when it demands what the cluster has not.
    """
    gpus = ray.cluster_resources().get("GPU", 0) or gpus_to_come()
    if device == "cuda" and not gpus:
        raise UserError("device: cuda was asked for and the Ray cluster has no GPU; use device: auto or cpu")
    return device != "cpu" and gpus > 0


def gpus_to_come() -> float:
    """GPUs of an autoscaling cluster at its largest; 0 where nothing scales. (Ray Train asks Ray in the same way.)"""
    return (ray_state.get_max_resources_from_cluster_config() or {}).get("GPU", 0)
