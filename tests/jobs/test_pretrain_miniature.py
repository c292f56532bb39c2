"""The command that trains the miniature family, at its smallest, on a real local Ray."""

import json
import subprocess
import sys

import pytest
from diffusers import AutoencoderKL
from transformers import AutoModelForCausalLM

from jobs import pretrain_miniature

COMMAND = [sys.executable, "-m", "jobs.pretrain_miniature"]


def test_trains_by_ray_and_goes_on(tmp_path):
    flags = ["--output", str(tmp_path / "weights"), "--checkpoints", str(tmp_path / "state"), "--workers", "1"]
    flags += ["--models", "autoencoder,language_model", "--steps.autoencoder", "1", "--steps.language_model", "1"]
    first = subprocess.run([*COMMAND, *flags], capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stderr[-2000:]
    assert "loss" in first.stdout
    AutoencoderKL.from_pretrained(tmp_path / "weights" / "text_to_image" / "vae")
    AutoModelForCausalLM.from_pretrained(tmp_path / "weights" / "language_model")


def test_says_what_is_wrong_with_a_flag():
    wrong = subprocess.run([*COMMAND, "--models", "vae"], capture_output=True, text=True, timeout=120)
    assert wrong.returncode != 0
    assert "vae" in wrong.stderr


def test_measure_and_ship_are_flags(tmp_path, monkeypatch, capsys):
    figures = {"CLIP": {"retrieval": 0.25}}
    monkeypatch.setattr(pretrain_miniature, "measure_all", lambda settings: figures if settings.scenes == 64 else {})
    monkeypatch.setattr(sys, "argv", ["pretrain_miniature", "--measure", "--scenes", "64", "--output", str(tmp_path)])
    pretrain_miniature.main()
    assert "retrieval 0.250" in capsys.readouterr().out
    assert json.loads((tmp_path / "measured.json").read_text()) == figures
    monkeypatch.setattr(sys, "argv", ["pretrain_miniature", "--ship", str(tmp_path), "--output", str(tmp_path)])
    with pytest.raises(ValueError, match="holds no trained editor"):
        pretrain_miniature.main()
