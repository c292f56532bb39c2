"""Devices, timeouts and signals of a process that is connected to Ray, each in a process of its own."""

import getpass
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ip2p.errors import UserError
from ip2p.recipe import REPOSITORY
from runtime.connect import deadline, give_home, join, start_local
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


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1:9", "nothing answers there"),
        ("no-such-host.invalid:6379", "nothing answers there"),
        ("http://127.0.0.1:8265", "make submit"),
        ("nonsense", "not HOST:PORT"),
        ("head:", "not HOST:PORT"),
        ("head:99999", "not HOST:PORT"),
        (":6379", "not HOST:PORT"),
    ],
)
def test_a_wrong_ray_address_is_named_before_ray_waits_for_it(address, says):
    with pytest.raises(UserError, match=rf"RAY_ADDRESS={re.escape(address)}: .*{says}.*") as refused:
        join(address)
    assert "unset it" in str(refused.value)


def test_a_server_that_is_no_ray_is_given_up():
    began = time.monotonic()
    with pytest.raises(UserError, match="no Ray cluster answers"), deadline(1, "no Ray cluster answers"):
        time.sleep(30)
    assert time.monotonic() < began + 10
    with deadline(1, "never"):
        pass
    time.sleep(1.2)


def test_ray_without_its_token_is_refused(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UserError, match=r"RAY_AUTH_MODE=disabled: .*anybody's code"):
        start_local()


def test_a_user_without_an_entry_in_passwd_gets_a_home_and_a_name(monkeypatch, capsys):
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError, match="home"):
        Path.home()
    give_home()
    assert getpass.getuser() == "54321"
    assert Path.home().is_dir()
    assert "set HOME to keep its caches" in capsys.readouterr().out
    Path.home().rmdir()


def test_a_user_with_a_home_keeps_it(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    give_home()
    assert os.environ["HOME"] == "/somewhere"
