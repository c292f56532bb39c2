"""How every command ends.

| status | meaning |
|---|---|
| 0 | done |
| 1 | a bug: the traceback is shown |
| 2 | a user's mistake: one line says what is wrong and what to do |
| 75 | another run owns the workspace now, or no heartbeat could be written (`runtime.lease`) |
| 130, 143 | SIGINT, SIGTERM: the same command resumes |
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from ip2p.errors import UserError

USER_ERROR, INTERRUPTED, TERMINATED = 2, 130, 143


class TerminatedError(BaseException):
    """SIGTERM. Like `KeyboardInterrupt` it is no `Exception`: nothing that retries may swallow it."""


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
