"""Which version an edit goes to; no server. Retries are tested on live engines in test_load.py."""

from collections import Counter

import pytest

from serve.admission import Pace
from serve.engine_client import EngineClient
from serve.errors import RefusedError
from serve.metrics import Metrics


@pytest.fixture
def client():
    handles = {"one": None, "two": None}
    return EngineClient(handles, {"one": 0.75, "two": 0.25}, Pace(), Metrics(in_flight=lambda: 0))


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
