"""The command that trains the miniature family, at its smallest, on a real local Ray."""

import subprocess
import sys

from diffusers import AutoencoderKL
from transformers import AutoModelForCausalLM

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
