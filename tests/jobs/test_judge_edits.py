"""The judge on a real vLLM engine: a tiny random vision-language model marks every edit of a sweep."""

import pytest

from ip2p.evaluate.judge import JUDGED, MARKS
from ip2p.recipe import Judge, ModelRef
from ip2p.workspace import Workspace
from jobs import judge_edits
from tests import tiny
from tests.evaluate.synthetic import make_recipe, make_workspace, write

pytestmark = pytest.mark.timeout(1500)
SWEEP = {"images": 3, "grid_images": 1, "guidance_scale": [1], "image_guidance_scale": [1], "sdedit_strengths": [0.5]}


def with_judge(recipe, **judge):
    return recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"judge": Judge(**judge)})})


def test_without_judge_or_sweep_the_way_out_is_named(tmp_path):
    recipe = make_recipe(evaluate=SWEEP)
    with pytest.raises(ValueError, match=r"evaluate\.judge is null"):
        judge_edits.run(recipe, Workspace(tmp_path))
    with pytest.raises(ValueError, match=r"run jobs\.evaluate first"):
        judge_edits.run(with_judge(recipe, model=ModelRef(path="a/b")), Workspace(tmp_path))


@pytest.mark.slow
def test_every_edit_has_marks_or_a_reason_and_a_rerun_asks_for_the_rest_only(tmp_path, local_ray, capsys):
    model = ModelRef(path=str(tiny.make_vlm(tmp_path / "vlm")))
    recipe = make_recipe(device="cpu", evaluate=SWEEP)
    workspace = make_workspace(tmp_path / "run", recipe, captions=4)
    workspace.mark_done("evaluation", plan="of a test")
    metrics = workspace.read_table("evaluation", "metrics.parquet")
    # An instruction that leaves no room in the model: the engine refuses it.
    rows = metrics.to_pylist()
    rows[1]["instruction"] = "make it night " * 400
    write(workspace, metrics.from_pylist(rows, schema=metrics.schema), "evaluation", "metrics.parquet", "0.parquet")

    sizes = {"model": model, "max_tokens": 700, "max_model_len": 3072, "batch_size": 4}
    judge_edits.run(with_judge(recipe, **sizes), workspace)
    judged = workspace.read_table("evaluation", "judged.parquet")
    assert judged.schema.names == JUDGED.names
    found = {row["edit_id"]: row for row in judged.to_pylist()}
    assert len(found) == judged.num_rows == metrics.num_rows, "one row for each edit"
    for row in rows:
        for name in metrics.column_names:
            assert name == "image" or found[row["edit_id"]][name] == row[name]
    refused = found.pop(rows[1]["edit_id"])
    assert refused["judge_status"] == "failed" and refused["judge_error"] and refused["judge_quality"] is None
    assert {row["judge_status"] for row in found.values()} == {"ok"}, {row["judge_error"] for row in found.values()}
    assert all(1 <= row[f"judge_{name}"] <= 5 for row in found.values() for name in MARKS)
    assert workspace.counts("evaluation/judge")["failed"] == 1

    # As if it had been killed before it ended.
    workspace.fs.delete_file(workspace.path("evaluation", "judge", "_SUCCESS"))
    capsys.readouterr()
    judge_edits.run(with_judge(recipe, **sizes), workspace)
    assert workspace.read_table("evaluation", "judged.parquet").equals(judged)
    judge_edits.run(with_judge(recipe, **sizes), workspace)
    assert "all edits are judged" in capsys.readouterr().out
