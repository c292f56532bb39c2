"""The ablations on a few real pairs of the miniature world."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ip2p.cli import read_recipe
from ip2p.miniature.triplets import draw_triplet
from ip2p.records import INSTRUCTIONS, caption_id
from ip2p.workspace import Workspace
from jobs import ablate, generate_pairs


def small():
    recipe = read_recipe("recipes/miniature.yaml")
    pairs = recipe.pairs.model_copy(update={"candidates": 4, "steps": 8, "replicas": 1})
    train = recipe.train.model_copy(
        update={"steps": 2, "batch_size": 4, "warmup_steps": 0, "cooldown_steps": 0, "workers": 1, "pictures": 0}
    )
    sampling = recipe.sampling.model_copy(update={"steps": 2})
    evaluate = recipe.evaluate.model_copy(
        update={"images": 4, "guidance_scale": [1.0, 4.0], "image_guidance_scale": [2.0], "replicas": 1}
    )
    return recipe.model_copy(update={"pairs": pairs, "train": train, "sampling": sampling, "evaluate": evaluate})


def write_instructions(workspace: Workspace, count: int) -> None:
    """As jobs.edit_captions leaves them, all of them right."""
    rng, rows = random.Random("ablate"), {}
    while len(rows) < count:
        drawn = draw_triplet(rng, "background")
        key = caption_id(drawn.caption)
        rows[key] = (key, drawn.caption, drawn.instruction, drawn.edited_caption, "ok", "", "background", 1)
    table = [dict(zip(INSTRUCTIONS.names, row, strict=True)) for row in rows.values()]
    with workspace.open_out("instructions", "part-0.parquet") as file:
        pq.write_table(pa.Table.from_pylist(table, schema=INSTRUCTIONS), file)
    workspace.mark_done("instructions", captions=count, ok=count)


def test_without_truth_or_pairs_there_is_nothing_to_ablate(tmp_path):
    with pytest.raises(ValueError, match="truth: none"):
        ablate.run(small().model_copy(update={"truth": "none"}), Workspace(tmp_path))
    with pytest.raises(ValueError, match=r"run jobs\.generate_pairs first"):
        ablate.run(small(), Workspace(tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_each_kind_of_data_trains_editors_that_are_compared(tmp_path, local_ray, capsys):
    recipe, workspace = small(), Workspace(tmp_path / "run")
    write_instructions(workspace, 48)
    generate_pairs.run(recipe, workspace)
    found = {result.name: result for result in ablate.run(recipe, workspace, seeds=2)}
    assert list(found) == ["all data", "no filter", "10% of the data", "1% of the data"]
    pairs = {name: result.pairs.mean for name, result in found.items()}
    assert pairs["all data"] > pairs["10% of the data"] >= pairs["1% of the data"] >= 1
    assert pairs["no filter"] == pytest.approx(pairs["all data"], rel=0.3), "filtered or not, as much data"
    assert found["no filter"].right_pairs < found["all data"].right_pairs
    assert all(result.success.count == 2 for result in found.values())
    assert workspace.exists("ablations", "report.html")
    with workspace.open_in("ablations", "results.json") as file:
        assert [result["name"] for result in json.loads(file.read())] == list(found)
    capsys.readouterr()
    assert {result.name: result for result in ablate.run(recipe, workspace, seeds=2)} == found
    assert "model is complete" in capsys.readouterr().out, "what is done is not done again"
