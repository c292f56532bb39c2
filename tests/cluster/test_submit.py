"""`make submit` against a real cluster's Jobs server: a job is followed, never doubled, and begun again by attempts."""

import json
import re
import subprocess
import threading
import time
from pathlib import Path

import pytest
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType

from cluster import submit
from cluster.submit import Submission, decide, submission
from ip2p.recipe import REPOSITORY
from ip2p.workspace import Workspace
from runtime import lease

RECIPE = "recipes/miniature.yaml"
WANTED = Submission("train-x-00ff", "python -m jobs.train", "12")


def known(attempt: int, status: JobStatus, entrypoint: str = WANTED.entrypoint, recipe: str = WANTED.recipe):
    name = f"{WANTED.key}-{attempt}"
    return JobDetails(
        type=JobType.SUBMISSION, submission_id=name, status=status, entrypoint=entrypoint, metadata={"recipe": recipe}
    )


@pytest.mark.parametrize(
    ("jobs", "again", "attempt", "new"),
    [
        ([], False, 1, True),
        ([known(1, JobStatus.RUNNING)], False, 1, False),
        ([known(1, JobStatus.PENDING)], True, 1, False),
        ([known(1, JobStatus.SUCCEEDED)], False, 1, False),
        ([known(1, JobStatus.SUCCEEDED)], True, 2, True),
        ([known(1, JobStatus.SUCCEEDED, recipe="13")], False, 2, True),
        ([known(1, JobStatus.SUCCEEDED, entrypoint="python -m jobs.train --seed 1")], False, 2, True),
        ([known(1, JobStatus.FAILED), known(10, JobStatus.STOPPED), known(9, JobStatus.FAILED)], False, 11, True),
        ([known(1, JobStatus.FAILED), known(2, JobStatus.RUNNING)], False, 2, False),
    ],
)
def test_which_attempt(jobs, again, attempt, new):
    others = [
        JobDetails(type=JobType.DRIVER, submission_id=None, status=JobStatus.RUNNING, entrypoint=""),
        JobDetails(type=JobType.SUBMISSION, submission_id="train-x-1", status=JobStatus.RUNNING, entrypoint=""),
    ]
    assert decide(WANTED, [*others, *jobs], again) == (f"{WANTED.key}-{attempt}", new)


def test_a_running_job_with_other_flags_is_in_the_way():
    with pytest.raises(ValueError, match=r"train-x-00ff-3 runs .* `python -m jobs.train --seed 1`.*ray job stop train"):
        decide(WANTED, [known(3, JobStatus.RUNNING, "python -m jobs.train --seed 1")], False)


def test_the_same_place_is_the_same_submission():
    ids = {submission("train", Path(RECIPE), place, []).key for place in ("s3://b/run", "s3://b/run/")}
    assert len(ids) == 1
    assert ids != {submission("train", Path(RECIPE), "s3://b/run2", []).key}
    assert ids != {submission("evaluate", Path(RECIPE), "s3://b/run", []).key}
    entrypoint = submission("train", REPOSITORY / RECIPE, "s3://b/run", ["--captions.kinds", '["a b"]']).entrypoint
    assert entrypoint == f"""python -m jobs.train --recipe {RECIPE} --workspace s3://b/run --captions.kinds '["a b"]'"""


@pytest.mark.parametrize(
    ("job", "recipe", "workspace", "message"),
    [
        ("trian", RECIPE, "s3://b/run", "--job trian: there is no such job; there are .*train"),
        ("train", "recipes/nothing.yaml", "s3://b/run", "--recipe recipes/nothing.yaml: no such file"),
        ("train", "OUTSIDE", "s3://b/run", "lies outside"),
        ("train", RECIPE, "workspace", "means nothing on another machine"),
    ],
)
def test_what_could_not_run_is_refused(tmp_path, capsys, job, recipe, workspace, message):
    if recipe == "OUTSIDE":
        recipe = str(tmp_path / "recipe.yaml")
        Path(recipe).write_text((REPOSITORY / RECIPE).read_text())
    with pytest.raises(SystemExit) as end:
        submit.main(["--job", job, "--recipe", recipe, "--workspace", workspace, "--address", "http://127.0.0.1:1"])
    assert end.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_no_server_is_told(capsys):
    with pytest.raises(SystemExit) as end:
        submit.main(["--job", "train", "--recipe", RECIPE, "--workspace", "/w", "--address", "http://127.0.0.1:1"])
    assert end.value.code == 2
    assert "no Ray Jobs server" in capsys.readouterr().err


