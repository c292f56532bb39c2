"""Two runs and one workspace, as processes. Hosts are told apart by a name that the test gives."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ip2p.recipe import REPOSITORY
from ip2p.workspace import Workspace
from runtime import atomic_file, lease
from runtime.job import job
from runtime.lease import Owner
from tests.runtime import s3
from tests.runtime.stores import Gcs, Proxy, atomic_puts, serving

HOLD = """
import sys, time
from runtime import atomic_file, lease
from runtime.job import job
from ip2p.workspace import Workspace
location, host, give_up = sys.argv[1], sys.argv[2], float(sys.argv[3])
lease.BEAT, lease.RETRY, lease.GIVE_UP, lease.SHORTEST_LIFE, lease.MARGIN = 0.2, 0.1, give_up, 3, 3
atomic_file.READ_TIMEOUT = 1
if host:
    lease.this_host = lambda: host
with job("generate_pairs", Workspace(location)) as owned:
    print("held", owned.epoch, flush=True)
    while sys.stdin.readline() != "end\\n":
        time.sleep(0.1)
"""

RACE = """
import sys, time
from runtime import lease
from ip2p.errors import UserError
from ip2p.workspace import Workspace
for line in sys.stdin:
    location, start = line.split()
    workspace = Workspace(location)
    while time.time() < float(start):
        pass
    try:
        print("owner", lease.take(workspace, "generate_pairs").epoch, flush=True)
    except UserError:
        print("refused", flush=True)
