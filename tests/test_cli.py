import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, Field

from ip2p.cli import load_settings
from ip2p.recipe import FileCaptions, GrammarCaptions, HubCaptions
from tests.test_recipe import MINIMAL


class Edit(BaseModel):
    """What the test's job takes besides a recipe."""

    instruction: str = Field(description="what to change")
    copies: int = Field(default=2, description="how many")


@pytest.fixture
def recipe(tmp_path) -> str:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.dump({**MINIMAL, "captions": {"kind": "grammar", "count": 7}, "pairs": {"steps": 5}}))
    return str(file)


def refused(capsys, *argv: str, **options) -> list[str]:
    """The problems that a command line is refused for."""
    with pytest.raises(SystemExit) as exit_:
        load_settings("A job.", argv=list(argv), **options)
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert captured.out == ""
    assert "Traceback" not in captured.err
    *problems, hint = captured.err.splitlines()
    assert hint == "--help shows every key with its default."
    assert all(problem.startswith("error: ") for problem in problems)
    return [problem.removeprefix("error: ") for problem in problems]


def test_flags_win_over_the_file_and_the_file_over_the_defaults(recipe, tmp_path):
    found, workspace, extra = load_settings(
        "A job.", argv=["--recipe", recipe, "--workspace", str(tmp_path / "run"), "--pairs.candidates", "8", "--seed=3"]
    )
    assert (found.pairs.candidates, found.pairs.steps, found.pairs.max_pairs, found.seed) == (8, 5, 4, 3)
    assert workspace is not None
    assert workspace.path("pairs") == f"{tmp_path}/run/pairs"
    assert extra is None


@pytest.mark.parametrize(
    ("flags", "get", "expected"),
    [
        (["--pairs.guidance_scale", "2,4"], lambda r: r.pairs.guidance_scale, (2, 4)),
        (["--pairs.guidance_scale", "[2, 4]"], lambda r: r.pairs.guidance_scale, (2, 4)),
        (["--evaluate.guidance_scale", "1,2.5"], lambda r: r.evaluate.guidance_scale, [1, 2.5]),
        (["--captions.kinds", "move,swap"], lambda r: r.captions.kinds, ["move", "swap"]),
        (["--pairs.thresholds.image", "0.5"], lambda r: r.pairs.thresholds.image, 0.5),
        (["--train.flip", "false"], lambda r: r.train.flip, False),
        (["--train.learning_rate", "1e-3"], lambda r: r.train.learning_rate, 0.001),
        (["--models.vae.path", "a/vae"], lambda r: r.models.vae.path, "a/vae"),
        (["--models.llm.revision", "null"], lambda r: r.models.llm.revision, None),
        (
            ["--instructions.engine", "gpu_memory_utilization=0.5", "--instructions.engine", "enforce_eager=true"],
            lambda r: r.instructions.engine,
            {"gpu_memory_utilization": 0.5, "enforce_eager": True},
        ),
    ],
)
def test_dotted_flags_of_every_shape(recipe, flags, get, expected):
    found, _, _ = load_settings("A job.", argv=["--recipe", recipe, *flags], needs=())
    assert get(found) == expected


def test_another_kind_of_captions_replaces_the_files(recipe):
    for kind, made in (("files", FileCaptions), ("hub", HubCaptions)):
        flags = ["--captions.kind", kind, "--captions.path", "a/captions", "--captions.near_duplicates", "1"]
        found, _, _ = load_settings("A job.", argv=["--recipe", recipe, *flags], needs=())
        assert found.captions == made(kind=kind, path="a/captions", near_duplicates=1)
    found, _, _ = load_settings("A job.", argv=["--recipe", recipe, "--captions.kind", "grammar"], needs=())
    assert found.captions == GrammarCaptions(count=7)


def test_the_environment_sets_nothing(recipe, monkeypatch):
    monkeypatch.setenv("SEED", "5")
    monkeypatch.setenv("WORKSPACE", "/elsewhere")
    monkeypatch.setenv("PAIRS", '{"steps": 99}')
    found, workspace, _ = load_settings("A job.", argv=["--recipe", recipe], needs=())
    assert (found.seed, found.pairs.steps, workspace) == (0, 5, None)


