"""The endpoint on real Ray Serve over real HTTP, with a tiny editor of SD 1.5's layout and keys."""

import base64
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from PIL import Image
from skimage import data

from ip2p import images
from ip2p.edit.editor import Editor, EditRequest
from ip2p.errors import UserError
from ip2p.models import load_text_to_image
from ip2p.workspace import Workspace
from serve.app import start
from serve.feedback import image_id
from serve.schema import MAX_BODY_BYTES, MAX_IMAGE_BYTES
from tests.serve import requests_of_fuzz as fuzz
from tests.serve.conftest import TOKEN, make_key, metric, replicas, saved, served

PHOTO = data.chelsea()[:150, :201]
PNG = images.encode(PHOTO)
SLOW, FEW = "a key for few at once", "a key for few a minute"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def address(recipe, workspace, local_ray):
    keys = [
        make_key("tests", TOKEN, edits_per_minute=10**6, concurrent_edits=10**4),
        make_key("slow", SLOW, concurrent_edits=2),
        make_key("few", FEW, edits_per_minute=3),
    ]
    with served(recipe, workspace, keys) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with httpx.Client(base_url=address, timeout=120, headers={"authorization": f"Bearer {TOKEN}"}) as client:
        yield client


@pytest.fixture(scope="module")
def editor(recipe):
    return Editor(load_text_to_image(recipe.models.editor, device="cpu"), max_side=64)


def post(client: httpx.Client, image: bytes = PNG, **fields) -> httpx.Response:
    fields = {"prompt": "make it night", "seed": 3} | fields
    form = {key: str(value) for key, value in fields.items() if value is not None}
    return client.post("/v1/images/edits", files={"image": ("photo", image)}, data=form)


def body(*edits: dict, image: bytes = PNG, **fields) -> dict:
    return {
        "image": base64.b64encode(image).decode(),
        "edits": [{"instruction": "make it night"} | edit for edit in edits],
    } | fields


