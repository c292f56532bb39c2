"""`python -m jobs.plan`: what it prints, without Ray."""

import subprocess
import sys

import pytest

from ip2p.cost import Assumptions
from ip2p.recipe import REPOSITORY
from jobs.plan import main, pairs_wanted

SD15 = ["--recipe", "recipes/sd15.yaml"]


def printed(capsys, monkeypatch, *argv: str) -> str:
    monkeypatch.setenv("COLUMNS", "160")
    main([*SD15, *argv])
    return capsys.readouterr().out


def test_prints_every_stage_gpu_and_assumption(capsys, monkeypatch):
    out = printed(capsys, monkeypatch, "--pairs", "1_000_000")
    for word in (
        "edit_captions",
        "generate_pairs",
        "export_dataset",
        "train",
        "evaluate",
        "l4",
        "l40s",
        "a100",
        "h100",
    ):
        assert word in out
    for name in Assumptions.model_fields:
        assert f"--{name}" in out
    # 1e6 / 2.64 caption pairs x 100 candidates x (400 x 0.803 + 2 x (2.515 + 0.162)) TFLOP at 0.35 of 989.
    hours = 1e6 / 2.64 * 100 * (400 * 0.803 + 2 * 2.677) / (0.35 * 989) / 3600
    assert f"{hours:,.1f} h" in out
    assert f"${hours * 4:,.0f}" in out


def test_prices_and_keys_of_the_recipe_are_flags(capsys, monkeypatch):
    out = printed(capsys, monkeypatch, "--pairs=1000", "--prices", '{"h100": 2.5}', "--pairs.steps", "25")
    assert "h100 2.5" in out
    assert "(changed)" in out
    assert "sd15: 100 candidates, 25 steps; 3,788 UNet samples a pair" in out


def test_pairs_alone_is_how_many():
    argv = ["--pairs", "5", "--pairs=5", "--pairs.steps", "25"]
    assert pairs_wanted(argv) == ["--wanted", "5", "--wanted=5", "--pairs.steps", "25"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pairs", "0"], "--pairs 0: "),
        (["--prices", '{"mi300x": 3}'], "peak_tflops: nothing is said of 'mi300x'"),
        (["--unet_utilization", "2"], "unet_utilization: "),
    ],
)
def test_what_is_wrong_is_told(capsys, flags, message):
    with pytest.raises(SystemExit) as exit_:
        main([*SD15, *flags])
    assert message in f"{capsys.readouterr().err}{exit_.value.code}"


def test_starts_without_ray_and_torch():
    check = "import sys, jobs.plan; sys.exit(bool({'ray', 'torch', 'vllm'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", check], cwd=REPOSITORY, timeout=120).returncode == 0
