"""`make demo`: the order of the stages, what is printed at the end, and the whole of it at its smallest."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from ip2p.recipe import REPOSITORY
from ip2p.report.page import write_report
from ip2p.report.summary import summarize
from ip2p.workspace import Workspace
from jobs import reproduce
from tests.evaluate.synthetic import make_recipe, make_workspace

WEIGHTS = REPOSITORY / "ip2p" / "miniature" / "weights"


def printed(tables) -> str:
    console = Console(file=io.StringIO(), width=120)
    for table in tables:
        console.print(table)
    return console.file.getvalue()


def test_stages_are_in_the_order_of_the_data():
    names = [stage.__name__ for stage in reproduce.STAGES]
    assert names == [
        f"jobs.{name}" for name in ("edit_captions", "generate_pairs", "export_dataset", "train", "evaluate")
    ]


def test_the_results_are_those_of_the_report(tmp_path):
    recipe = make_recipe(evaluate={"images": 12, "guidance_scale": [1, 4], "fixed_guidance_scale": 4})
    workspace = make_workspace(tmp_path, recipe)
    assert write_report(recipe, workspace) == summarize(recipe, workspace)
    text = printed(reproduce.results(summarize(recipe, workspace)))
    for expected in ("shared, filtered", "the shipped editor", "input unchanged", "monotone within error", "pairs"):
        assert expected in text
    assert printed(reproduce.results(summarize(recipe, Workspace(tmp_path / "empty")))) == ""


def test_a_missing_model_is_told_before_anything_starts(tmp_path, capsys):
    recipe = REPOSITORY / "recipes" / "miniature.yaml"
    flags = ["--recipe", str(recipe), "--workspace", str(tmp_path / "w"), "--models.llm.path", "no/such/model/here"]
    with pytest.raises(SystemExit) as stopped:
        reproduce.main(flags)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "models.llm.path" in error
    assert "no/such/model/here" in error
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_whole_paper_at_its_smallest(tmp_path, capsys):
    missing = [name for name in ("text_to_image", "clip", "language_model") if not (WEIGHTS / name).is_dir()]
    if missing:
        pytest.skip(f"no weights of {', '.join(missing)} in the checkout")
    workspace = Workspace(tmp_path / "run")
    flags = ["--recipe", str(REPOSITORY / "recipes" / "miniature.yaml"), "--workspace", workspace.location]
    smallest = {
        "captions.count": 24, "pairs.candidates": 3, "pairs.steps": 8, "dataset.validation_fraction": 0.3,
        "train.steps": 4, "train.checkpoint_every": 2, "sampling.steps": 4, "evaluate.images": 12,
        "evaluate.grid_images": 1, "evaluate.pair_captions": 4, "evaluate.pair_candidates": 2,
        "evaluate.shipped": "true" if (WEIGHTS / "editor").is_dir() else "false",
    }  # fmt: skip
    flags += [part for key, value in smallest.items() for part in (f"--{key}", str(value))]
    reproduce.main(flags)
    stages = ("instructions", "pairs", "dataset", "model", "evaluation")
    assert all(workspace.done(stage) for stage in stages)
    assert Path(workspace.path("report.html")).stat().st_size > 100_000
    assert "report.html" in capsys.readouterr().out
    before = {path: Path(path).stat().st_mtime for path in workspace.files("pairs") + workspace.files("evaluation")}
    reproduce.main(flags)
    assert {path: Path(path).stat().st_mtime for path in before} == before, "what is done is not done again"