def events(client: httpx.Client, content: dict) -> list[tuple[str, dict]]:
    with client.stream("POST", "/v1/edits", json=content | {"stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        blocks = "".join(answer.iter_text()).strip().split("\n\n")
    parts = [dict(line.split(": ", 1) for line in block.splitlines()) for block in blocks]
    return [(part["event"], json.loads(part["data"])) for part in parts]


def near(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and np.abs(one.astype(int) - other).max() <= 2


def idle(client: httpx.Client) -> bool:
    """Return whether no edit is in flight within 30 s."""
    for _ in range(300):
        if metric(client, "ip2p_serve_edits_in_flight") == 0:
            return True
        time.sleep(0.1)
    return False


# ---- POST /v1/images/edits


def test_answer_is_the_editors_image(client, editor):
    answer = post(client, guidance_scale=4, image_guidance_scale=1.2, num_inference_steps=3, negative_prompt="stars")
    assert answer.status_code == 200, answer.text
    body = answer.json()
    result = images.decode(base64.b64decode(body["data"][0]["b64_json"]))
    (expected,) = editor.edit([EditRequest(PHOTO, "make it night", 4, 1.2, steps=3, seed=3, negative_prompt="stars")])
    assert near(result, expected)
    assert {key: body[key] for key in ("seed", "guidance_scale", "image_guidance_scale", "num_inference_steps")} == {
        "seed": 3, "guidance_scale": 4, "image_guidance_scale": 1.2, "num_inference_steps": 3,
    }  # fmt: skip


def test_same_seed_gives_same_image_and_drawn_seed_is_returned(client):
    first = post(client, seed=None, response_format="png")
    again = post(client, seed=first.headers["x-seed"], response_format="png")
    other = post(client, seed=None, response_format="png")
    assert first.headers["content-type"] == "image/png"
    assert np.array_equal(images.decode(first.content), images.decode(again.content))
    assert not np.array_equal(images.decode(first.content), images.decode(other.content))


def test_openai_client_works(address):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key=TOKEN)
    answer = client.images.edit(
        model="editor", image=("a.png", PNG, "image/png"), prompt="make it night", extra_body={"seed": 3}
    )
    assert images.decode(base64.b64decode(answer.data[0].b64_json)).shape == PHOTO.shape
    several = client.images.edit(
        image=[("a.png", PNG, "image/png"), ("b.jpg", images.encode(PHOTO[:, :60], "jpeg"), "image/jpeg")],
        prompt="make it night",
        n=2,
        size="1024x1024",
        output_format="webp",
        user="somebody",
    )
    results = [base64.b64decode(one.b64_json) for one in several.data]
    assert all(result[8:12] == b"WEBP" for result in results)
    assert [images.decode(result).shape[:2] for result in results] == [(764, 1024)] * 2 + [(1024, 410)] * 2
    assert [model.id for model in client.models.list()] == ["shipped"]
    with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer"):
        openai.OpenAI(base_url=f"{address}/v1", api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError, match="shipped"):
        client.images.edit(model="nothing", image=("a.png", PNG, "image/png"), prompt="make it night")


def test_transparency_orientation_formats_and_odd_sizes_are_kept(client):
    alpha = np.full(PHOTO.shape[:2], 255, np.uint8)
    alpha[:40] = 0
    transparent = images.encode(PHOTO, alpha=alpha)
    answer = post(client, transparent, response_format="png")
    assert np.array_equal(images.decode_alpha(answer.content), alpha)
    webp = post(client, transparent, output_format="webp").json()["data"][0]["b64_json"]
    assert np.array_equal(images.decode_alpha(base64.b64decode(webp)), alpha)
    assert "jpeg can't hold" in post(client, transparent, output_format="jpeg").json()["error"]["message"]
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right makes it upright
    turned = post(client, saved(Image.fromarray(PHOTO), "JPEG", exif=exif), response_format="png")
    assert images.decode(turned.content).shape == (201, 150, 3)
    for size in ((1, 1), (7, 300)):
        tiny = post(client, saved(Image.new("L", size), "PNG"), response_format="png")
        assert images.decode(tiny.content).shape == (size[1], size[0], 3)


# ---- POST /v1/edits

MIXED = [
    {"seed": 1},
    {"seed": 2, "num_inference_steps": 5, "guidance_scale": 3.0, "solver": "ddim"},
    {"seed": 3, "num_inference_steps": 1, "image_guidance_scale": 0.5},
    {"seed": 4, "num_inference_steps": 4, "solver": "dpmsolver++", "negative_prompt": "stars"},
    {"seed": 5, "instruction": "make it day"},
    {"seed": 6, "num_inference_steps": 7},
]


def test_batched_edits_equal_single_edits(client, editor):
    answer = client.post("/v1/edits", json=body(*MIXED))
    assert answer.status_code == 200, answer.text
    edits = answer.json()["edits"]
    assert [edit["index"] for edit in edits] == list(range(len(MIXED)))
    for edit, asked in zip(edits, MIXED, strict=True):
        assert asked.items() <= edit.items()
        settings = {"steps": edit["num_inference_steps"], "solver": edit["solver"], "seed": edit["seed"]}
        scales = {key: edit[key] for key in ("guidance_scale", "image_guidance_scale", "negative_prompt")}
        (alone,) = editor.edit([EditRequest(PHOTO, edit["instruction"], **settings, **scales)])
        assert near(images.decode(base64.b64decode(edit["image"])), alone)


def test_stream_sends_progress_previews_and_results(client):
    content = body({"seed": 1, "num_inference_steps": 12}, {"seed": 2, "num_inference_steps": 4}, preview_every=1)
    heard = events(client, content | {"image": "data:image/png;base64," + content["image"]})
    assert heard[-1] == ("done", {})
    results = [data for event, data in heard if event == "result"]
    assert [data["index"] for data in results] == [1, 0], "the shorter one does not wait"
    for result in results:
        assert images.decode(base64.b64decode(result["image"])).shape == PHOTO.shape
    steps = [data["step"] for event, data in heard if event == "progress" and data["index"] == 0]
    assert steps == sorted(set(steps))
    assert set(steps) <= set(range(1, 13))
    previews = [data for event, data in heard if event == "preview"]
    shown = {(data["index"], data["step"]) for data in previews}
    assert shown and shown <= {(0, s) for s in (2, 4, 6, 8, 10)} | {(1, s) for s in (1, 2, 3)}, (
        "an edit has at most ten, and unsent ones are replaced by newer ones"
    )
    assert {data["output_format"] for data in previews} == {"jpeg"}
    assert images.decode(base64.b64decode(previews[0]["image"])).ndim == 3
    (plain,) = client.post("/v1/edits", json=body({"seed": 2, "num_inference_steps": 4})).json()["edits"]
    assert near(images.decode(base64.b64decode(plain["image"])), images.decode(base64.b64decode(results[0]["image"])))


def test_disconnected_client_frees_its_capacity(client):
    content = body(*[{"num_inference_steps": 100}] * 3, stream=True)
    with client.stream("POST", "/v1/edits", json=content) as answer:
        next(answer.iter_text())
    before = time.monotonic()
    assert post(client, num_inference_steps=1).status_code in (200, 429)
    assert idle(client)
    made = metric(client, "ip2p_serve_edits_total")
    assert post(client, num_inference_steps=1).status_code == 200
    assert metric(client, "ip2p_serve_edits_total") == made + 1, f"{time.monotonic() - before:.1f} s: all were made"


def test_deadlines_are_honoured(client):
    answer = client.post("/v1/edits", json=body(*[{"num_inference_steps": 100}] * 3, deadline_s=0.05))
    assert answer.status_code == 408
    assert "allow more seconds" in answer.json()["error"]["message"]
    heard = events(client, body({"num_inference_steps": 100}, deadline_s=0.05))
    assert [event for event, _ in heard][-2:] == ["error", "done"]
    assert idle(client)


# ---- feedback


def test_feedback_is_stored_with_the_edits_settings(client, workspace):
    (edit,) = client.post("/v1/edits", json=body({"seed": 9, "guidance_scale": 3.5})).json()["edits"]
    answer = client.post("/v1/feedback", json={"edit_id": edit["edit_id"], "choice": "up", "comment": "as I meant it"})
    assert answer.status_code == 204
    assert answer.content == b""
    again = post(client, seed=9)
    client.post("/v1/feedback", json={"edit_id": again.json()["data"][0]["edit_id"], "choice": "down"})
    rows = {row["choice"]: row for row in workspace.read_table("feedback").to_pylist()}
    assert rows["up"]["edit_id"] == edit["edit_id"]
    facts = ("instruction", "seed", "steps", "guidance_scale", "image_guidance_scale", "model", "comment")
    assert [rows["up"][fact] for fact in facts] == ["make it night", 9, 2, 3.5, 1.5, "shipped", "as I meant it"]
    assert rows["up"]["source_id"] == rows["down"]["source_id"] == image_id(PHOTO)
    assert rows["up"]["result_id"] == image_id(images.decode(base64.b64decode(edit["image"])))
    opinion = {"edit_id": edit["edit_id"], "choice": "down"}
    files = len(workspace.files("feedback"))
    for _ in range(3):
        assert client.post("/v1/feedback", json=opinion).status_code == 204
    assert len(workspace.files("feedback")) == files, "the same vote counts once"
    of_another_key = client.post("/v1/feedback", json=opinion, headers={"authorization": f"Bearer {SLOW}"})
    assert of_another_key.status_code == 404
    unknown = client.post("/v1/feedback", json={"edit_id": edit["edit_id"][::-1], "choice": "up"})
    assert unknown.status_code == 404
    assert "edit_id" in unknown.json()["error"]["message"]


# ---- limits


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"image": b"not an image"}, "image", "PNG, JPEG or WebP"),
        ({"image": b""}, "image", "empty"),
        ({"image": PNG[:2000]}, "image", "whole file"),
        ({"image": saved(Image.new("1", (9000, 9000)), "PNG")}, "image", "9000x9000"),
        ({"image": PNG + b"PK\x03\x04"}, "image", "goes on"),
        ({"image": saved(Image.new("CMYK", (9, 9)), "JPEG")}, "image", "RGB"),
        ({"image": saved(Image.new("I;16", (9, 9)), "PNG")}, "image", "8 bits"),
        ({"image": saved(Image.new("L", (9, 9)), "GIF")}, "image", "PNG, JPEG or WebP"),
        ({"prompt": "  "}, "prompt", "at least 1 character"),
        ({"prompt": None}, "prompt", "required"),
        ({"prompt": "x" * 100_000}, "prompt", "at most 2000"),
        ({"negative_prompt": "x" * 100_000}, "negative_prompt", "at most 2000"),
        ({"guidance_scale": "nan"}, "guidance_scale", "finite"),
        ({"guidance_scale": "1e9"}, "guidance_scale", "less than or equal to"),
        ({"image_guidance_scale": -1}, "image_guidance_scale", "greater than or equal to"),
        ({"num_inference_steps": 0}, "num_inference_steps", "greater than or equal to 1"),
        ({"num_inference_steps": 2.5}, "num_inference_steps", "integer"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": 2**64}, "seed", "less than"),
        ({"n": 11}, "n", "less than or equal to 10"),
        ({"size": "0x5"}, "size", "WIDTHxHEIGHT"),
        ({"deadline_s": "inf"}, "deadline_s", "finite"),
        ({"response_format": "bmp"}, "response_format", "b64_json"),
        ({"output_format": "gif"}, "output_format", "webp"),
        ({"response_format": "png", "n": 2}, "response_format", "b64_json"),
    ],
)
def test_bad_form_is_rejected_with_a_reason(client, change, param, says):
    answer = post(client, **change)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert says in error["message"]
    assert len(error["message"]) < 500


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"edits": []}, "edits", "at least 1"),
        ({"edits": [{"instruction": "x"}] * 65}, "edits", "at most 64"),
        ({"edits": [{"instruction": "x", "seed": "x"}]}, "edits.0.seed", "integer"),
        ({"edits": [{"instruction": "x", "colour": "x"}]}, "edits.0.colour", "unknown field"),
        ({"image": "§"}, "image", "base64"),
        ({"image": "data:image/png,x"}, "image", "data:image/png;base64"),
        ({"preview_every": -1}, "preview_every", "greater than"),
    ],
)
def test_bad_json_is_rejected_with_a_reason(client, change, param, says):
    answer = client.post("/v1/edits", json=body({}) | change)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert says in error["message"]


