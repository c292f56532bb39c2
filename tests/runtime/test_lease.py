"""Two runs and one workspace, as processes; hosts are told apart by a name that the test gives."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ip2p.recipe import REPOSITORY
from ip2p.workspace import Workspace
from runtime import lease
from runtime.job import job

HOLD = """
import sys, time
from runtime import lease
from runtime.job import job
from ip2p.workspace import Workspace
lease.BEAT, lease.GIVE_UP = 0.2, float(sys.argv[2])
if sys.argv[3]:
    lease.this_host = lambda: sys.argv[3]
with job("generate_pairs", Workspace(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.5)
    monkeypatch.setattr(lease, "LIFE", 3.0)
    return Workspace(tmp_path / "run")


@pytest.fixture
def holder(workspace):
    """Starts a process that holds the workspace."""
    started = []

    def start(host: str = "", give_up: float = 60.0) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, workspace.location, str(give_up), host]
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, lease.SUBMISSION: "generate_pairs-x-1"},
        )  # fmt: skip
        started.append(process)
        assert process.stdout and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def owner(workspace: Workspace) -> dict | None:
    return lease.read(workspace)


def test_a_workspace_is_let_go(workspace):
    with job("train", workspace):
        found = owner(workspace)
        assert found and (found["job"], found["pid"]) == ("train", os.getpid())
    assert owner(workspace) is None
    with job("train", workspace):
        pass


@pytest.mark.parametrize("host", ["", "elsewhere 1"])
def test_who_comes_second_is_refused(workspace, holder, host, capsys):
    first = holder(host)
    with pytest.raises(SystemExit) as end, job("train", workspace):
        raise AssertionError("let in")
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert f"is written by generate_pairs-x-1 (process {first.pid}" in said
    assert "ray job stop generate_pairs-x-1" in said
    assert first.poll() is None, "and the first goes on"


def test_a_killed_run_of_this_machine_is_not_waited_for(workspace, holder, monkeypatch):
    monkeypatch.setattr(lease, "LIFE", 1e6)
    first = holder()
    first.kill()
    first.wait()
    assert owner(workspace)
    with job("train", workspace):
        assert owner(workspace)["job"] == "train"  # pyright: ignore[reportOptionalSubscript]


def test_a_run_that_wakes_after_it_was_given_up_writes_nothing(workspace, holder):
    """An attempt that was paused (its machine, its network) for longer than LIFE, while the next one began."""
    first = holder("elsewhere 1")
    first.send_signal(signal.SIGSTOP)
    with job("train", workspace):
        first.send_signal(signal.SIGCONT)
        _, said = first.communicate(timeout=120)
        assert first.returncode == lease.FENCED
        assert "is now written by train" in said
        assert owner(workspace)["job"] == "train", "still ours"  # pyright: ignore[reportOptionalSubscript]


def test_a_run_that_can_not_say_that_it_lives_ends(workspace, holder):
    first = holder(give_up=0.5)
    first.send_signal(signal.SIGSTOP)
    time.sleep(1)
    first.send_signal(signal.SIGCONT)
    _, said = first.communicate(timeout=120)
    assert (first.returncode, "that this run lives" in said) == (lease.FENCED, True)


def test_a_run_that_can_not_write_that_it_lives_says_why(workspace, holder):
    first = holder(give_up=0.5)
    Path(workspace.path(f".{lease.OWNER}.part")).mkdir()
    _, said = first.communicate(timeout=120)
    assert first.returncode == lease.FENCED
    assert "that this run lives: [Errno" in said


def test_a_users_mistake_ends_with_a_line_and_a_bug_with_a_traceback(workspace, capsys):
    with pytest.raises(SystemExit) as end, job("export_dataset", workspace):
        workspace.read_table("dataset")
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: no dataset/*.parquet in workspace ")
    with pytest.raises(ValueError, match="invalid literal"), job("export_dataset", workspace):
        json.loads("[1]", parse_int=lambda _: int("xyz"))
    assert owner(workspace) is None


def test_lines_are_json_when_ray_is_asked_for_json(workspace, monkeypatch, capsys):
    monkeypatch.setenv("RAY_LOGGING_CONFIG_ENCODING", "JSON")
    monkeypatch.setenv(lease.SUBMISSION, "train-x-2")
    with job("train", workspace):
        print("train: step 1\ntrain: step", 2)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["job"], line["stage"], line["message"]) for line in lines] == [
        ("train-x-2", "train", "train: step 1"),
        ("train-x-2", "train", "train: step 2"),
    ]
