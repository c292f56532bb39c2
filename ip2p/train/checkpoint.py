"""A checkpoint of the training loop as one file: the loop's state and the loss curve so far."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

STATE = "state.pt"


class BrokenCheckpointError(Exception):
    """The file is here and torch cannot read it."""


def save(state: dict[str, Any], curve: list[dict[str, Any]], directory: str) -> None:
    """Write the file that `load` reads. Raises `OSError` that says what to do, for example when the disk is full."""
    try:
        torch.save({"state": state, "curve": curve}, Path(directory, STATE))
    except (OSError, RuntimeError) as error:  # torch's own writer raises the second
        raise OSError(
            f"the checkpoint of step {state['step']} could not be written to {directory} ({error}): make room there "
            "(or set TMPDIR to a larger disk) and run the same command again; it resumes from the checkpoint before"
        ) from error


def load(directory: str | Path, device: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return (state, curve). Raises `BrokenCheckpointError`."""
    try:
        saved = torch.load(Path(directory, STATE), map_location=device, weights_only=True)
    except (RuntimeError, EOFError, OSError, UnpicklingError) as error:
        raise BrokenCheckpointError(str(error)) from error
    return saved["state"], saved["curve"]