def test_a_job_can_have_flags_of_its_own(recipe, capsys):
    _, _, extra = load_settings("A job.", Edit, ["--recipe", recipe, "--instruction", "make it blue, please"], needs=())
    assert extra == Edit(instruction="make it blue, please", copies=2)
    assert refused(capsys, "--recipe", recipe, extra=Edit, needs=()) == ["instruction: missing"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pairs.candidatez", "8"], "--pairs.candidatez: there is no such flag; did you mean --pairs.candidates?"),
        (["--pair.candidates", "8"], "--pair.candidates: there is no such flag; did you mean --pairs.candidates?"),
        (["--candidates=8"], "--candidates: there is no such flag; did you mean --pairs.candidates?"),
        (["--train.xyzzy", "8"], "--train.xyzzy: there is no such flag; there are --train.base, --train.dataset"),
        (["--pairs.candidates", "many"], "pairs.candidates: Input should be a valid integer"),
        (["--captions.count", "-1"], 'captions.count: Input should be greater than 0, not "-1"'),
        (["--pairs.solver", "eule"], "pairs.solver: Input should be 'euler_ancestral', 'euler', 'ddim'"),
        (["--pairs.height", "33"], "pairs.height: image sides are multiples of 8, not 33: e.g. 32"),
        (["--train.drop_text", "1"], "train: drop_text + drop_image + drop_both must be <= 1, not 1.1"),
        (["--workspace", "ftp://x"], "workspace 'ftp://x': "),
        (["--pairs.candidates"], "argument --pairs.candidates: expected one argument"),
    ],
)
def test_wrong_flags_are_told_in_one_line(recipe, capsys, flags, message):
    (problem,) = refused(capsys, "--recipe", recipe, *flags, needs=())
    assert problem.startswith(message)


def test_all_problems_of_a_file_are_told_at_once(recipe, capsys):
    wrong = {
        **MINIMAL,
        "pairs": {"candidatez": 8, "steps": "x"},
        "evaluat": {},
        "captions": {"kind": "grammar", "n": 1},
    }
    del wrong["name"]
    Path(recipe).write_text(yaml.dump(wrong))
    assert refused(capsys, "--recipe", recipe, needs=()) == [
        "name: missing",
        "captions.n: there is no such key; there are captions.kind, captions.count, captions.kinds, "
        "captions.say_places, captions.path, captions.column, captions.limit, captions.near_duplicates, "
        "captions.revision, captions.split",
        'pairs.steps: Input should be a valid integer, unable to parse string as an integer, not "x"',
        "pairs.candidatez: there is no such key; did you mean pairs.candidates?",
        "evaluat: there is no such key; did you mean evaluate?",
    ]


def test_files_that_are_not_there(recipe, capsys, tmp_path):
    assert "recipes/miniature.yaml" in refused(capsys, "--recipe", "nope.yaml")[0]
    assert refused(capsys)[0].startswith("--recipe: missing; name a recipe file")
    wrong = ["--models.clip.name", "local-dir:no/such/clip", "--models.clip.pretrained", "null"]
    wrong += ["--models.llm.path", "no/such/llm", "--captions.kind", "files", "--captions.path", f"{tmp_path}/none"]
    problems = refused(
        capsys,
        "--recipe",
        recipe,
        *wrong,
        needs=("workspace", "captions", "models.clip", "models.llm", "models.editor"),
    )
    assert [problem.split(":")[0] for problem in problems] == [
        "--workspace",
        "captions.path",
        "models.clip.name",
        "models.llm.path",
    ]
    assert "'no/such/llm'" in problems[-1]


def test_a_recipe_of_the_repository_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, _, _ = load_settings("A job.", argv=["--recipe", "recipes/miniature.yaml"], needs=())
    assert found.name == "miniature"


def test_help_teaches(recipe, capsys):
    with pytest.raises(SystemExit) as exit_:
        load_settings("Makes pairs.\n\nReads instructions/ and writes pairs/.", Edit, ["--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Reads instructions/ and writes pairs/." in text
    assert "--recipe recipes/miniature.yaml --workspace workspace" in text
    assert "--instruction str what to change (required)" in text
    assert "--pairs.candidates int candidates drawn for each caption pair, or at most (default: 100)" in text


def test_settings_come_without_the_weight_of_torch_and_ray():
    code = "import sys, ip2p.cli; print([m for m in ('torch', 'ray', 'vllm', 'diffusers') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--captions.path", "x.parquet"], "captions.path: .*kind grammar.*kind files or hub"),
        (["--captions.kind", "files", "--captions.path", "x", "--captions.kinds", "move"], "captions.kinds: .*grammar"),
        (["--captions.kind", "files", "--captions.path", "x", "--captions.split", "a"], "captions.split: .*kind hub"),
        (["--captions.nothing", "x"], "--captions.nothing: there is no such flag"),
        (["--seed", "-1"], "seed: .*greater than or equal to 0"),
        (["--seed", str(2**63)], "seed: .*less than"),
        (["--serve.version", "../x"], "serve.version: "),
        (["--serve.version", "a/../../b"], "serve.version: "),
    ],
)
def test_a_wrong_value_is_told_with_the_way_out(recipe, capsys, flags, message):
    (problem,) = refused(capsys, "--recipe", recipe, "--workspace", "w", *flags)
    assert re.match(message, problem), problem


@pytest.mark.parametrize("workspace", ["", "  ", "~nobodyhere/x"])
def test_a_workspace_that_names_nothing_is_refused(recipe, capsys, workspace):
    (problem,) = refused(capsys, "--recipe", recipe, "--workspace", workspace)
    assert problem.startswith(("workspace ", "--workspace"))
