"""The application without engines: static files, the request guard and error bodies."""

import re

import pytest
from fastapi.testclient import TestClient

from ip2p.cli import read_recipe
from serve.api import make_api
from serve.gateway import open_gateway
from serve.guard import MAX_BUFFERED, OPEN_PATHS, RequestGuard
from serve.keys import Clients
from serve.metrics import KNOWN_PATHS
from serve.routers.page import STATIC
from serve.schema import MAX_BODY_BYTES
from tests.serve.conftest import TOKEN, make_key

STATIC_FILES = {"/": "page.html", "/static/page.css": "page.css", "/static/page.js": "page.js"}
KEYS = [make_key("tests", TOKEN)]
AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}


def make_client(keys=KEYS, host: str = "127.0.0.1") -> TestClient:
    recipe = read_recipe("recipes/miniature.yaml")
    gateway = open_gateway(recipe, None, {"shipped": None}, {"shipped": 1.0}, b"secret", 120)
    return TestClient(make_api(gateway, Clients(keys)), client=(host, 50000))


@pytest.fixture
def client():
    return make_client()


# ---- static files


@pytest.mark.parametrize(
    ("path", "media_type"),
    [("/", "text/html"), ("/static/page.css", "text/css"), ("/static/page.js", "text/javascript")],
)
def test_static_files_are_served_without_a_key(client, path, media_type):
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.content == (STATIC / STATIC_FILES[path]).read_bytes()
    assert answer.headers["content-type"] == f"{media_type}; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"


def test_page_refers_to_files_that_are_served(client):
    page = client.get("/").text
    linked = re.findall(r'(?:src|href)="(static/[^"]+)"', page)
    assert {f"/{path}" for path in linked} == set(STATIC_FILES) - {"/"}


def test_page_has_no_inline_script_or_style_and_forbids_them(client):
    page = client.get("/").text
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=)", page)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', page)
    assert "style-src 'self'; script-src 'self'" in policy
    assert "unsafe" not in policy


def test_every_static_file_is_served():
    assert {path.name for path in STATIC.iterdir()} == set(STATIC_FILES.values())


@pytest.mark.parametrize("path", ["/static/", "/static/page.html", "/static/..%2fapp.py", "/static/../app.py"])
def test_other_static_paths_need_a_key_and_lead_nowhere(client, path):
    assert client.get(path).status_code == 401
    assert client.get(path, headers=AUTHORIZED).status_code == 404


def test_static_files_are_counted_by_path_and_unknown_paths_as_other(client):
    for path in ("/static/page.js", "/nothing", "/nothing/else"):
        client.get(path)
    lines = client.get("/metrics", headers=AUTHORIZED).text.splitlines()
    assert 'ip2p_serve_requests_total{path="/static/page.js",status="200"} 1.0' in lines
    assert 'ip2p_serve_requests_total{path="other",status="401"} 2.0' in lines
    assert set(STATIC_FILES) <= KNOWN_PATHS & OPEN_PATHS


# ---- guard


def test_endpoint_without_keys_serves_only_its_own_machine():
    assert make_client(keys=None).get("/v1/defaults").status_code == 200
    stranger = make_client(keys=None, host="192.0.2.1")
    answer = stranger.get("/v1/defaults")
    assert answer.status_code == 403
    assert "its own machine only" in answer.json()["error"]["message"]
    assert stranger.get("/healthz").status_code == 200


def test_each_request_is_charged_to_its_key():
    client = make_client([make_key("few", TOKEN, edits_per_minute=2)])
    statuses = [client.get("/v1/defaults", headers=AUTHORIZED).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]


@pytest.mark.parametrize(
    ("headers", "status", "says"),
    [
        ({"content-type": "text/plain"}, 415, "send application/json"),
        ({"content-type": "application/json", "content-length": "1_0"}, 400, "not a number of bytes"),
        ({"content-type": "application/json", "content-length": str(MAX_BODY_BYTES + 1)}, 413, "smaller images"),
    ],
)
def test_body_is_rejected_by_its_headers(client, headers, status, says):
    answer = client.post("/v1/edits", content=b"{}", headers=AUTHORIZED | headers)
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]


def test_buffer_space_is_reserved_while_a_body_is_read_and_freed_after_a_failure(client):
    guard = find_guard(client)
    guard.buffered = MAX_BUFFERED - 1
    answer = client.post("/v1/feedback", json={}, headers=AUTHORIZED)
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "2"
    assert guard.buffered == MAX_BUFFERED - 1
    guard.buffered = 0
    assert client.post("/v1/feedback", json={}, headers=AUTHORIZED).status_code == 400
    assert guard.buffered == 0


def find_guard(client: TestClient) -> RequestGuard:
    """Return the guard in the stack of middleware, which the first request builds."""
    client.get("/healthz")
    layer = client.app.middleware_stack
    while not isinstance(layer, RequestGuard):
        layer = layer.app
    return layer


# ---- errors


def test_unknown_path_lists_the_routes(client):
    answer = client.get("/v2/edits", headers=AUTHORIZED)
    assert answer.status_code == 404
    message = answer.json()["error"]["message"]
    assert "POST /v1/images/edits" in message and "GET /v1/models" in message


def test_wrong_fields_are_named_without_their_values(client):
    answer = client.post("/v1/feedback", json={"edit_id": "", "choice": "sideways"}, headers=AUTHORIZED)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "edit_id")
    assert "choice" in error["message"] and "sideways" not in error["message"]


def test_feedback_on_an_unknown_edit_is_rejected(client):
    answer = client.post("/v1/feedback", json={"edit_id": "x", "choice": "up"}, headers=AUTHORIZED)
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "edit_id")


def test_unknown_model_is_rejected_before_anything_is_decoded(client):
    body = {"image": "x", "edits": [{"instruction": "x"}], "model": "nothing"}
    answer = client.post("/v1/edits", json=body, headers=AUTHORIZED)
    assert answer.status_code == 404
    assert "choose one of shipped" in answer.json()["error"]["message"]
