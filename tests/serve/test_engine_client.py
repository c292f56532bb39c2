"""Which version an edit goes to; no server. Retries are tested on live engines in test_load.py."""

import asyncio
from collections import Counter

import pytest
from ray.serve.exceptions import BackPressureError

from serve import engine_client
from serve.admission import Pace
from serve.batcher import DeadEngineError
from serve.engine_client import EngineClient
from serve.errors import RefusedError
from serve.metrics import Metrics


@pytest.fixture
def client():
    handles = {"one": None, "two": None}
    return EngineClient(handles, {"one": 0.75, "two": 0.25}, 4, Pace(), Metrics(in_flight=lambda: 0))


def test_first_named_version_is_chosen(client):
    assert client.main_version == "one"
    assert client.choose("two", "one") == "two"
    assert client.choose(None, "two") == "two"
    assert client.choose("editor", "two") == "two", "a generic name is no choice"


def test_unnamed_version_is_drawn_by_share(client):
    drawn = Counter(client.choose(None, "ip2p", "") for _ in range(2000))
    assert drawn["two"] / 2000 == pytest.approx(0.25, abs=0.06)


def test_unknown_version_is_rejected_naming_the_served_ones(client):
    with pytest.raises(RefusedError, match="'three' is not served; choose one of one, two") as refused:
        client.choose("three", None)
    assert (refused.value.status, refused.value.param) == (404, "model")


class Handle:
    """A handle whose `describe.remote()` does what the test says next."""

    def __init__(self, *acts):
        self.acts, self.calls = list(acts), 0
        self.describe = self

    async def remote(self):
        self.calls += 1
        act = self.acts.pop(0)
        if isinstance(act, BaseException):
            raise act
        await asyncio.sleep(act)


def probe(handle: Handle, *times: float) -> list[bool]:
    async def ask() -> list[bool]:
        client = EngineClient({"one": handle}, {"one": 1.0}, 4, Pace(), Metrics(in_flight=lambda: 0))
        answers = []
        for seconds in times:
            await asyncio.sleep(seconds)
            answers.append(await client.ready())
        return answers

    return asyncio.run(ask())


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(engine_client, "READY_WITHIN", 0.2)
    monkeypatch.setattr(engine_client, "PROBE_AGE", 0.1)


def test_ready_asks_one_engine_at_a_time_however_many_ask(hurried):
    handle = Handle(0.05, 0.05)
    assert probe(handle, 0, 0, 0, 0.01) == [True] * 4
    assert handle.calls == 1


def test_a_busy_engine_stays_ready_and_a_dead_one_does_not(hurried):
    busy = Handle(0, 1.0, BackPressureError(1, 1), 0, 0, 0)
    assert all(probe(busy, 0, 0.3, 0.5, 0.3, 0.3))
    assert busy.calls >= 4
    dead = Handle(0, DeadEngineError("dead"), 0)
    assert probe(dead, 0, 0.15, 0.05, 0.15) == [True, True, False, True]


def test_an_engine_that_never_answered_is_not_ready(hurried):
    assert probe(Handle(1.0, 0), 0, 0.4) == [False, True]
