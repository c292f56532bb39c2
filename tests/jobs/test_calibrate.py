import pytest
import yaml

from ip2p.recipe import Pairs
from ip2p.report.summary import summarize
from ip2p.workspace import Workspace
from jobs import calibrate
from tests.evaluate.synthetic import make_recipe, make_workspace


def test_the_job_reads_an_evaluated_workspace(tmp_path, capsys):
    recipe = make_recipe()
    with pytest.raises(ValueError, match=r"run jobs\.evaluate first"):
        calibrate.run(recipe, Workspace(tmp_path / "empty"), 0.5)
    workspace = make_workspace(tmp_path / "run", recipe)
    found = calibrate.run(recipe, workspace, 0.5)
    said = capsys.readouterr().out
    lines = {name: yaml.safe_load(said.partition(f"{name}: ")[2].splitlines()[0]) for name in ("thresholds", "quality")}
    pairs = Pairs(thresholds=lines["thresholds"], quality=lines["quality"])  # as they would stand in a recipe
    assert (pairs.thresholds, pairs.quality) == (found.thresholds, found.quality)
    truth = summarize(recipe, workspace).pair_truth
    assert truth is not None
    assert found.unfiltered.precision.mean == pytest.approx(truth.rates["shared attention"].mean)
    with pytest.raises(ValueError, match="truth: none"):
        calibrate.run(recipe.model_copy(update={"truth": "none"}), workspace, 0.5)
