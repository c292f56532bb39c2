"""Admission control; no server."""

import pytest

from serve.admission import Admission, Pace
from serve.errors import RefusedError
from serve.keys import Client
from tests.serve.conftest import make_key


@pytest.fixture
def admission():
    return Admission(limit=4, pace=Pace())


def make_client(**limits: int) -> Client:
    return Client(make_key("shop", "x", **limits), clock=lambda: 0.0)


def test_edits_are_admitted_up_to_the_limit_and_free_it_when_done(admission):
    with admission.admit(None, 3), admission.admit(None, 1):
        assert admission.in_flight == 4
    assert admission.in_flight == 0
    with admission.admit(None, 4):
        assert admission.in_flight == 4


def test_full_server_rejects_and_stays_as_it_was(admission):
    with admission.admit(None, 3):
        with pytest.raises(RefusedError) as refused, admission.admit(None, 2):
            pass
        assert admission.in_flight == 3
    assert refused.value.status == 429
    assert refused.value.message == ("server busy: 3 of 4 edits in flight; retry later or send fewer per request")


def test_retry_after_is_the_excess_at_the_current_pace(admission):
    admission.pace.seconds = 3.0
    with admission.admit(None, 4):
        for edits, seconds in ((1, 3), (5, 15), (50, 60)):
            with pytest.raises(RefusedError) as refused, admission.admit(None, edits):
                pass
            assert refused.value.retry_after == seconds


def test_failed_edits_free_their_capacity(admission):
    client = make_client()
    with pytest.raises(ZeroDivisionError), admission.admit(client, 3):
        raise ZeroDivisionError
    assert admission.in_flight == client.running == 0


def test_client_is_charged_for_all_edits_but_the_first(admission):
    client = make_client(edits_per_minute=60)
    client.charge(1)  # by the request guard
    with admission.admit(client, 3):
        assert (client.tokens, client.running) == (57, 3)
    assert (client.tokens, client.running) == (57, 0)


@pytest.mark.parametrize(
    ("limits", "says"),
    [({"edits_per_minute": 1}, "limited to 1 edits a minute"), ({"concurrent_edits": 2}, "0 of 2 edits in flight")],
)
def test_client_over_its_limits_takes_no_capacity(admission, limits, says):
    client = make_client(**limits)
    with pytest.raises(RefusedError, match=says) as refused, admission.admit(client, 3):
        pass
    assert refused.value.status == 429
    assert admission.in_flight == client.running == 0


def test_server_limit_is_checked_before_a_client_is_charged(admission):
    client = make_client(edits_per_minute=60)
    with pytest.raises(RefusedError, match="server busy"), admission.admit(client, 5):
        pass
    assert client.tokens == 60


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
