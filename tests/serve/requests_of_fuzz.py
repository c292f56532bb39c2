"""Malformed requests, drawn by hypothesis: each is (method, path, headers, body), and must be answered with a 4xx."""

import base64
import json
from typing import Any

import httpx
import numpy as np
from hypothesis import strategies as st
from PIL import Image

from ip2p import images
from tests.serve.conftest import TOKEN, noise, saved

Call = dict[str, Any]  # arguments of httpx.Client.request

PHOTO = Image.fromarray(noise(40, 56, 3))
FILES = {format: saved(PHOTO, format) for format in ("PNG", "JPEG", "WEBP")}
GOOD = FILES["PNG"]
NO_PICTURES = [
    b"",
    GOOD + b"PK\x03\x04 an archive",
    FILES["JPEG"] + b"<script>alert(1)</script>",
    FILES["WEBP"] + b"%PDF-1.7",
    saved(Image.fromarray(noise(8, 8, 3)).convert("CMYK"), "JPEG"),
    saved(Image.fromarray(noise(8, 8).astype(np.uint16) * 257), "PNG"),
    saved(PHOTO, "WEBP", save_all=True, append_images=[PHOTO.rotate(90)], duration=100),
    saved(PHOTO, "PNG", save_all=True, append_images=[PHOTO.rotate(90)]),
    saved(PHOTO, "GIF"),
    saved(PHOTO, "TIFF"),
    saved(Image.new("1", (20_000, 20_000)), "PNG"),
    GOOD[:16] + bytes(8) + GOOD[24:],
    b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
]
AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}

NUMBERS = st.sampled_from(
    ["nan", "NaN", "inf", "-inf", "-1", "1e309", "-0.5", "9" * 400, "0x10", "1_0", "", " ", "½", "null", "true", "[]"]
) | st.text("abc+-_ eEñ,;{", min_size=1, max_size=20).filter(lambda text: text.strip() != "")
NUMERIC_FIELDS = st.sampled_from(
    ["guidance_scale", "image_guidance_scale", "num_inference_steps", "seed", "n", "deadline_s"]
)


def is_a_number_in_range(field: str, text: str) -> bool:
    """Whether a text of `NUMBERS` is one that the field takes after all: some are blank, i.e. left out."""
    return not text.strip() or (text == "1_0")


