"""Stage 5 on a real local Ray with tiny models: what it writes, that a killed run goes on, that a new model counts."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from ip2p.evaluate.sweep import METRICS, SDEDITS, SHIPPED, UNCHANGED, WORKSPACE
from ip2p.workspace import Workspace
from jobs import evaluate
from tests.evaluate.synthetic import make_recipe, make_workspace

pytestmark = pytest.mark.timeout(900)  # Ray takes its time on a machine that does other things as well


@pytest.fixture(scope="module")
def recipe(tiny_sd, tiny_editor, tiny_clip):
    return make_recipe(
        device="cpu",
        models={
            "text_to_image": {"path": str(tiny_sd)},
            "clip": {"name": f"local-dir:{tiny_clip}"},
            "llm": {"path": str(tiny_sd)},
            "editor": {"path": str(tiny_editor)},
        },
        pairs={"height": 32, "width": 32, "steps": 2, "solver": "ddim"},
        sampling={"steps": 2, "max_side": 64},
        evaluate={
            "images": 6,
            "grid_images": 1,
            "guidance_scale": [1, 3],
            "image_guidance_scale": [1, 2],
            "fixed_guidance_scale": 3,
            "sdedit_strengths": [0.5],
            "pair_captions": 3,
            "pair_candidates": 2,
            "batch_size": 4,
        },
    )


@pytest.fixture
def workspace(recipe, tmp_path):
    """As `make_workspace` leaves it, but not yet evaluated."""
    workspace = make_workspace(tmp_path / "run", recipe, captions=10)
    workspace.fs.delete_dir(workspace.path("evaluation"))
    return workspace


def test_every_edit_is_scored_once_and_the_report_is_written(recipe, workspace, local_ray, capsys):
    summary = evaluate.run(recipe, workspace)
    metrics, edits = (workspace.read_table("evaluation", name) for name in ("metrics.parquet", "edits"))
    assert sorted(metrics["edit_id"].to_pylist()) == sorted(edits["edit_id"].to_pylist())
    assert metrics.schema.names == METRICS.names
    assert set(metrics["model"].to_pylist()) == {SHIPPED, UNCHANGED, *SDEDITS}, "there is no model of this run"
    assert workspace.read_table("evaluation", "pair_truth.parquet").num_rows == 3
    assert summary.pair_truth is not None
    assert workspace.counts("evaluation")["edits"] == edits.num_rows
    with workspace.open_in("report.html") as file:
        assert b"Editors compared" in file.read()

    capsys.readouterr()
    evaluate.run(recipe, workspace)
    assert "done already" in capsys.readouterr().out
    assert workspace.read_table("evaluation", "metrics.parquet").num_rows == edits.num_rows


def test_another_model_is_evaluated_anew(recipe, workspace, tiny_editor, local_ray, capsys):
    only_baselines = recipe.model_copy(update={"truth": "none"})
    evaluate.run(only_baselines, workspace)
    shutil.copytree(tiny_editor, workspace.path("model"), dirs_exist_ok=True)
    workspace.mark_done("model", steps=3)
    capsys.readouterr()
    evaluate.run(only_baselines, workspace)
    assert "evaluating anew" in capsys.readouterr().out
    metrics, edits = (workspace.read_table("evaluation", name) for name in ("metrics.parquet", "edits"))
    assert sorted(metrics["edit_id"].to_pylist()) == sorted(edits["edit_id"].to_pylist())
    assert WORKSPACE in metrics["model"].to_pylist()


def test_nothing_to_evaluate_names_the_way_out(recipe, tmp_path):
    without = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"shipped": False})})
    with pytest.raises(ValueError, match=r"run jobs\.train"):
        evaluate.run(without, Workspace(tmp_path))


def test_a_missing_shipped_editor_is_told_before_ray_starts(recipe, tmp_path):
    models = recipe.models.model_copy(
        update={"editor": recipe.models.editor.model_copy(update={"path": "no/such/dir"})}
    )
    with pytest.raises(ValueError, match=r"models\.editor\.path.*no/such/dir"):
        evaluate.run(recipe.model_copy(update={"models": models}), Workspace(tmp_path))


@pytest.mark.slow
def test_a_killed_run_goes_on_without_losing_or_doubling_an_edit(recipe, workspace, tmp_path):
    many = recipe.model_copy(
        update={
            "truth": "none",
            "evaluate": recipe.evaluate.model_copy(update={"images": 20}),
            "sampling": recipe.sampling.model_copy(update={"steps": 20}),
        }
    )
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(yaml.safe_dump(many.model_dump(mode="json")))
    command = [sys.executable, "-m", "jobs.evaluate", "--recipe", recipe_file, "--workspace", workspace.location]

    def written() -> int:
        return len([path for path in workspace.files("evaluation", "metrics.parquet") if path.endswith(".parquet")])

    process = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 400
    while written() < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(5)  # Ray's own processes notice that their driver is gone
    assert not workspace.done("evaluation"), "it was killed in the middle"
    first = set(workspace.files("evaluation", "metrics.parquet"))
    assert len(first) >= 3

    subprocess.run(command, check=True, timeout=600)
    metrics, edits = (workspace.read_table("evaluation", name) for name in ("metrics.parquet", "edits"))
    assert sorted(metrics["edit_id"].to_pylist()) == sorted(edits["edit_id"].to_pylist())
    committed = len(first & set(workspace.files("evaluation", "metrics.parquet")))
    assert committed >= len(first) - 2, "what was written before the kill was not made again"
