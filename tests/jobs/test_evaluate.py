"""Stage 5 on a real local Ray with tiny models: what it writes, that a killed run goes on, that a new model counts."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest
import yaml
from PIL import Image
from skimage import data

from ip2p.edit.names import SHIPPED, WORKSPACE
from ip2p.errors import UserError
from ip2p.evaluate.sweep import METRICS, SDEDITS, UNCHANGED
from ip2p.images import decode
from ip2p.recipe import ChosenImage, Judge, ModelRef, OtherEditor
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
    assert "the sweep is complete" in capsys.readouterr().out
    assert workspace.read_table("evaluation", "metrics.parquet").num_rows == edits.num_rows


def test_another_model_is_refused_and_evaluated_when_asked(recipe, workspace, tiny_editor, local_ray, capsys):
    only_baselines = recipe.model_copy(update={"truth": "none"})
    evaluate.run(only_baselines, workspace)
    shutil.copytree(tiny_editor, workspace.path("model"), dirs_exist_ok=True)
    workspace.mark_done("model", steps=3)
    capsys.readouterr()
    with pytest.raises(UserError, match=r"editors: .*shipped.* before, .*workspace.* now.*--overwrite"):
        evaluate.run(only_baselines, workspace)
    evaluate.run(only_baselines, workspace, overwrite=True)
    assert "overwrite: removing" in capsys.readouterr().out
    metrics, edits = (workspace.read_table("evaluation", name) for name in ("metrics.parquet", "edits"))
    assert sorted(metrics["edit_id"].to_pylist()) == sorted(edits["edit_id"].to_pylist())
    assert WORKSPACE in metrics["model"].to_pylist()


@pytest.mark.slow
def test_two_runs_give_equal_rows_and_any_number_of_editors_is_compared(
    recipe, workspace, tiny_editor, tmp_path, local_ray, capsys
):
    photo = tmp_path / "photo.png"
    Image.fromarray(data.coffee()[:90, :120]).save(photo)
    other = Workspace(tmp_path / "other")
    shutil.copytree(tiny_editor, other.path("model"))
    other.mark_done("model", steps=5)
    many = {
        "images": 3,
        "seeds": 2,
        "models": {
            "upstream": OtherEditor(path=str(tiny_editor)),
            "ten_percent": OtherEditor(workspace=other.location),
        },
        "chosen": ChosenImage(image=str(photo), instruction="make it night"),
    }
    recipe = recipe.model_copy(update={"truth": "none", "evaluate": recipe.evaluate.model_copy(update=many)})
    again = Workspace(tmp_path / "again")
    shutil.copytree(workspace.location, again.location)
    tables = []
    for run in (workspace, again):
        evaluate.run(recipe, run)
        tables.append(
            [run.read_table("evaluation", name).sort_by("edit_id") for name in ("metrics.parquet", "grid.parquet")]
        )
    metrics, grid = tables[0]
    for one, two in zip(*tables, strict=True):
        for name in one.column_names:
            if pa.types.is_float32(one[name].type):  # batches fall together differently: last bits
                np.testing.assert_allclose(one[name].to_numpy(), two[name].to_numpy(), rtol=0, atol=1e-5)
            else:
                assert one[name].equals(two[name]), name

    assert set(metrics["model"].to_pylist()) == {SHIPPED, "upstream", "ten_percent", UNCHANGED, *SDEDITS}
    rows = {
        (row["model"], row["caption_id"], row["guidance_scale"], row["image_guidance_scale"], row["seed"]): row
        for row in metrics.drop_columns("image").to_pylist()
    }
    for (model, *at), row in rows.items():  # the three are the same weights
        if model == "ten_percent":
            for name in ("clip_sim_image", "clip_sim_dir"):
                assert row[name] == pytest.approx(rows[SHIPPED, *at][name], abs=1e-5)
    captions = {row["caption_id"] for row in rows.values()}
    assert len({row["seed"] for row in rows.values() if row["model"] == SHIPPED}) == len(captions) * 2

    assert grid.num_rows == 2 * 2 and set(grid["model"].to_pylist()) == {SHIPPED}
    assert grid["clip_sim_dir"].null_count == grid.num_rows, "nobody knows captions of this image"
    assert all(decode(image).shape == (90, 120, 3) for image in grid["image"].to_pylist())
    with workspace.open_in("report.html") as file:
        text = file.read().decode()
    assert "“make it night”" in text and "ten_percent" in text


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"models": {"sdedit": OtherEditor(path="a/b")}}, r"evaluate\.models\.sdedit: the name is taken"),
        ({"models": {"x": OtherEditor(path="no/such/dir")}}, r"evaluate\.models\.x\.path.*no/such/dir"),
        ({"models": {"x": OtherEditor(workspace="/nowhere")}}, r"evaluate\.models\.x\.workspace: /nowhere has no"),
        ({"chosen": ChosenImage(image="/no.png", instruction="x")}, r"evaluate\.chosen\.image: '/no\.png' is no file"),
        ({"chosen": ChosenImage(image=__file__, instruction="x")}, r"evaluate\.chosen\.image: .*test_evaluate"),
        ({"judge": Judge(model=ModelRef(path="no/such/vlm"))}, r"evaluate\.judge\.model\.path.*no/such/vlm"),
    ],
)
def test_what_is_not_there_is_told_before_ray_starts(recipe, tmp_path, keys, told):
    wrong = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update=keys)})
    with pytest.raises(ValueError, match=told):
        evaluate.run(wrong, Workspace(tmp_path))


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
