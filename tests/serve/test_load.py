"""The endpoint under load while its engines are killed and replaced; and thousands of malformed requests."""

import base64
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ray import serve

from ip2p import images
from ip2p.edit.editor import Editor, EditRequest
from ip2p.models import load_text_to_image
from ip2p.recipe import ModelRef
from ip2p.workspace import Workspace
from serve.app import start
from tests import tiny
from tests.serve import requests_of_fuzz as fuzz
from tests.serve.conftest import TOKEN, free_port, make_key, noise, replicas, served

PHOTO = noise(64, 64, 3)
CASES = [{"seed": seed, "num_inference_steps": 3 + 9 * (seed % 3)} for seed in range(6)]
HEADERS = {"authorization": f"Bearer {TOKEN}"}
KEYS = [make_key("tests", TOKEN, edits_per_minute=10**6, concurrent_edits=10**4)]


class Clients(threading.Thread):
    """Closed-loop clients, until `stop`: everything they were answered."""

    def __init__(self, address: str, count: int):
        super().__init__()
        self.address, self.count = address, count
        self.ended = threading.Event()
        self.answers: list[tuple[int, int, str, np.ndarray | None]] = []  # case, status, model, image

    def run(self) -> None:
        threads = [threading.Thread(target=self._client, args=(k,)) for k in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _client(self, k: int) -> None:
        draw = random.Random(k)
        photo = base64.b64encode(images.encode(PHOTO)).decode()
        with httpx.Client(base_url=self.address, timeout=180, headers=HEADERS) as client:
            while not self.ended.is_set():
                case = draw.randrange(len(CASES))
                body = {"image": photo, "edits": [CASES[case] | {"instruction": "make it night"}]}
                try:
                    answer = client.post("/v1/edits", json=body)
                except httpx.HTTPError as error:
                    self.answers.append((case, 0, repr(error), None))
                    continue
                if answer.status_code != 200:
                    self.answers.append((case, answer.status_code, answer.text[:300], None))
                    continue
                (edit,) = answer.json()["edits"]
                picture = images.decode(base64.b64decode(edit["image"]))
                self.answers.append((case, 200, edit["model"], picture))

    def more(self, count: int) -> None:
        """Wait until so many more have been answered."""
        wanted, began = len(self.answers) + count, time.monotonic()
        while len(self.answers) < wanted:
            assert time.monotonic() - began < 300, "no answers any more"
            time.sleep(0.2)

    def stop(self) -> None:
        self.ended.set()
        self.join(200)
        assert not self.is_alive()


@pytest.fixture
def versions(tmp_path) -> Workspace:
    for seed, name in enumerate(("one", "two")):
        shutil.copytree(tiny.make_editor(tmp_path / name, seed=seed), tmp_path / "w" / "versions" / name)
    return Workspace(tmp_path / "w")


def expected(workspace: Workspace, version: str) -> list[np.ndarray]:
    model = load_text_to_image(ModelRef(path=workspace.path("versions", version)), device="cpu")
    requests = [EditRequest(PHOTO, "make it night", steps=c["num_inference_steps"], seed=c["seed"]) for c in CASES]
    return Editor(model, max_side=64).edit(requests)


def serving(recipe, **settings):
    section = recipe.serve.model_validate(recipe.serve.model_dump() | settings)
    return recipe.model_copy(update={"serve": section})


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kills_redeploys_and_downscaling_fail_no_request(recipe, versions, local_ray):
    truth = {version: expected(versions, version) for version in ("one", "two")}
    assert not np.array_equal(truth["one"][0], truth["two"][0])
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    start(serving(recipe, version="one", replicas=(2, 2), ingresses=2), versions, "127.0.0.1", port, KEYS)
    try:
        clients = Clients(address, count=8)
        clients.start()
        clients.more(40)
        for deployment in ("EditService", "EditIngress") * 2:
            while len(replicas(deployment)) < 2:  # the one that replaces the last victim
                time.sleep(0.5)
            os.kill(random.choice(sorted(replicas(deployment))), signal.SIGKILL)
            clients.more(30)
        while len(replicas("EditService")) < 2 or len(replicas("EditIngress")) < 2:
            time.sleep(0.5)
        at = len(clients.answers)
        start(serving(recipe, version="two", replicas=(2, 2), ingresses=2), versions, "127.0.0.1", port, KEYS)
        clients.more(40)
        redeployed = len(clients.answers)
        start(serving(recipe, version="two", replicas=(1, 1), ingresses=2), versions, "127.0.0.1", port, KEYS)
        clients.more(40)
        clients.stop()
        retries = [
            line
            for line in httpx.get(f"{address}/metrics", headers=HEADERS).text.splitlines()
            if line.startswith("ip2p_serve_retries_total")
        ]
    finally:
        serve.shutdown()
    statuses = Counter(status for _, status, _, _ in clients.answers)
    print(f"{len(clients.answers)} answers, by status {dict(statuses)}; {retries}; redeploy from {at} to {redeployed}")
    assert set(statuses) == {200}, [answer for answer in clients.answers if answer[1] != 200][:5]
    for case, _, model, picture in clients.answers:
        assert picture is not None
        assert np.abs(picture.astype(int) - truth[model.split("@")[0]][case]).max() <= 2
    models = [model.split("@")[0] for _, _, model, _ in clients.answers]
    assert set(models[:at]) == {"one"}
    assert set(models[redeployed:]) == {"two"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_canary_gets_its_share_and_requests_by_name(recipe, versions, local_ray):
    canary = serving(recipe, version="one", canary={"version": "two", "share": 0.5})
    body = {"image": base64.b64encode(images.encode(PHOTO)).decode(), "edits": [{"instruction": "x"}]}
    with (
        served(canary, versions, KEYS) as address,
        httpx.Client(base_url=address, timeout=120, headers=HEADERS) as client,
    ):
        assert [(model["id"], model["share"]) for model in client.get("/v1/models").json()["data"]] == [
            ("one", 0.5),
            ("two", 0.5),
        ]
        for name in ("one", "two"):
            by_header = client.post("/v1/edits", json=body, headers={"x-model-version": name}).json()
            by_field = client.post("/v1/edits", json=body | {"model": name}).json()
            assert by_header["model"].split("@")[0] == by_field["model"].split("@")[0] == name
        drawn = Counter(client.post("/v1/edits", json=body).json()["model"].split("@")[0] for _ in range(40))
    assert min(drawn["one"], drawn["two"]) >= 5, drawn


MALFORMED, AT_ONCE = 5000, 8


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_malformed_requests_replace_no_replica_and_leak_no_memory(recipe, tmp_path, local_ray):
    with served(recipe, Workspace(tmp_path), KEYS) as address:
        client = httpx.Client(base_url=address, timeout=120, headers=HEADERS)
        before = replicas()
        counts: Counter[int] = Counter()
        memory: list[float] = []
        client.event_hooks["response"] = [lambda answer: counts.update([answer.status_code])]

        every = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
        pool = ThreadPoolExecutor(AT_ONCE)

        @settings(max_examples=MALFORMED // AT_ONCE + 25, **every)
        @given(calls=st.lists(fuzz.MALFORMED, min_size=AT_ONCE, max_size=AT_ONCE))
        def malformed(calls):
            list(pool.map(lambda call: fuzz.check(client, call), calls))
            if counts.total() >= 500 * len(memory):
                memory.append(megabytes(before))

        @settings(max_examples=500 // AT_ONCE, **every)
        @given(calls=st.lists(fuzz.DAMAGED, min_size=AT_ONCE, max_size=AT_ONCE))
        def damaged(calls):
            list(pool.map(lambda call: fuzz.check_damaged(client, call), calls))

        began = time.monotonic()
        malformed()
        damaged()
        memory.append(megabytes(before))
        print(f"{counts.total()} requests in {time.monotonic() - began:.0f} s: {dict(counts)}; MB: {memory}")
        assert counts.total() >= MALFORMED
        assert set(replicas()) == set(before)
        # The first thousand fill caches.
        assert max(memory[3:]) - memory[2] < 60, memory


def megabytes(processes: dict[int, psutil.Process]) -> float:
    """Of all replicas; the ingress among them."""
    return round(sum(process.memory_info().rss for process in processes.values()) / 2**20, 1)
