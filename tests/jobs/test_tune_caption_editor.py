"""Tuning the language model on a real local Ray, and asking what came out with a real vLLM engine."""

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from ip2p.miniature.models import language_model
from ip2p.miniature.triplets import edit_kind
from ip2p.recipe import REPOSITORY, GrammarCaptions, ModelRef, Recipe
from ip2p.workspace import Workspace
from jobs import edit_captions, tune_caption_editor
from tests.captions.test_answers import make_recipe
from tests.captions.test_tune import qwen  # noqa: F401, a fixture

SHIPPED = Path(language_model.__file__).parents[1] / "weights" / "language_model"


def with_llm(recipe: Recipe, llm: str | Path, **sections) -> Recipe:
    models = recipe.models.model_copy(update={"llm": ModelRef(path=str(llm))})
    return recipe.model_copy(update={"models": models, **sections})


def test_triplets_come_from_a_file_the_grammar_or_us(tmp_path):
    drawn = make_recipe()
    few = drawn.model_copy(update={"captions": GrammarCaptions(kinds=["recolour"])})
    for recipe, kinds in ((drawn, 12), (few, 1)):
        triplets = tune_caption_editor.read(recipe)
        assert len(triplets) == recipe.tune.count
        assert len({edit_kind(one.caption, one.instruction) for one in triplets}) == kinds
    assert len(tune_caption_editor.read(make_recipe(truth="none"))) >= 150
    file = tmp_path / "upstream.jsonl"
    file.write_text('{"input": "a dog", "edit": "make it a cat", "output": "a cat"}\n')
    named = drawn.model_copy(update={"tune": drawn.tune.model_copy(update={"triplets": str(file)})})
    assert [one.instruction for one in tune_caption_editor.read(named)] == ["make it a cat"]


@pytest.mark.slow
def test_lora_on_qwen_is_written_once_and_goes_through_vllm(tmp_path, local_ray, qwen, capsys):  # noqa: F811
    recipe = with_llm(make_recipe(truth="none", max_tokens=48, max_model_len=256), qwen)
    recipe = recipe.model_copy(update={"tune": recipe.tune.model_copy(update={"epochs": 2, "lora_rank": 4})})
    workspace = Workspace(tmp_path / "run")
    tune_caption_editor.run(recipe, workspace)
    counts = workspace.counts("language_model")
    assert counts["triplets"] + counts["held_out"] == 189
    assert "epoch 2/2" in capsys.readouterr().out
    tune_caption_editor.run(recipe, workspace)
    assert "language_model is complete" in capsys.readouterr().out

    tuned = with_llm(recipe, workspace.path("language_model"), captions=GrammarCaptions(count=8))
    edit_captions.run(tuned, workspace)
    rows = workspace.read_table("instructions").to_pylist()
    assert len(rows) == 8
    # It has learnt next to nothing, but it was loaded and asked, and answered in the grammar until it was cut.
    assert {row["status"] for row in rows} <= {"ok", "rejected"}
    assert all(row["attempts"] == 1 for row in rows)


def start_job(workspace: Workspace, llm: Path) -> subprocess.Popen[str]:
    flags = (
        f"--recipe recipes/miniature.yaml --workspace {workspace.location} --truth none --instructions.max_tokens 48"
    )
    more = f"--models.llm.path {llm} --tune.epochs 4 --tune.lora_rank 4"
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "jobs.tune_caption_editor", *flags.split(), *more.split()],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_a_killed_tuning_goes_on_with_its_last_epoch(tmp_path, qwen):  # noqa: F811
    workspace = Workspace(tmp_path / "run")
    job = start_job(workspace, qwen)
    assert job.stdout is not None
    assert any("epoch 2/4" in line for line in job.stdout), "it ended before"
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert not workspace.done("language_model")

    job = start_job(workspace, qwen)
    printed, _ = job.communicate(timeout=300)
    assert job.returncode == 0
    assert "epoch 1/4" not in printed and "epoch 4/4" in printed
    assert workspace.done("language_model")


@pytest.mark.slow
def test_the_miniature_takes_on_what_a_few_triplets_teach(tmp_path, local_ray):
    """480 triplets of one kind of edit, all weights: before, one answer in twenty is of that kind."""
    recipe = make_recipe(same_meaning=0.98, max_tokens=96, max_model_len=256, temperature=0.7, top_p=0.9)
    recipe = with_llm(recipe, SHIPPED)
    tune = recipe.tune.model_copy(update={"count": 480, "lora_rank": None, "learning_rate": 1e-3})
    only = GrammarCaptions(kinds=["recolour"])
    workspace = Workspace(tmp_path / "tuned")
    tune_caption_editor.run(recipe.model_copy(update={"tune": tune, "captions": only}), workspace)

    tuned = with_llm(recipe, workspace.path("language_model"), captions=GrammarCaptions(count=96))
    edit_captions.run(tuned, workspace)
    rows = [row for row in workspace.read_table("instructions").to_pylist() if row["status"] == "ok"]
    kinds = Counter(row["edit_type"] for row in rows)
    assert len(rows) >= 60
    assert kinds["recolour"] / len(rows) > 0.5, kinds
