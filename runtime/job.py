"""What every job runs inside: one owner of the workspace, one exit status for each way to end, JSON lines.

| status | meaning |
|---|---|
| 0 | done |
| 1 | a bug: the traceback is shown |
| 2 | a user's mistake: one line says what is wrong and what to do |
| 75 | another run owns the workspace now, or no heartbeat could be written (`runtime.lease`) |
| 130, 143 | SIGINT, SIGTERM: the same command resumes |
"""

import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from types import FrameType
from typing import NoReturn

from ray._common.formatters import JSONFormatter

from ip2p.errors import UserError
from ip2p.workspace import Workspace
from runtime.lease import SUBMISSION, held

USER_ERROR, INTERRUPTED, TERMINATED = 2, 130, 143


class TerminatedError(BaseException):
    """SIGTERM. Like `KeyboardInterrupt` it is no `Exception`: nothing that retries may swallow it."""


@contextmanager
def job(name: str, workspace: Workspace) -> Iterator[None]:
    """Run the job `name`, which writes to `workspace`, inside this.

    Takes the workspace before anything starts, and maps the end of the block to the exit statuses above.
    """
    with ExitStack() as around:
        if wants_json():
            around.enter_context(redirect_stdout(JsonLines(name)))  # pyright: ignore[reportArgumentType]
        around.enter_context(exit_statuses(resumable=True))
        around.enter_context(held(workspace, name))
        yield


@contextmanager
def exit_statuses(resumable: bool = False) -> Iterator[None]:
    """Map the end of the block to the exit statuses above; only a bug keeps its traceback."""
    way_out = "; run the same command to resume" if resumable else ""
    try:
        with sigterm_raises():
            yield
    except KeyboardInterrupt:
        end(f"interrupted{way_out}", INTERRUPTED)
    except TerminatedError:
        end(f"terminated{way_out}", TERMINATED)
    except Exception as error:
        mistake = user_error_in(error)
        if mistake is None:
            raise
        end(f"error: {mistake}", USER_ERROR)


def end(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    sys.exit(status)


def user_error_in(error: BaseException | None) -> str | None:
    """The message of a `UserError` that caused `error`, in this process or in a Ray worker."""
    while error is not None:
        if isinstance(error, UserError):
            # Ray's copy of a worker's error has the worker's traceback as its text.
            cause = getattr(error, "cause", None)
            return str(cause if isinstance(cause, UserError) else error)
        error = getattr(error, "cause", None) or error.__cause__
    return None


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Inside, SIGTERM raises `TerminatedError` in the main thread, as Ctrl-C raises `KeyboardInterrupt`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(_number: int, _frame: FrameType | None) -> NoReturn:
        raise TerminatedError

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
