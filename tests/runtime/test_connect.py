"""Devices, timeouts and signals of a process that is connected to Ray, each in a process of its own."""

import signal
import subprocess
import sys

import pytest

from ip2p.recipe import REPOSITORY
from runtime.exit import TERMINATED

DEVICES = """
import ray
from runtime.connect import uses_gpu
ray.init("local", include_dashboard=False, num_cpus=1, num_gpus={gpus})
print([uses_gpu(device) for device in ("cuda", "cpu", "auto", "auto")])
"""

CONNECTED = """
import time
from ray.data import DataContext
from runtime.connect import connect
from runtime.exit import exit_statuses
with exit_statuses(resumable=True):
    connect()
    print(DataContext.get_current().execution_no_progress_timeout_s, flush=True)
    time.sleep(120)
"""

HAS_A_GPU = "device: auto: models run on GPUs; set device: cpu to run them on CPUs\n"
HAS_NONE = "device: auto: this Ray has no GPU now, so models run on CPUs; set device: cuda to ask for GPUs and wait\n"


def python(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("gpus", "printed"),
    [(1, f"{HAS_A_GPU}[True, False, True, True]\n"), (0, f"{HAS_NONE}[True, False, False, False]\n")],
)
def test_cuda_always_asks_for_a_gpu_and_auto_says_once_what_it_chose(gpus, printed):
    process = python(DEVICES.format(gpus=gpus))
    output, errors = process.communicate(timeout=120)
    assert output == printed, errors


def test_a_connected_process_never_times_out_and_ends_at_sigterm_in_one_line():
    process = python(CONNECTED)
    assert process.stdout and process.stdout.readline() == "-1\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == TERMINATED, errors
    assert errors.splitlines()[-1] == "terminated; run the same command to resume", errors
    assert "Traceback" not in errors and "*** SIG" not in errors, errors