def test_too_large_file_or_body_is_rejected(client):
    answer = post(client, bytes(MAX_IMAGE_BYTES + 1))
    assert answer.status_code == 413
    assert "smaller" in answer.json()["error"]["message"]
    connection = connect(client)
    connection.sendall(
        head("/v1/edits", {"content-type": "application/json", "content-length": str(MAX_BODY_BYTES + 1)})
    )
    assert b" 413 " in connection.recv(4096), "refused before any of it is sent"


def test_slow_upload_is_ended(client):
    connection = connect(client)
    connection.sendall(head("/v1/edits", {"content-type": "application/json", "content-length": "1000"}) + b"{")
    answer = connection.recv(4096)
    assert b" 408 " in answer
    assert b"did not arrive within 2 seconds" in answer + connection.recv(4096)


def connect(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=120)


def head(path: str, headers: dict[str, str]) -> bytes:
    lines = {"host": "tests", "authorization": f"Bearer {TOKEN}"} | headers
    return f"POST {path} HTTP/1.1\r\n".encode() + b"".join(f"{k}: {v}\r\n".encode() for k, v in lines.items()) + b"\r\n"


def test_wrong_types_paths_and_methods_are_rejected(client):
    wrong = client.post("/v1/images/edits", json={"prompt": "x"})
    assert wrong.status_code == 415
    assert "multipart/form-data" in wrong.json()["error"]["message"]
    missing = client.get("/v2/nothing")
    assert missing.status_code == 404
    assert "/v1/images/edits" in missing.json()["error"]["message"]
    assert client.get("/v1/images/edits").status_code == 405
    assert client.get("/v1/defaults", headers={"authorization": ""}).status_code == 401
    no_model = client.post("/v1/edits", json=body({}), headers={"x-model-version": "nothing"})
    assert no_model.status_code == 404


