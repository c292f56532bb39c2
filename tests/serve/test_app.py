"""The endpoint on real Ray Serve over real HTTP, with a tiny editor of SD 1.5's layout."""

import base64
import io
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from ray import serve
from skimage import data

from ip2p import images
from ip2p.edit.editor import Editor, EditRequest
from ip2p.models import load_text_to_image
from serve.app import start
from serve.schema import MAX_IMAGE_BYTES
from tests.evaluate.synthetic import make_recipe

PHOTO = data.chelsea()[:150, :201]


@pytest.fixture(scope="module")
def recipe(tiny_sd, tiny_editor):
    return make_recipe(
        device="cpu",
        models={
            "text_to_image": {"path": str(tiny_sd)},
            "clip": {"name": "ViT-B-32", "pretrained": "openai"},
            "llm": {"path": str(tiny_sd)},
            "editor": {"path": str(tiny_editor)},
        },
        sampling={"steps": 2, "max_side": 64},
    )


@pytest.fixture(scope="module")
def address(recipe, local_ray):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start(recipe, None, "127.0.0.1", port)
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def client(address):
    with httpx.Client(base_url=address, timeout=120) as client:
        yield client


def post(client: httpx.Client, image: bytes = images.encode(PHOTO), **fields) -> httpx.Response:
    fields = {"prompt": "make it night", "seed": 3} | fields
    form = {key: str(value) for key, value in fields.items() if value is not None}
    return client.post("/v1/images/edits", files={"image": ("photo", image)}, data=form)


def saved(picture: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def test_answers_with_what_the_editor_makes(client, recipe):
    answer = post(client, guidance_scale=4, image_guidance_scale=1.2, num_inference_steps=3)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    result = images.decode(base64.b64decode(body["data"][0]["b64_json"]))
    editor = Editor(load_text_to_image(recipe.models.editor, device="cpu"), max_side=64)
    (expected,) = editor.edit([EditRequest(PHOTO, "make it night", 4, 1.2, steps=3, seed=3)])
    assert result.shape == PHOTO.shape
    assert np.abs(result.astype(int) - expected).max() <= 2
    assert {key: body[key] for key in ("seed", "guidance_scale", "image_guidance_scale", "num_inference_steps")} == {
        "seed": 3, "guidance_scale": 4, "image_guidance_scale": 1.2, "num_inference_steps": 3,
    }  # fmt: skip


def test_the_same_seed_gives_the_same_image_and_a_drawn_one_is_told(client):
    first = post(client, seed=None, response_format="png")
    again = post(client, seed=first.headers["x-seed"], response_format="png")
    other = post(client, seed=None, response_format="png")
    assert first.headers["content-type"] == "image/png"
    assert np.array_equal(images.decode(first.content), images.decode(again.content))
    assert not np.array_equal(images.decode(first.content), images.decode(other.content))


def test_the_openai_client_works(address):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    answer = client.images.edit(
        model="editor",
        image=("a.png", images.encode(PHOTO), "image/png"),
        prompt="make it night",
        extra_body={"seed": 3},
    )
    assert images.decode(base64.b64decode(answer.data[0].b64_json)).shape == PHOTO.shape


def test_transparency_orientation_and_odd_sizes_are_kept(client):
    alpha = np.full(PHOTO.shape[:2], 255, np.uint8)
    alpha[:40] = 0
    answer = post(client, images.encode(PHOTO, alpha=alpha), response_format="png")
    assert np.array_equal(images.decode_alpha(answer.content), alpha)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right makes it upright
    turned = post(client, saved(Image.fromarray(PHOTO), "JPEG", exif=exif), response_format="png")
    assert images.decode(turned.content).shape == (201, 150, 3)
    for size in ((1, 1), (7, 300)):
        tiny = post(client, saved(Image.new("L", size), "PNG"), response_format="png")
        assert images.decode(tiny.content).shape == (size[1], size[0], 3)


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"image": b"not an image"}, "image", "PNG, JPEG or WebP"),
        ({"image": b""}, "image", "empty"),
        ({"image": images.encode(PHOTO)[:2000]}, "image", "whole file"),
        ({"image": saved(Image.new("1", (9000, 9000)), "PNG")}, "image", "9000x9000"),
        ({"prompt": "  "}, "prompt", "at least 1 character"),
        ({"prompt": None}, "prompt", "required"),
        ({"prompt": "x" * 100_000}, "prompt", "at most 2000"),
        ({"guidance_scale": "nan"}, "guidance_scale", "finite"),
        ({"guidance_scale": "1e9"}, "guidance_scale", "less than or equal to"),
        ({"image_guidance_scale": -1}, "image_guidance_scale", "greater than or equal to"),
        ({"num_inference_steps": 0}, "num_inference_steps", "greater than or equal to 1"),
        ({"num_inference_steps": 2.5}, "num_inference_steps", "integer"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"response_format": "bmp"}, "response_format", "b64_json"),
    ],
)
def test_bad_input_is_refused_with_a_reason(client, change, param, says):
    answer = post(client, **change)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert says in error["message"]
    assert len(error["message"]) < 500


def test_too_large_a_file_is_refused(client):
    answer = post(client, bytes(MAX_IMAGE_BYTES + 1))
    assert answer.status_code == 413
    assert "smaller" in answer.json()["error"]["message"]


def test_no_form_and_wrong_paths_are_told(client):
    assert client.post("/v1/images/edits", json={"prompt": "x"}).json()["error"]["param"] == "image"
    missing = client.get("/v2/nothing")
    assert missing.status_code == 404
    assert "/v1/images/edits" in missing.json()["error"]["message"]
    assert client.get("/v1/images/edits").status_code == 405


def test_requests_at_once_get_each_its_own_image(client):
    alone = [
        images.decode(post(client, seed=k, num_inference_steps=1 + k, response_format="png").content) for k in range(5)
    ]
    with ThreadPoolExecutor(5) as pool:
        answers = pool.map(lambda k: post(client, seed=k, num_inference_steps=1 + k, response_format="png"), range(5))
        together = [images.decode(answer.content) for answer in answers]
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 2


def test_health_defaults_page_and_docs(client):
    assert client.get("/healthz").json() == {"status": "ok", "model": "shipped"}
    assert client.get("/v1/defaults").json()["num_inference_steps"] == 2
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "http://" not in page.text
    assert "https://" not in page.text, "the page needs no other server"
    fields = client.get("/openapi.json").json()["components"]["schemas"]["EditForm"]["properties"]
    assert {"image", "prompt", "guidance_scale", "image_guidance_scale", "num_inference_steps", "seed"} <= set(fields)
