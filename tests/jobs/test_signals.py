"""SIGTERM and SIGINT of a running job: an exit status, one line, and no row lost."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ip2p.recipe import REPOSITORY, Recipe, Sharing
from ip2p.workspace import Workspace
from runtime.exit import INTERRUPTED, TERMINATED
from tests.jobs.test_generate_pairs import check_complete, files, wait_for_files, write_instructions

CAPTIONS = 60


@pytest.fixture
def recipe(smallest) -> Recipe:
    fewer = {"candidates": 2, "max_pairs": 1, "steps": 1, "rows_per_block": 1, "sharing": Sharing()}
    return smallest.model_copy(update={"pairs": smallest.pairs.model_copy(update=fewer)})


def start_job(recipe: Recipe, workspace: Workspace) -> subprocess.Popen[str]:
    file = Path(workspace.location, "recipe.yaml")
    file.write_text(recipe.model_dump_json())
    command = [sys.executable, "-m", "jobs.generate_pairs", "--recipe", str(file)]
    return subprocess.Popen(
        [*command, "--workspace", workspace.location], cwd=REPOSITORY, env=os.environ,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
def test_signals_end_a_job_in_one_line_and_the_same_command_completes_it(recipe, tmp_path):
    workspace = Workspace(tmp_path / "run")
    write_instructions(workspace, CAPTIONS)
    committed = 0
    for send, number, status, line in (
        # kubectl, systemd and timeout signal a process, a terminal signals its group.
        (os.kill, signal.SIGTERM, TERMINATED, "terminated; run the same command to resume"),
        (os.killpg, signal.SIGINT, INTERRUPTED, "interrupted; run the same command to resume"),
    ):
        job = start_job(recipe, workspace)
        wait_for_files(job, workspace, committed + 3)
        send(job.pid, number)
        _, errors = job.communicate(timeout=120)
        assert (job.returncode, errors.splitlines()[-1]) == (status, line), errors
        for noise in ("Aborted", "Traceback", "*** SIG", "@     0x"):
            assert noise not in errors, errors
        committed = len(files(workspace))
        assert committed < CAPTIONS, "the signal came too late to matter"

    job = start_job(recipe, workspace)
    _, errors = job.communicate(timeout=240)
    assert job.returncode == 0, errors
    check_complete(workspace, recipe, CAPTIONS)
