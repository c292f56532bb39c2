"""Uploads and results as pictures; no server."""

import asyncio
import base64
import re

import numpy as np
import pytest

from ip2p import images
from ip2p.edit.editor import EditRequest
from serve.engine_client import Description, EditResult
from serve.errors import RefusedError
from serve.feedback import image_id, read_edit_id
from serve.pictures import Pictures, Source, Upload, choose_format, from_base64, output_size
from serve.schema import MAX_IMAGE_BYTES, AskedFormat
from tests.serve.conftest import noise

PHOTO = noise(30, 50, 3)
ALPHA = noise(30, 50)
SECRET = bytes(32)
PICTURES = Pictures(max_pixels=10_000, secret=SECRET)


@pytest.mark.parametrize(
    ("size", "expected"),
    [("auto", (30, 50)), ("100x100", (60, 100)), ("1000x15", (15, 25)), ("1x1", (1, 1))],
)
def test_output_size_keeps_the_aspect(size, expected):
    assert output_size(size, PHOTO, 10_000) == expected


@pytest.mark.parametrize("size", ["", "100", "0x5", "5x0", "4097x1", "99999x1", "-1x5", "axb"])
def test_unreadable_output_size_is_rejected(size):
    with pytest.raises(RefusedError, match="WIDTHxHEIGHT") as refused:
        output_size(size, PHOTO, 10_000)
    assert (refused.value.status, refused.value.param) == (400, "size")


def test_base64_is_read_plain_wrapped_and_as_data_url():
    text = base64.b64encode(b"a picture").decode()
    for given in (text, f"{text[:5]}\n {text[5:]}", f"data:image/png;base64,{text}"):
        assert from_base64(given) == b"a picture"
    for wrong, says in (("§", "not base64"), ("abc", "not base64"), ("data:image/png,x", "data: URL")):
        with pytest.raises(RefusedError, match=says):
            from_base64(wrong)


def test_base64_with_spaces_is_read_in_linear_time_and_memory():
    data = noise(2**20).tobytes()
    text = " ".join(re.findall("..", base64.b64encode(data).decode()))
    assert from_base64(text) == data


def decoded(data: bytes, output_format: AskedFormat, **options) -> Source:
    async def decode() -> Source:
        return await PICTURES.decode("", await PICTURES.inspect("", data), output_format, **options)

    return asyncio.run(decode())


def test_transparent_upload_is_decoded_unless_the_output_is_jpeg():
    data = images.encode(PHOTO, alpha=ALPHA)
    source = decoded(data, "png")
    rgb, alpha = images.decode_with_alpha(data)
    assert np.array_equal(source.rgb, rgb) and np.array_equal(source.alpha, alpha)
    assert np.array_equal(source.alpha, ALPHA)
    assert decoded(data, "jpeg", opaque=True).alpha is None
    with pytest.raises(RefusedError, match="transparency") as refused:
        decoded(data, "jpeg")
    assert refused.value.param == "output_format"


@pytest.mark.parametrize(
    ("format", "alpha", "asked", "answered"),
    [
        ("png", None, "auto", "png"),
        ("png", ALPHA, "auto", "png"),
        ("jpeg", None, "auto", "jpeg"),
        ("webp", None, "auto", "jpeg"),
        ("webp", ALPHA, "auto", "png"),
        ("jpeg", None, "png", "png"),
        ("png", None, "webp", "webp"),
    ],
)
def test_output_format_follows_the_upload_unless_asked(format, alpha, asked, answered):
    assert decoded(images.encode(PHOTO, format, alpha), asked).output_format == answered


def test_large_png_is_answered_with_a_jpeg():
    assert choose_format("auto", Upload(b"\x89PNG", 2**20 + 1), transparent=False) == "jpeg"
    assert choose_format("auto", Upload(b"\x89PNG", 2**20 + 1), transparent=True) == "png"


@pytest.mark.parametrize(
    ("data", "status"),
    [(b"text", 400), (images.encode(noise(101, 100, 3)), 400), (bytes(MAX_IMAGE_BYTES + 1), 413)],
    ids=["no picture", "too many pixels", "too many bytes"],
)
def test_bad_upload_is_rejected(data, status):
    for given in (data, base64.b64encode(data).decode()):
        with pytest.raises(RefusedError, match="image: ") as refused:
            asyncio.run(PICTURES.inspect("", given))
        assert refused.value.status == status


def test_size_beyond_the_most_pixels_is_rejected():
    with pytest.raises(RefusedError, match="more than 10000 pixels") as refused:
        output_size("400x400", PHOTO, 10_000)
    assert (refused.value.status, refused.value.param) == (400, "size")


def test_result_has_the_size_and_transparency_of_the_source_and_an_id_of_its_settings():
    request = EditRequest(noise(16, 24, 3), "make it night", 4.0, 1.2, steps=7, seed=5)
    result = EditResult(noise(16, 24, 3), Description("one@12", 24, 8), waited=0.0)
    source = Source(PHOTO, ALPHA, "png")
    file, edit_id = asyncio.run(PICTURES.finish("shop", request, source, result, (30, 50)))
    assert images.decode(file).shape == (30, 50, 3)
    assert np.array_equal(images.decode_alpha(file), ALPHA)
    record = read_edit_id(edit_id, SECRET)
    assert record is not None
    assert (record["instruction"], record["steps"], record["seed"]) == ("make it night", 7, 5)
    assert (record["source_id"], record["model"], record["client"]) == (image_id(PHOTO), "one@12", "shop")
    assert record["result_id"] == image_id(images.resize(result.image, 30, 50))


def test_quality_makes_smaller_files():
    request = EditRequest(noise(16, 24, 3), "make it night")
    result = EditResult(noise(16, 24, 3), Description("one@12", 24, 8), waited=0.0)
    for format in ("jpeg", "webp"):
        source = Source(PHOTO, None, format)
        full, small = (
            asyncio.run(PICTURES.finish("", request, source, result, (30, 50), quality))[0] for quality in (None, 20)
        )
        assert len(small) < len(full) / 2
