import pytest

from ip2p.evaluate.summary import summarize
from ip2p.workspace import Workspace
from jobs import calibrate
from tests.evaluate.synthetic import make_recipe, make_workspace


def test_the_job_reads_an_evaluated_workspace(tmp_path, capsys):
    recipe = make_recipe()
    with pytest.raises(ValueError, match=r"run jobs\.evaluate first"):
        calibrate.run(recipe, Workspace(tmp_path / "empty"), 0.5)
    workspace = make_workspace(tmp_path / "run", recipe)
    found = calibrate.run(recipe, workspace, 0.5)
    assert "thresholds: {image: " in capsys.readouterr().out
    truth = summarize(recipe, workspace).pair_truth
    assert truth is not None
    assert found.unfiltered.precision.mean == pytest.approx(truth.rates["shared attention"].mean)
    with pytest.raises(ValueError, match="truth: none"):
        calibrate.run(recipe.model_copy(update={"truth": "none"}), workspace, 0.5)
