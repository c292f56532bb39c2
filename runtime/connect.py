"""Which Ray cluster a job runs on, and whether it has GPUs."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import ray
from ray.data import DataContext

from runtime.pending import watch_pending

# In a resumed run the checkpoint's filter and a stage's actors hold a CPU each to the end, and Ray's own listing and
# repartitioning tasks want a whole one: with two they would wait for ever. Ray's CPUs are tickets, not cores.
FEWEST_CPUS = 4


def connect() -> None:
    """Connect to the cluster that RAY_ADDRESS names (Ray's job submission sets it), else start one on this machine.

    Plain `ray.init()` would also join whatever cluster was last started here, and wait minutes for one that is gone.
    """
    context = DataContext.get_current()
    # The newer reader starts 32 actors to read the footers of a few files: on two cores that takes minutes.
    context.use_datasource_v2 = False
    # Jobs say themselves how far they are, in a line that means something to their users.
    context.enable_progress_bars = False
    # A block of the paper's protocol takes up to 103 minutes (L4), a spot GPU may take longer to come, and Ray Data
    # would end the job after 30 minutes in which no block moves.
    context.execution_no_progress_timeout_s = -1
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it prints every line of a training worker twice
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        with sigterm_handler_kept():
            if address:
                ray.init(address)
            else:
                ray.init("local", include_dashboard=False, num_cpus=max(FEWEST_CPUS, os.cpu_count() or 1))
        watch_pending(grows=bool(address))


@contextmanager
def sigterm_handler_kept() -> Iterator[None]:
    """Restore this process's SIGTERM handler after the block.

    `ray.init` installs one in Python that exits with status 15, and one in C++ that prints a stack trace and aborts.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def uses_gpu(device: str) -> bool:
    """Return whether the actors of a recipe with this `device` ask Ray for GPUs.

    `cuda` asks for one and waits: Ray does not report what its autoscaler could start.
    `auto` uses a GPU if the cluster has one now.
    """
    if device == "auto":
        return has_gpu(ray.get_runtime_context().gcs_address)
    return device == "cuda"


@cache
def has_gpu(_cluster: str) -> bool:
    """Return whether the cluster has a GPU, and print what `device: auto` therefore does.

    The first answer holds: a job whose pools grow while it runs does not change devices between its stages.
    """
    gpu = ray.cluster_resources().get("GPU", 0) > 0
    if gpu:
        print("device: auto: models run on GPUs; set device: cpu to run them on CPUs", flush=True)
    else:
        print(
            "device: auto: this Ray has no GPU now, so models run on CPUs; set device: cuda to ask for GPUs and wait",
            flush=True,
        )
    return gpu
