"""Which Ray cluster a job runs on, and whether it has GPUs."""

import os
import pwd
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import NoReturn

import ray
from ray.data import DataContext

from ip2p.errors import UserError
from runtime.pending import watch_pending

# In a resumed run the checkpoint's filter and a stage's actors hold a CPU each to the end, and Ray's own listing and
# repartitioning tasks want a whole one: with two they would wait for ever. Ray's CPUs are tickets, not cores.
FEWEST_CPUS = 4
LISTENS_WITHIN, JOIN_WITHIN = 10, 60  # seconds


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
        give_home()
        address = os.environ.get("RAY_ADDRESS")
        with sigterm_handler_kept():
            if address:
                join(address)
            else:
                start_local()
        watch_pending(grows=bool(address))


def join(address: str) -> None:
    """Connect to a running cluster. Raises `UserError` for an address where none answers."""
    check_address(address)
    try:
        with deadline(JOIN_WITHIN, f"RAY_ADDRESS={address}: no Ray cluster answers there within {JOIN_WITHIN} s"):
            ray.init(address)
    except (ConnectionError, ValueError) as error:
        raise UserError(f"RAY_ADDRESS={address}: {error}") from error


def check_address(address: str) -> None:
    """Raises `UserError` for what is no address of a cluster, or where nothing listens.

    `ray.init` tries a dead address for minutes.
    """
    if address in ("auto", "local") or address.startswith("ray://"):
        return
    way_out = "name the cluster's head, e.g. RAY_ADDRESS=head:6379, or unset it to start Ray on this machine"
    if address.startswith(("http://", "https://")):
        raise UserError(f"RAY_ADDRESS={address}: that is the server to which `make submit` sends jobs; {way_out}")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"RAY_ADDRESS={address}: not HOST:PORT; {way_out}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=LISTENS_WITHIN).close()
    except OSError as error:
        raise UserError(f"RAY_ADDRESS={address}: nothing answers there ({error}); {way_out}") from error


def start_local() -> None:
    """Start Ray on this machine. By Ray's default its ports, open on all interfaces, want a token."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        raise UserError(
            f"RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']}: Ray's ports would run anybody's code; unset it, or set token"
        )
    ray.init("local", include_dashboard=False, num_cpus=max(FEWEST_CPUS, os.cpu_count() or 1))
    token = Path.home() / ".ray" / "auth_token"
    if token.exists():
        token.chmod(0o600)  # Ray writes it for everybody to read


def give_home() -> None:
    """Give a user without an entry in passwd (a container's random uid) the home and name that libraries ask for."""
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        os.environ.setdefault("USER", str(os.getuid()))
        if "HOME" not in os.environ:
            os.environ["HOME"] = tempfile.mkdtemp(prefix=f"home-{os.getuid()}-")
            print(f"this user has no home: using {os.environ['HOME']}; set HOME to keep its caches", flush=True)


@contextmanager
def deadline(seconds: int, message: str) -> Iterator[None]:
    """Raise `UserError` when the block takes longer: once the call returns in which it waits then."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_number: int, _frame: FrameType | None) -> NoReturn:
        raise UserError(message)

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


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