# --- on a cluster. The job is stage 3, which needs no model; while another machine may own its workspace, it waits.


def held_elsewhere(workspace: Workspace) -> None:
    owner = lease.Owner(
        token="x", epoch=1, job="train", submission=None, host="elsewhere 1", pid=1, process_started=0.0,
        cluster=None, since="yesterday", life=lease.SHORTEST_LIFE,
    )  # fmt: skip
    workspace.write(owner.format(), lease.OWNER)


def until(condition, what: str) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.3)


def call(address: str, workspace: Workspace, *flags: str) -> int:
    argv = ["--job", "export_dataset", "--recipe", RECIPE, "--workspace", workspace.location, "--address", address]
    with pytest.raises(SystemExit) as end:
        submit.main([*argv, *flags])
    return end.value.code  # pyright: ignore[reportReturnType]


@pytest.mark.timeout(600)
def test_a_job_is_followed_never_doubled_and_told_when_done(jobs_server, tmp_path, capsys):
    workspace = Workspace(tmp_path / "run")
    workspace.mark_done("dataset", train=3, validation=2, test=1)
    held_elsewhere(workspace)
    client = JobSubmissionClient(jobs_server)
    make = [
        "make", "submit", "JOB=export_dataset", f"RECIPE={RECIPE}", f"WORKSPACE={workspace.location}",
        f"ARGS=--address {jobs_server}",
    ]  # fmt: skip
    first = subprocess.Popen(make, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    name = submission("export_dataset", Path(RECIPE), workspace.location, []).key + "-1"
    until(lambda: client.list_jobs() and "sign of life" in client.get_job_logs(name), "the job waits")
    assert call(jobs_server, workspace, "--seed", "1") == 2
    assert f"{name} runs in this workspace" in capsys.readouterr().err
    letting_go = threading.Timer(2, lambda: workspace.fs.delete_file(workspace.path(lease.OWNER)))
    letting_go.start()
    assert call(jobs_server, workspace) == 0
    second = capsys.readouterr()
    assert f"{name} runs already" in second.err
    out, err = first.communicate(timeout=240)
    assert first.returncode == 0, err
    assert f"{name} is submitted" in err
    for log in (out, second.out):
        assert log.count("sign of life") == 1 and log.count("dataset is complete") == 1, "each line once"
    assert '"released": true' in workspace.open_in(lease.OWNER).read().decode()
    assert call(jobs_server, workspace) == 0
    assert f"{name} is done already" in capsys.readouterr().err
    assert len(client.list_jobs()) == 1
    environment = client.get_job_info(name).runtime_env or {}
    assert environment["working_dir"].startswith("gcs://") and not {"pip", "uv", "conda"} & set(environment)


@pytest.mark.timeout(600)
def test_exit_status_and_attempts(jobs_server, tmp_path, capsys):
    workspace = Workspace(tmp_path / "run")
    for attempt in (1, 2):
        assert call(jobs_server, workspace) == 2, "a user's mistake, and its status is the job's"
        said = capsys.readouterr()
        assert "run jobs.generate_pairs first" in said.out and "Traceback" not in said.out
        assert f"-{attempt} is submitted" in said.err
    held_elsewhere(workspace)
    client = JobSubmissionClient(jobs_server)
    name = submission("export_dataset", Path(RECIPE), workspace.location, []).key + "-3"

    def stop() -> None:
        until(lambda: name in json.dumps([j.submission_id for j in client.list_jobs()]), "the third attempt")
        until(lambda: "sign of life" in client.get_job_logs(name), "the job waits")
        client.stop_job(name)

    threading.Thread(target=stop).start()
    assert call(jobs_server, workspace) == 1
    assert f"{name}: STOPPED" in capsys.readouterr().err
