"""What every job is run inside: one owner of the workspace, users' mistakes told without a traceback, JSON lines."""

import io
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path

from ray._common.formatters import JSONFormatter

from ip2p.recipe import REPOSITORY
from ip2p.workspace import Workspace
from runtime.lease import SUBMISSION, held


@contextmanager
def job(name: str, workspace: Workspace) -> Iterator[None]:
    """Run the job `name`, which writes to `workspace`, inside this.

    A `ValueError` of ours ends the process with status 2 and `error: ...`. Whether the workspace can be written is
    known before anything starts.
    """
    with ExitStack() as around:
        if wants_json():
            around.enter_context(redirect_stdout(JsonLines(name)))  # pyright: ignore[reportArgumentType]
        around.enter_context(mistakes_told())
        around.enter_context(held(workspace, name))
        yield


@contextmanager
def mistakes_told() -> Iterator[None]:
    """A `ValueError` that this repository raises is a user's mistake, by its rules; any other is a bug, and stays."""
    try:
        yield
    except ValueError as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = Path(last.filename).is_relative_to(REPOSITORY) and ".venv" not in Path(last.filename).parts
        if not ours or not (last.line or "").startswith("raise"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def wants_json() -> bool:
    """Ray's own switch, which makes its logs and those of its workers JSON lines."""
    return os.environ.get("RAY_LOGGING_CONFIG_ENCODING", "").upper() == "JSON"


class JsonLines(io.TextIOBase):
    """Standard output whose lines are log records, as Ray writes them, with the job and what it is part of."""

    def __init__(self, name: str):
        self._begun = ""
        self._fields = {"job": os.environ.get(SUBMISSION) or name, "stage": name}
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(JSONFormatter())
        self._logger = logging.Logger("ip2p", logging.INFO)
        self._logger.addHandler(handler)

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in filter(str.strip, lines):
            self._logger.info("%s", line, extra=self._fields)
        return len(text)

    def writable(self) -> bool:
        return True