def test_keys_are_limited(client):
    few = {"authorization": f"Bearer {FEW}"}
    answers = [client.get("/v1/models", headers=few) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
    slow = client.post("/v1/edits", json=body({}, {}, {}), headers={"authorization": f"Bearer {SLOW}"})
    assert slow.status_code == 400
    assert "at most 2 fit" in slow.json()["error"]["message"]


def test_full_server_rejects_with_retry_after(client, recipe):
    too_many = client.post("/v1/edits", json=body(*[{}] * (recipe.serve.queue + 1)))
    assert too_many.status_code == 400, "it can never fit"
    with ThreadPoolExecutor(8) as pool:
        many = body(*[{"num_inference_steps": 20}] * 8)
        answers = list(pool.map(lambda _: client.post("/v1/edits", json=many), range(8)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    refused = answers[statuses.index(429)]
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert "edits in flight; retry later" in refused.json()["error"]["message"]
    assert idle(client)


@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(call=fuzz.MALFORMED)
def test_malformed_requests_are_rejected_with_a_message(client, call):
    fuzz.check(client, call)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(call=fuzz.DAMAGED)
def test_damaged_pictures_are_edited_or_rejected(client, call):
    fuzz.check_damaged(client, call)


# ---- facts


def test_health_defaults_static_files_and_docs_are_served(client):
    assert client.get("/healthz").json() == client.get("/readyz").json() == {"status": "ok", "model": "shipped"}
    defaults = client.get("/v1/defaults").json()
    assert defaults["num_inference_steps"] == 2
    assert defaults["limits"]["max_image_bytes"] == MAX_IMAGE_BYTES
    described = client.get("/openapi.json").json()
    fields = described["components"]["schemas"]["EditForm"]["properties"]
    assert {"image", "prompt", "guidance_scale", "image_guidance_scale", "num_inference_steps", "seed"} <= set(fields)
    (example,) = described["components"]["schemas"]["EditsRequest"]["examples"]
    assert client.post("/v1/edits", json=example | {"stream": False}).status_code == 200
    assert "ip2p_serve_edit_seconds_bucket" in client.get("/metrics").text
    for path in ("/", "/static/page.css", "/static/page.js", "/healthz", "/readyz", "/openapi.json"):
        assert client.get(path, headers={"authorization": ""}).status_code == 200, f"{path} needs no key"


def test_no_replica_was_replaced(client, address):
    """Runs last: the replicas are the ones that started."""
    assert len(replicas("EditService")) == len(replicas("EditIngress")) == 1
    assert metric(client, "ip2p_serve_retries_total") == 0


def test_open_requires_a_loopback_address(recipe):
    with pytest.raises(UserError, match=r"127\.0\.0\.1"):
        start(recipe, None, "0.0.0.0", 0)
