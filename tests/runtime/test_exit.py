"""How commands end."""

import signal

import pytest
import ray

from ip2p.errors import UserError
from runtime.exit import exit_statuses


@ray.remote(num_cpus=0)
def worker_that_raises(error: Exception):
    raise error


def ends_with(error: BaseException) -> int | str | None:
    with pytest.raises(SystemExit) as end, exit_statuses(resumable=True):
        raise error
    return end.value.code


def test_users_mistake_is_one_line_wherever_it_is_raised(local_ray, capsys):
    assert ends_with(UserError("steps: 0 is too small")) == 2
    wrapped = RuntimeError("the worker group failed")
    wrapped.__cause__ = UserError("steps: 0 is too small")
    assert ends_with(wrapped) == 2
    with pytest.raises(SystemExit) as end, exit_statuses():
        ray.get(worker_that_raises.remote(UserError("steps: 0 is too small")))
    assert end.value.code == 2
    assert capsys.readouterr().err == 3 * "error: steps: 0 is too small\n"


def test_bug_keeps_its_traceback(local_ray):
    with pytest.raises(ValueError, match="bug"), exit_statuses():
        raise ValueError("bug")
    with pytest.raises(ray.exceptions.RayTaskError), exit_statuses():
        ray.get(worker_that_raises.remote(ValueError("bug")))


def test_signals_have_their_status_and_say_how_to_resume(capsys):
    assert ends_with(KeyboardInterrupt()) == 130
    with pytest.raises(SystemExit) as end, exit_statuses(resumable=True):
        signal.raise_signal(signal.SIGTERM)
    assert end.value.code == 143
    assert capsys.readouterr().err.count("; run the same command to resume\n") == 2
