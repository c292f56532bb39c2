"""The application without engines: static files, the request guard and error bodies."""

import json
import re

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from ip2p.cli import read_recipe
from serve.api import make_api
from serve.bodies import MAX_DEPTH, check_json
from serve.errors import RefusedError
from serve.gateway import open_gateway
from serve.guard import MAX_BUFFERED, OPEN_PATHS, RequestGuard
from serve.keys import Clients
from serve.metrics import KNOWN_PATHS
from serve.routers.page import STATIC
from serve.schema import MAX_BODY_BYTES, MAX_EDITS, Edit
from tests.serve.conftest import TOKEN, make_key

STATIC_FILES = {"/": "page.html", "/static/page.css": "page.css", "/static/page.js": "page.js"}
KEYS = [make_key("tests", TOKEN)]
# In UTF-16 the letter has a byte like a quotation mark, and what follows looks like a string.
HIDDEN = '{"image":"\u2200","edits":[' + "[]," * 10**5 + "[]]}"
AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}


def make_client(keys=KEYS, host: str = "127.0.0.1") -> TestClient:
    recipe = read_recipe("recipes/miniature.yaml")
    gateway = open_gateway(recipe, None, {"shipped": None}, {"shipped": 1.0}, b"secret", 120)
    return TestClient(make_api(gateway, Clients(keys)), "http://localhost", client=(host, 50000))


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
    page = client.get("/")
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=)", page.text)
    policy = page.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in policy
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


def test_buffer_is_counted_by_what_arrives_and_freed_after_a_failure(client):
    uploads = find_guard(client).uploads
    uploads.held["another key"] = MAX_BUFFERED - 1
    answer = client.post("/v1/feedback", json={}, headers=AUTHORIZED)
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "2"
    assert uploads.held == {"another key": MAX_BUFFERED - 1}
    uploads.held.clear()
    assert client.post("/v1/feedback", json={}, headers=AUTHORIZED).status_code == 400
    assert uploads.held == {} and uploads.parsing.free == 1


def test_a_key_cannot_fill_the_buffer_of_the_others(client):
    uploads = find_guard(client).uploads
    uploads.held["tests"] = uploads.share
    assert uploads.share <= MAX_BUFFERED // 2
    assert client.post("/v1/feedback", json={}, headers=AUTHORIZED).status_code == 429
    uploads.body("another key").add(2**20)


@pytest.mark.parametrize("path", ["/healthz", "/", "/static/page.js", "/openapi.json", "/v1/models", "/nothing"])
def test_a_path_without_a_body_never_reads_one(client, path):
    def endless():
        yield b"x"
        raise AssertionError("the body was read")

    answer = client.post(path, content=endless(), headers=AUTHORIZED | {"content-length": str(MAX_BODY_BYTES)})
    assert answer.status_code == (404 if path == "/nothing" else 405)


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data; boundary=x; charset=punycode",
        "multipart/form-data; charset=utf-16; boundary=x",
        'multipart/form-data; boundary=x; charset="utf_7"',
        "multipart/form-data; boundary=x; CHARSET = idna",
        "multipart/form-data; boundary=x; charset=utf-8; charset=unicode_escape",
        "multipart/form-data; boundary=x" + "".join(f"; p{k}=1" for k in range(99)) + "; charset=punycode",
        'multipart/form-data; boundary=x; p="a;b"; charset=punycode',
    ],
)
def test_texts_are_utf8_only(client, content_type):
    content = b'--x\r\ncontent-disposition: form-data; name="prompt"\r\n\r\nnight\r\n--x--\r\n'
    answer = client.post("/v1/images/edits", content=content, headers=AUTHORIZED | {"content-type": content_type})
    assert answer.status_code == 415
    assert "send utf-8" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{" + b",".join(b'"k%d":1' % k for k in range(10**5)) + b"}", "strings"),
        (b'{"image":[' + b"[]," * 10**6 + b"[]]}", "outside of strings"),
        (b"[" * 10**5, "outside of strings"),
        (b"[" * 50 + b"]" * 50, "nested"),
        (b'{"a":{"b":[{"c":[[[[[{}]]]]]}]}}', "nested"),
        (b'{"\\"":' + b" " * 10**5 + b"1}", "outside of strings"),
        (b'"' * 10**5, "strings"),
        (b"1" * 10**5, "outside of strings"),
        (HIDDEN.encode("utf-16"), "not UTF-8"),
        (HIDDEN.encode("utf-16-le"), "not UTF-8"),
        ('{"image":"x"}'.encode("utf-32"), "not UTF-8"),
    ],
)
def test_json_is_bounded_before_it_is_parsed(client, body, says):
    answer = client.post("/v1/edits", content=body, headers=AUTHORIZED | {"content-type": "application/json"})
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=12,
    ),
    st.booleans(),
)
def test_bounds_of_json_ignore_what_strings_hold(value, ascii_only):
    def depth(value) -> int:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        return 0 if inner is None else 1 + max(map(depth, inner), default=0)

    body = json.dumps({"text": '[[[[[[[[[[ \\" {{{{{{{{{{', "value": value}, ensure_ascii=ascii_only)
    if depth(value) < MAX_DEPTH:
        check_json(body.encode("utf-8", "surrogatepass"))
    else:
        with pytest.raises(RefusedError, match="nested"):
            check_json(body.encode("utf-8", "surrogatepass"))