@st.composite
def bad_pictures(draw: st.DrawFn) -> bytes:
    format = draw(st.sampled_from(["PNG", "JPEG", "WEBP"]))
    whole = FILES[format]
    return draw(
        st.one_of(
            st.binary(max_size=600),
            st.integers(0, len(whole) * 2 // 3).map(lambda end: whole[:end]),
            st.sampled_from(NO_PICTURES),
        )
    )


def form(image: bytes | None, fields: dict[str, str], headers: dict[str, str] | None = None) -> Call:
    files = {} if image is None else {"image": ("a.png", image)}
    return {
        "method": "POST",
        "url": "/v1/images/edits",
        "headers": AUTHORIZED | (headers or {}),
        "files": files or {"nothing": ("a", b"")},
        "data": {"prompt": "make it night", "num_inference_steps": "1"} | fields,
    }


def body(content: Any, headers: dict[str, str] | None = None, url: str = "/v1/edits") -> Call:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return {
        "method": "POST",
        "url": url,
        "headers": AUTHORIZED | {"content-type": "application/json"} | (headers or {}),
        "content": data,
    }


GOOD_BODY = {
    "image": base64.b64encode(GOOD).decode(),
    "edits": [{"instruction": "make it night", "num_inference_steps": 1}],
}
JUNK = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
BAD_EDITS = st.sampled_from(
    [
        [],
        {},
        None,
        "make it night",
        [{}],
        [{"instruction": ""}],
        [{"instruction": "x" * 100_000}],
        [{"instruction": "a\ud800b"}],
        [{"instruction": 5}],
        [{"instruction": "x", "colour": "red"}],
        [{"instruction": "x", "solver": "magic"}],
        [{"instruction": "x", "num_inference_steps": 1e300}],
        [{"instruction": "x", "guidance_scale": float("nan")}],
        [{"instruction": "x", "guidance_scale": float("-inf")}],
        [{"instruction": "x", "seed": -1}],
        [{"instruction": "x", "seed": 2**70}],
        [{"instruction": "x", "num_inference_steps": 2.5}],
        [{"instruction": "x"}] * 65,
        [{"instruction": "x"}] * 17,  # more than may wait
    ]
)

MALFORMED: st.SearchStrategy[Call] = st.one_of(
    bad_pictures().map(lambda picture: form(picture, {})),
    st.tuples(NUMERIC_FIELDS, NUMBERS)
    .filter(lambda pair: not is_a_number_in_range(*pair))
    .map(lambda pair: form(GOOD, {pair[0]: pair[1]})),
    st.sampled_from(
        [
            {"prompt": ""},
            {"prompt": " \n "},
            {"prompt": "x" * 100_000},
            {"negative_prompt": "x" * 100_000},
            {"size": "0x0"},
            {"size": "100000x1"},
            {"size": "big"},
            {"response_format": "url"},
            {"response_format": "png", "n": "2"},
            {"output_format": "gif"},
            {"solver": "magic"},
            {"model": "gpt"},
            {"model": "x" * 5000},
        ]
    ).map(lambda fields: form(GOOD, fields)),
    st.just(form(None, {})),
    st.binary(max_size=300).map(
        lambda data: body(data, {"content-type": "multipart/form-data; boundary=x"}, "/v1/images/edits")
    ),
    st.text(max_size=40, alphabet=st.characters(min_codepoint=33, max_codepoint=126)).map(
        lambda kind: body(GOOD_BODY, {"content-type": kind or "text/plain"}, "/v1/images/edits")
    ),
    st.binary(max_size=300).map(body),
    JUNK.map(body),
    BAD_EDITS.map(lambda edits: body(GOOD_BODY | {"edits": edits})),
    bad_pictures().map(lambda picture: body(GOOD_BODY | {"image": base64.b64encode(picture).decode()})),
    st.text(max_size=50)
    .filter(lambda text: max(text, default="") < "\ud800")
    .map(lambda text: body(GOOD_BODY | {"image": f"data:{text}"})),
    st.sampled_from([b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b'{"image": 1e999999}', b"9" * 10_000]).map(body),
    st.text(max_size=60).filter(lambda text: text.isprintable()).map(
        lambda text: body({"edit_id": text, "choice": "up"}, url="/v1/feedback")
    ),
    JUNK.map(lambda junk: body({"edit_id": "x", "choice": junk}, url="/v1/feedback")),
    st.text(max_size=30, alphabet=st.characters(min_codepoint=33, max_codepoint=126)).map(
        lambda token: body(GOOD_BODY, {"authorization": f"Bearer x{token}"})
    ),
    st.text(min_size=1, max_size=30, alphabet="abcxyz0123456789._-~").map(
        lambda path: {"method": "GET", "url": f"/v1/nothing{path}", "headers": AUTHORIZED}
    ),
    st.sampled_from(["PUT", "DELETE", "PATCH"]).map(
        lambda method: {"method": method, "url": "/v1/edits", "headers": AUTHORIZED, "content": b"{}"}
    ),
    st.just(body(GOOD_BODY, {"x-model-version": "nothing"})),
)  # fmt: skip


def check(client: httpx.Client, call: Call) -> None:
    """Refused, with a message that a person can act on, and nothing of the input beyond a glimpse in it."""
    answer = client.request(**call)
    context = (answer.status_code, answer.text[:300], {key: str(value)[:300] for key, value in call.items()})
    assert 400 <= answer.status_code < 500, context
    message = answer.json()["error"]["message"]
    assert 10 < len(message) < 1500, context


def damaged(draw: st.DrawFn) -> bytes:
    """A picture with some bytes changed: it may still be one."""
    whole = bytearray(FILES[draw(st.sampled_from(["PNG", "JPEG", "WEBP"]))])
    for _ in range(draw(st.integers(1, 8))):
        whole[draw(st.integers(0, len(whole) - 1))] = draw(st.integers(0, 255))
    return bytes(whole)


DAMAGED = st.composite(damaged)().map(lambda picture: form(picture, {}))


def check_damaged(client: httpx.Client, call: Call) -> None:
    answer = client.request(**call)
    assert answer.status_code < 500, answer.text[:300]
    if answer.status_code == 200:
        (edited,) = answer.json()["data"]
        images.decode(base64.b64decode(edited["b64_json"]))
