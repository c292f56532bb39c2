"""Admission control; no server."""

import pytest

from serve.admission import Admission, Pace
from serve.errors import RefusedError
from serve.keys import Client
from serve.load import Load, memory_of, work_of
from tests.serve.conftest import make_key

MEMORY = 1000


@pytest.fixture
def admission():
    return Admission(limit=4, memory=MEMORY, pace=Pace())


def make_client(name: str = "shop", **limits: int) -> Client:
    return Client(make_key(name, "x", **limits), clock=lambda: 0.0)


def load(work: float, memory: int = 0) -> Load:
    return Load(work, memory)


def test_edits_are_admitted_up_to_the_limit_and_free_it_when_done(admission):
    with admission.admit(None, 3, load(3)), admission.admit(None, 1, load(1)):
        assert (admission.in_flight, admission.work) == (4, 4)
    assert (admission.in_flight, admission.work) == (0, 0)
    with admission.admit(None, 4, load(4)):
        assert admission.in_flight == 4


def test_full_server_rejects_and_stays_as_it_was(admission):
    with admission.admit(None, 3, load(3)):
        with pytest.raises(RefusedError) as refused, admission.admit(None, 2, load(2)):
            pass
        assert admission.work == 3
    assert refused.value.status == 429
    assert "server busy: the work of 3 of 4 edits in flight; retry later" in refused.value.message


def test_retry_after_is_the_excess_at_the_current_pace(admission):
    admission.pace.seconds = 3.0
    with admission.admit(None, 4, load(4)):
        for edits, seconds in ((1, 3), (3, 9)):
            with pytest.raises(RefusedError) as refused, admission.admit(None, edits, load(edits)):
                pass
            assert refused.value.retry_after == seconds


def test_failed_edits_free_their_capacity(admission):
    client = make_client()
    with pytest.raises(ZeroDivisionError), admission.admit(client, 3, load(3, 7)):
        raise ZeroDivisionError
    assert admission.in_flight == admission.work == admission.memory == client.work == client.memory == 0


def test_client_is_charged_for_all_work_but_the_first_edit(admission):
    client = make_client(edits_per_minute=60)
    client.charge(1)  # by the request guard
    with admission.admit(client, 1, load(3.5)):
        assert (client.tokens, client.work) == (56.5, 3.5)
    assert (client.tokens, client.work) == (56.5, 0)


def test_a_client_over_its_limits_takes_no_capacity_and_is_not_charged(admission):
    client = make_client(concurrent_edits=3, edits_per_minute=60)
    with admission.admit(client, 2, load(2)):
        tokens = client.tokens
        with pytest.raises(RefusedError, match="the work of 2 of 3 edits in flight") as refused:
            admission.admit(client, 1, load(1.5)).__enter__()
        assert (admission.work, client.work, client.tokens) == (2, 2, tokens)
    assert refused.value.status == 429
    client.tokens = 0.5
    with pytest.raises(RefusedError, match="limited to 60 edits a minute"), admission.admit(client, 2, load(2)):
        pass
    assert (admission.work, client.work, client.tokens) == (0, 0, 0.5)


@pytest.mark.parametrize("limits", [{"edits_per_minute": 2}, {"concurrent_edits": 2}, {}])
def test_what_can_never_fit_is_the_clients_mistake(admission, limits):
    client = make_client(**limits)
    with pytest.raises(RefusedError, match=f"at most {2 if limits else 4} fit") as refused:
        admission.admit(client, 1, load(4.5)).__enter__()
    assert (refused.value.status, refused.value.retry_after) == (400, None)


def test_pictures_that_can_never_fit_are_the_clients_mistake(admission):
    with pytest.raises(RefusedError, match="send smaller images") as refused:
        admission.admit(None, 1, load(1, MEMORY // 2 + 1)).__enter__()
    assert (refused.value.status, refused.value.param) == (400, "image")


def test_one_key_leaves_memory_to_the_others(admission):
    one, other = make_client("one"), make_client("other")
    with admission.admit(one, 1, load(1, MEMORY // 2)):
        with pytest.raises(RefusedError, match="server busy: pictures") as refused:
            admission.admit(one, 1, load(1, 1)).__enter__()
        assert refused.value.status == 429
        with admission.admit(other, 1, load(1, MEMORY // 2)):
            assert admission.memory == MEMORY


def test_a_part_of_the_queue_is_for_keys_that_have_nothing_in_flight():
    admission = Admission(limit=16, memory=MEMORY, pace=Pace())
    one, other = make_client("one"), make_client("other")
    with admission.admit(one, 14, load(14)):
        with pytest.raises(RefusedError, match="server busy"):
            admission.admit(one, 1, load(1)).__enter__()
        with admission.admit(other, 2, load(2)):
            assert admission.work == 16


def test_server_limit_is_checked_before_a_client_is_charged(admission):
    client = make_client(edits_per_minute=60)
    with admission.admit(None, 4, load(4)), pytest.raises(RefusedError, match="server busy"):
        admission.admit(client, 2, load(2)).__enter__()
    assert client.tokens == 60


def test_work_counts_steps_previews_and_pixels_and_is_at_least_one_edit():
    full = 512 * 512
    assert work_of(20, 0, full, full) == 1
    assert work_of(100, 0, full, full) == 5
    assert work_of(90, 10, full, full) == 5
    assert work_of(100, 0, full // 2, full) == 2.5
    assert work_of(1, 0, 32 * 32, full) == 1


def test_memory_counts_the_file_the_picture_and_the_results():
    assert memory_of(10, 100, 1000, lossless=False) == 40 + 400 + 1000
    assert memory_of(10, 100, 1000, lossless=True) == 40 + 400 + 4000


def test_pace_follows_completed_edits_and_ignores_idle_hours():
    now = [0.0]
    pace = Pace(clock=lambda: now[0])
    pace.tick()
    assert pace.seconds == 1.0, "one edit is no interval"
    for _ in range(100):
        now[0] += 4.0
        pace.tick()
    assert pace.seconds == pytest.approx(4.0, abs=0.01)
    now[0] += 3600
    pace.tick()
    assert pace.seconds == pytest.approx(4.6, abs=0.01)
