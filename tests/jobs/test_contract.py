"""What all jobs have in common: one owner of a workspace, the same flags, users' mistakes in one line."""

import importlib

import pytest

from ip2p.recipe import REPOSITORY
from ip2p.stage import PLANS
from ip2p.workspace import Workspace
from runtime.job import job

RECIPE = ["--recipe", str(REPOSITORY / "recipes" / "miniature.yaml")]
STAGES = sorted({plan.job for plan in PLANS.values()})
OWNERS = [*STAGES, "jobs.reproduce", "jobs.publish", "jobs.calibrate", "jobs.report"]
MORE_FLAGS = {"jobs.evaluate_benchmark": ["--benchmark", "somewhere"]}


def run(name: str, *flags: str) -> None:
    importlib.import_module(name).main([*RECIPE, *flags, *MORE_FLAGS.get(name, [])])


@pytest.mark.parametrize("name", OWNERS)
def test_a_second_job_in_a_workspace_is_refused(name, tmp_path, capsys):
    with job("train", Workspace(tmp_path)):
        with pytest.raises(SystemExit) as end:
            run(name, "--workspace", str(tmp_path))
        assert end.value.code == 2
        assert f"{tmp_path} is written by train" in capsys.readouterr().err


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_can_be_started_over(name, capsys):
    with pytest.raises(SystemExit) as end:
        run(name, "--help")
    assert end.value.code == 0
    assert "--overwrite" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jobs.generate_pairs", "instructions is not complete: run jobs.edit_captions first"),
        ("jobs.export_dataset", "pairs is not complete: run jobs.generate_pairs first"),
        ("jobs.train", "no pairs to train on in"),
        ("jobs.judge_edits", "evaluate.judge is null"),
        ("jobs.evaluate_benchmark", "somewhere"),
        ("jobs.ablate", "pairs is not complete: run jobs.generate_pairs first"),
        ("jobs.calibrate", "run jobs.evaluate first"),
        ("jobs.publish", "--model_repo, --dataset_repo"),
    ],
)
def test_a_users_mistake_ends_with_status_2_and_one_line(name, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run(name, "--workspace", str(tmp_path))
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and "Traceback" not in said
