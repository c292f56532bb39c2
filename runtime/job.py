"""What every job runs inside: one owner of the workspace, the exit statuses of `runtime.exit`, JSON lines."""

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout

from ray._common.formatters import JSONFormatter

from ip2p.workspace import Workspace
from runtime.exit import exit_statuses
from runtime.lease import SUBMISSION, Lease, held


@contextmanager
def job(name: str, workspace: Workspace) -> Iterator[Lease]:
    """Run the job `name`, which writes to `workspace`, inside this. Yields its lease.

    Takes the workspace before anything starts, and maps the end of the block to an exit status.
    """
    with ExitStack() as around:
        if wants_json():
            around.enter_context(redirect_stdout(JsonLines(name)))  # pyright: ignore[reportArgumentType]
        around.enter_context(exit_statuses(resumable=True))
        yield around.enter_context(held(workspace, name))


def wants_json() -> bool:
    """Whether Ray's own switch asks for JSON lines, in its logs and in those of its workers."""
    return os.environ.get("RAY_LOGGING_CONFIG_ENCODING", "").upper() == "JSON"


class JsonLines(io.TextIOBase):
    """Standard output whose lines are log records in Ray's format, with the job and its stage."""

    def __init__(self, name: str):
        self._unfinished = ""
        self._fields = {"job": os.environ.get(SUBMISSION) or name, "stage": name}
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(JSONFormatter())
        self._logger = logging.Logger("ip2p", logging.INFO)
        self._logger.addHandler(handler)

    def write(self, text: str) -> int:
        *lines, self._unfinished = (self._unfinished + text).split("\n")
        for line in filter(str.strip, lines):
            self._logger.info("%s", line, extra=self._fields)
        return len(text)

    def writable(self) -> bool:
        return True