def test_largest_usual_request_is_within_the_bounds_of_json():
    edit = dict.fromkeys(Edit.model_fields, "x" * 20) | {"instruction": '{"[:,' * 400}
    check_json(json.dumps({"image": "A" * 10**6, "edits": [edit] * MAX_EDITS}, indent=4).encode())


def test_a_refused_request_costs_nothing():
    client = make_client([make_key("few", TOKEN, edits_per_minute=2)])
    body = {"image": "x", "edits": [{"instruction": "x"}], "model": "nothing"}
    assert [client.post("/v1/edits", json=body, headers=AUTHORIZED).status_code for _ in range(5)] == [404] * 5
    assert client.post("/v1/feedback", json={}, headers=AUTHORIZED).status_code == 400
    assert client.get("/v1/defaults", headers=AUTHORIZED).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "localhost", "origin": "http://localhost", "sec-fetch-site": "same-origin"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "127.0.0.1@evil.example"}, 403),
        ({"host": "[::1"}, 403),
        ({"host": ""}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://localhost:1234"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://["}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
    ],
)
def test_open_endpoint_serves_no_page_of_another_site(headers, status):
    assert make_client(keys=None).get("/v1/defaults", headers=headers).status_code == status


def test_open_endpoint_refuses_a_peer_without_an_address():
    assert make_client(keys=None, host="").get("/v1/defaults").status_code == 403


@pytest.mark.parametrize("path", ["/", "/healthz", "/v1/defaults", "/nothing", "/static/page.js"])
def test_every_answer_has_the_security_headers(client, path):
    headers = client.get(path, headers=AUTHORIZED).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]


def test_nothing_is_loaded_from_elsewhere(client):
    assert client.get("/docs", headers=AUTHORIZED).status_code == 404
    for path in STATIC_FILES:
        assert not re.search(r"(src|href)=.?https?:|import .*https?:", client.get(path).text)


@pytest.mark.parametrize("path", ["/", "/healthz", "/v1/models", "/openapi.json"])
def test_head_is_get_without_a_body(client, path):
    got, head = client.get(path, headers=AUTHORIZED), client.head(path, headers=AUTHORIZED)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(got.content))


def test_options_names_the_methods_of_a_path(client):
    answer = client.options("/v1/edits", headers=AUTHORIZED)
    assert (answer.status_code, answer.headers["allow"]) == (204, "POST")


def test_a_model_is_described_by_its_name(client):
    (listed,) = client.get("/v1/models", headers=AUTHORIZED).json()["data"]
    assert client.get("/v1/models/shipped", headers=AUTHORIZED).json() == listed
    assert client.get("/v1/models/nothing", headers=AUTHORIZED).status_code == 404


def test_a_bug_is_answered_as_ours_and_tells_nothing(monkeypatch):
    client = make_client()
    monkeypatch.setattr("serve.routers.info._model", lambda *_: 1 / 0)
    client = TestClient(client.app, "http://localhost", client=("127.0.0.1", 1), raise_server_exceptions=False)
    answer = client.get("/v1/models", headers=AUTHORIZED)
    assert (answer.status_code, answer.headers["x-content-type-options"]) == (500, "nosniff")
    assert answer.json()["error"]["type"] == "server_error"
    assert "division" not in answer.text


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


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("steps", "99999999", "did you mean num_inference_steps?"),
        ("guidance", "3", "did you mean guidance_scale?"),
        ("seeds", "3", "did you mean seed?"),
        ("zzzzz", "3", "unknown field"),
        ("stream", "true", "POST /v1/edits streams"),
        ("partial_images", "2", "preview_every"),
        ("quality", "high", "num_inference_steps"),
        ("input_fidelity", "high", "image_guidance_scale"),
        ("background", "transparent", "'auto' or 'opaque'"),
        ("output_compression", "101", "less than or equal to 100"),
    ],
)
def test_a_form_field_without_effect_is_refused_by_name(client, field, value, says):
    form = {"prompt": "night", field: value}
    answer = client.post("/v1/images/edits", files={"image": b"x"}, data=form, headers=AUTHORIZED)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, field)
    assert error["message"].startswith(f"{field}: ") and says in error["message"]


@pytest.mark.parametrize("name", ["image", "image[]", "image[0]", "image[12]", "images", "images[]"])
def test_every_name_of_the_image_field_is_read(client, name):
    answer = client.post("/v1/images/edits", files={name: b"x"}, data={"prompt": "night"}, headers=AUTHORIZED)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image")
    assert "not an image" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("name", "status"), [("image[x]", 400), ("pictures", 400)])
def test_another_name_is_not(client, name, status):
    answer = client.post("/v1/images/edits", files={name: b"x"}, data={"prompt": "night"}, headers=AUTHORIZED)
    assert answer.status_code == status
    assert "image: " in answer.json()["error"]["message"]