"""
TRIALS = 50


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    shorten(monkeypatch)
    return Workspace(tmp_path / "run")


def shorten(monkeypatch) -> None:
    """Let waits last seconds."""
    for name, seconds in {"BEAT": 0.5, "POLL": 0.2, "RETRY": 0.1, "SHORTEST_LIFE": 3.0}.items():
        monkeypatch.setattr(lease, name, seconds)
    monkeypatch.setenv(lease.RECONNECT_TIMEOUT, "0")


@pytest.fixture
def bucket(monkeypatch):
    """A proxy before an S3 server with a bucket named `bucket`."""
    shorten(monkeypatch)
    with (
        s3.s3_server() as environment,
        atomic_puts(monkeypatch),
        serving(Proxy(environment["AWS_ENDPOINT_URL"])) as proxy,
    ):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{proxy.address}")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield proxy


@pytest.fixture
def python():
    """Starts a Python process that runs `code` with `arguments`."""
    started = []

    def start(code: str, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], cwd=REPOSITORY, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, lease.SUBMISSION: "generate_pairs-x-1"},
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def holder(python):
    """Starts a process that holds a workspace until a line is sent to it."""

    def start(location: str, host: str = "", give_up: float = 60.0) -> subprocess.Popen[str]:
        process = python(HOLD, location, host, str(give_up))
        line = process.stdout.readline()
        assert line.startswith("held "), process.stderr.read()
        return process

    return start


def owner(workspace: Workspace) -> Owner:
    stored = atomic_file.atomic_file(workspace, lease.OWNER).read()
    assert stored
    return Owner.parse(stored.content)


def leave_behind(workspace: Workspace, **changes) -> None:
    """Write the record of a run that was killed, on this host if no other is given."""
    record = {
        "token": "x", "epoch": 6, "job": "train", "submission": None, "host": lease.this_host(),
        "pid": 1, "process_started": 0.0, "cluster": None, "since": "yesterday", "life": 3.0,
    }  # fmt: skip
    content = Owner(**{**record, **changes}).format()
    workspace.write(content, lease.OWNER)


def test_a_released_workspace_is_taken_at_once_with_the_next_epoch(workspace, monkeypatch):
    monkeypatch.setattr(lease, "SHORTEST_LIFE", 1e6)
    for epoch in (1, 2, 3):
        with job("train", workspace) as owned:
            found = owner(workspace)
            assert (found.job, found.pid, found.released) == ("train", os.getpid(), False)
            assert owned.epoch == found.epoch == epoch
        assert owner(workspace).released


@pytest.mark.parametrize("host", ["", "elsewhere 1"])
def test_a_second_run_is_refused(workspace, holder, host, capsys):
    first = holder(workspace.location, host)
    with pytest.raises(SystemExit) as end, job("train", workspace):
        raise AssertionError("let in")
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert f"is written by generate_pairs-x-1 (process {first.pid}" in said
    assert "ray job stop generate_pairs-x-1" in said
    assert first.poll() is None, "the first one continues"
    first.communicate("end\n", timeout=60)
    assert first.returncode == 0 and owner(workspace).released


def test_a_killed_run_of_this_host_is_replaced_at_once(workspace, holder, monkeypatch):
    monkeypatch.setattr(lease, "SHORTEST_LIFE", 1e6)
    first = holder(workspace.location)
    first.kill()
    first.wait()
    assert not owner(workspace).released
    with job("train", workspace) as owned:
        assert (owner(workspace).job, owned.epoch) == ("train", 2)


def test_a_silent_run_of_another_host_is_replaced_after_its_life(workspace):
    leave_behind(workspace, host="elsewhere 1", life=4.0)
    began = time.monotonic()
    with job("train", workspace) as owned:
        assert owned.epoch == 7
        assert 3.8 < time.monotonic() - began < 6


def test_time_since_the_last_heartbeat_counts(workspace):
    leave_behind(workspace, host="elsewhere 1", life=1e6)
    two_weeks_ago = time.time() - 14 * 86400
    os.utime(workspace.path(lease.OWNER), (two_weeks_ago, two_weeks_ago))
    with job("train", workspace) as owned:
        assert owned.epoch == 7


def test_a_run_in_the_same_cluster_waits_the_shortest_life(workspace, monkeypatch):
    leave_behind(workspace, host="elsewhere 1", cluster="a-uid", life=1e6)
    monkeypatch.setenv(lease.STORAGE_NAMESPACE, "a-uid")
    with job("train", workspace) as owned:
        assert (owned.epoch, owner(workspace).cluster) == (7, "a-uid")


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, 120),
        ({lease.STORAGE_NAMESPACE: "uid"}, 660),
        ({lease.RECONNECT_TIMEOUT: "900", lease.STORAGE_NAMESPACE: "uid"}, 960),
        ({lease.RECONNECT_TIMEOUT: "5"}, 120),
    ],
)
def test_life_is_longer_than_workers_outlive_their_head(monkeypatch, environment, seconds):
    monkeypatch.delenv(lease.RECONNECT_TIMEOUT, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert lease.life() == seconds
    assert lease.life() >= float(environment.get(lease.RECONNECT_TIMEOUT, 60)) + lease.MARGIN


def test_times_fit_together():
    brown_out = 40
    last_try = brown_out + lease.BEAT + atomic_file.READ_TIMEOUT + lease.RETRY
    assert last_try < lease.GIVE_UP < 0.7 * lease.SHORTEST_LIFE
    assert lease.seconds_to_wait(120, 0) == 120
    assert lease.seconds_to_wait(120, 50) == 70
    assert lease.seconds_to_wait(120, 1e6) == lease.seconds_to_wait(120, 110) == 2 * lease.BEAT
    assert lease.seconds_to_wait(120, -1e6) == 120, "a store's clock that is ahead or behind"


def test_a_replaced_run_that_wakes_up_exits(workspace, holder):
    """An attempt that was paused (its machine, its network) for longer than its life."""
    first = holder(workspace.location, "elsewhere 1")
    first.send_signal(signal.SIGSTOP)
    with job("train", workspace) as owned:
        first.send_signal(signal.SIGCONT)
        _, said = first.communicate(timeout=120)
        assert first.returncode == lease.LOST
        assert "is now written by train" in said
        assert (owner(workspace).job, owner(workspace).epoch) == ("train", owned.epoch)


def test_a_run_that_slept_through_its_heartbeats_exits(workspace, holder):
    first = holder(workspace.location, give_up=0.5)
    first.send_signal(signal.SIGSTOP)
    time.sleep(1)
    first.send_signal(signal.SIGCONT)
    _, said = first.communicate(timeout=120)
    assert first.returncode == lease.LOST
    assert f"error: no heartbeat could be written to {workspace.location} for " in said


def test_a_run_that_cannot_write_its_heartbeat_says_why(workspace, holder):
    first = holder(workspace.location, give_up=1)
    Path(workspace.path(f".{lease.OWNER}.part")).mkdir()
    _, said = first.communicate(timeout=120)
    assert first.returncode == lease.LOST
    assert re.search(r"no heartbeat could be written to .* for 1 s: \[Errno", said)


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_run_whose_record_was_removed_or_overwritten_exits(workspace, holder, content):
    first = holder(workspace.location)
    record = Path(workspace.path(lease.OWNER))
    if content is None:
        record.unlink()
    else:
        record.write_text(content)
    _, said = first.communicate(timeout=120)
    assert first.returncode == lease.LOST
    assert "was removed from" in said or "the thread that writes heartbeats died" in said


def test_a_store_that_hangs_ends_the_run_in_time(bucket, holder):
    first = holder("s3://bucket/run", give_up=1.5)
    bucket.mode = "hang"
    began = time.monotonic()
    _, said = first.communicate(timeout=60)
    assert first.returncode == lease.LOST
    assert time.monotonic() - began < 3, "although a request takes 3 attempts of 1 s"
    assert "no heartbeat could be written to s3://bucket/run for " in said


def test_a_store_that_hangs_for_a_while_does_not_end_the_run(bucket, holder):
    """A tenth of the real times: silent for 4 s, and GIVE_UP is 8 s."""
    first = holder("s3://bucket/run", give_up=lease.GIVE_UP / 10)
    bucket.mode = "hang"
    time.sleep(4)
    bucket.resume()
    workspace = Workspace("s3://bucket/run")
    before = owner(workspace).beat
    deadline = time.monotonic() + 6
    while owner(workspace).beat < before + 3:
        assert time.monotonic() < deadline, "heartbeats are written again"
        time.sleep(0.1)
    _, said = first.communicate("end\n", timeout=60)
    assert (first.returncode, said) == (0, "")
    assert owner(workspace).released


def test_a_write_whose_answer_is_lost_is_recognised(bucket, holder):
    bucket.mode = "lose"
    first = holder("s3://bucket/run")
    workspace = Workspace("s3://bucket/run")
    assert owner(workspace).epoch == 1, "the first write"
    for _ in range(2):
        bucket.mode, before = "lose", owner(workspace).beat
        while first.poll() is None and owner(workspace).beat < before + 2:
            time.sleep(0.1)
    _, said = first.communicate("end\n", timeout=60)
    assert (first.returncode, said) == (0, "")
    assert owner(workspace).released


@pytest.mark.parametrize("mode", ["ignore", "refuse"])
def test_a_store_without_conditional_writes_holds_one_run_with_a_warning(bucket, capsys, mode):
    bucket.mode = mode
    workspace = Workspace("s3://bucket/run")
    with job("train", workspace) as owned:
        said = capsys.readouterr().err
        assert "warning: s3://bucket/run: the store has no conditional writes" in said
        assert {"ignore": "was ignored", "refuse": "NotImplemented"}[mode] in said
        assert owned.epoch == 1
        with pytest.raises(SystemExit), job("evaluate", workspace):
            raise AssertionError("let in")
    with job("train", workspace) as owned:
        assert owned.epoch == 2


def test_gcs_holds_one_run(holder, monkeypatch, capsys):
    shorten(monkeypatch)
    with serving(Gcs()) as server:
        workspace = Workspace(server.location("run"))
        first = holder(workspace.location, "elsewhere 1")
        with pytest.raises(SystemExit), job("train", workspace):
            raise AssertionError("let in")
        assert "is written by generate_pairs-x-1" in capsys.readouterr().err
        first.send_signal(signal.SIGSTOP)
        with job("train", workspace) as owned:
            assert owned.epoch == 2
            first.send_signal(signal.SIGCONT)
            first.communicate(timeout=60)
            assert first.returncode == lease.LOST
        assert owner(workspace).released


@pytest.fixture(params=["s3", "folder"])
def root(request, tmp_path, monkeypatch):
    """Where workspaces lie in turn."""
    if request.param == "folder":
        return str(tmp_path)
    server = request.getfixturevalue("bucket").upstream  # without the proxy
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    return "s3://bucket"


@pytest.mark.parametrize("earlier", ["none", "killed"])
def test_of_two_runs_that_start_together_one_becomes_the_owner(root, earlier, python):
    runs = [python(RACE), python(RACE)]
    for trial in range(TRIALS):
        workspace = Workspace(f"{root}/{trial}")
        if earlier == "killed":
            leave_behind(workspace)
        start = time.time() + (1.5 if trial == 0 else 0.02)
        for run in runs:
            run.stdin.write(f"{workspace.location} {start}\n")
            run.stdin.flush()
        ends = sorted(run.stdout.readline().strip() for run in runs)
        assert ends == [f"owner {1 if earlier == 'none' else 7}", "refused"], f"trial {trial}"


def test_a_users_mistake_ends_with_a_line_and_a_bug_with_a_traceback(workspace, capsys):
    with pytest.raises(SystemExit) as end, job("export_dataset", workspace):
        workspace.read_table("dataset")
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: no dataset/*.parquet in workspace ")
    with pytest.raises(ValueError, match="invalid literal"), job("export_dataset", workspace):
        json.loads("[1]", parse_int=lambda _: int("xyz"))
    assert owner(workspace).released


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


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"token": "cut'])
def test_damaged_record_does_not_block_the_workspace(tmp_path, capsys, content):
    (tmp_path / "owner.json").write_text(content)
    with lease.held(Workspace(tmp_path), "jobs.train"):
        assert '"job": "jobs.train"' in (tmp_path / "owner.json").read_text()
    assert "owner.json is damaged, so no run owns the workspace" in capsys.readouterr().out
