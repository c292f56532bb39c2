import contextlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from ip2p import images
from ip2p.errors import UserError

PHOTOS = Path(skimage.__file__).parent / "data"
RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def save(picture: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("astronaut.png", (512, 512, 3)),
        ("coffee.png", (400, 600, 3)),
        ("chelsea.png", (300, 451, 3)),
        ("camera.png", (512, 512, 3)),  # greyscale
        ("rocket.jpg", (427, 640, 3)),
        ("logo.png", (500, 500, 3)),  # transparent
        ("retina.jpg", (1411, 1411, 3)),
        ("no_time_for_that_tiny.gif", (25, 14, 3)),  # animated, palette
    ],
)
def test_photographs_of_all_kinds_decode(name, shape):
    image = images.decode((PHOTOS / name).read_bytes())
    assert image.shape == shape
    assert image.dtype == np.uint8
    assert image.std() > 5


@pytest.mark.parametrize("format", ["png", "webp"])
def test_lossless_formats_round_trip(format):
    assert np.array_equal(images.decode(images.encode(RGB, format)), RGB)


def test_jpeg_round_trips_a_photograph_nearly():
    photo = images.decode((PHOTOS / "chelsea.png").read_bytes())
    again = images.decode(images.encode(photo, "jpeg"))
    assert np.abs(again.astype(int) - photo).mean() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    # The way from the stored pixels to the upright image, by the EXIF standard.
    upright = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.swapaxes(0, 1),
        6: np.rot90(RGB, -1),
        7: RGB[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(RGB),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(Image.fromarray(RGB), "PNG", exif=exif)
    assert np.array_equal(images.decode(data), upright[orientation])


def test_transparency_lies_over_white_and_can_be_put_back():
    alpha = np.tile(np.linspace(0, 255, 9).astype(np.uint8), (6, 1))
    data = images.encode(RGB, "png", alpha=alpha)
    seen = images.decode(data)
    assert (seen[:, 0] == 255).all()
    assert np.array_equal(seen[:, -1], RGB[:, -1])
    assert np.array_equal(images.decode_alpha(data), alpha)
    assert images.decode_alpha(images.encode(RGB)) is None
    with pytest.raises(ValueError, match="png or webp"):
        images.encode(RGB, "jpeg", alpha=alpha)


def test_opacity_turns_with_the_image():
    alpha = np.arange(54, dtype=np.uint8).reshape(6, 9)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = save(Image.fromarray(np.dstack([RGB, alpha])), "PNG", exif=exif)
    assert np.array_equal(images.decode_alpha(data), np.rot90(alpha, -1))


def test_palette_with_a_transparent_entry():
    picture = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    picture.putpalette([255, 0, 0, 0, 255, 0])
    seen = images.decode(save(picture, "PNG", transparency=1))
    assert seen.tolist() == [[[255, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("value", [0, 1000, 32768, 65535])
def test_sixteen_bits_are_scaled_not_clipped(value):
    data = save(Image.fromarray(np.full((3, 4), value, dtype=np.uint16)), "PNG")
    assert (images.decode(data) == round(value / 257)).all()


def test_float_tiff():
    data = save(Image.fromarray(np.full((3, 4), 0.5, dtype=np.float32)), "TIFF")
    assert (images.decode(data) == 128).all()


def test_cmyk_jpeg():
    data = save(
        Image.fromarray(np.full((16, 16, 3), (200, 30, 40), dtype=np.uint8)).convert("CMYK"), "JPEG", quality=98
    )
    assert np.abs(images.decode(data).astype(int) - (200, 30, 40)).max() < 12


def test_black_and_white_and_grey_with_alpha():
    assert images.decode(save(Image.new("1", (5, 4), 1), "PNG")).tolist() == np.full((4, 5, 3), 255).tolist()
    assert images.decode(save(Image.new("LA", (5, 4), (0, 0)), "PNG")).min() == 255


def test_a_colour_profile_is_turned_into_srgb_and_a_broken_one_ignored():
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for profile in (b"no profile", lab):
        assert np.array_equal(images.decode(save(Image.fromarray(RGB), "PNG", icc_profile=profile)), RGB)


def test_animations_give_their_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for format in ("GIF", "WEBP"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = save(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert images.decode(data)[0, 0].tolist() == [255, 0, 0]


def test_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch):
    data = save(Image.new("1", (3000, 2000)), "PNG")
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="3000x2000, more than 1000000 pixels"):
        images.decode(data, max_pixels=1_000_000)


def test_a_bomb_beyond_pillows_own_limit_is_refused():
    # Valid headers that promise a million pixels a side, and no pixels.
    header = b"IHDR" + struct.pack(">IIBBBBB", 10**6, 10**6, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT"]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )
    with pytest.raises(ValueError, match="send a smaller version"):
        images.decode(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"hello", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
)
def test_what_is_no_image_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        images.decode(data)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damaged_files_raise_value_error_and_nothing_else(format):
    whole = save(Image.fromarray(RGB), format)
    with pytest.raises(ValueError, match="send"):
        images.decode(whole[: len(whole) // 2])
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), 4):
            damaged[at] = rng.integers(256)
        with contextlib.suppress(ValueError):  # some damage is none to a decoder
            images.decode(bytes(damaged), max_pixels=100_000)


def test_tensors_round_trip_exactly_and_clip():
    batch = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    tensor = images.to_tensor(batch)
    assert tensor.shape == (1, 3, 16, 16)
    assert tensor.min() == -1
    assert tensor.max() == 1
    assert np.array_equal(images.to_uint8(tensor), batch)
    assert images.to_uint8(torch.tensor([-3.0, 3.0, 0.0]).view(1, 3, 1, 1)).tolist() == [[[[0, 255, 128]]]]


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (512, 512, (512, 512)),
        (1024, 512, (512, 256)),
        (300, 451, (304, 448)),
        (427, 640, (344, 512)),
        (1, 2000, (8, 512)),
        (3, 3, (8, 8)),
        (515, 515, (512, 512)),
    ],
)
def test_fit(height, width, expected):
    image = np.zeros((height, width, 3), dtype=np.uint8)
    assert images.fit(image, max_side=512, multiple=8).shape == (*expected, 3)


def test_resize_keeps_what_fits_already():
    assert images.resize(RGB, 6, 9) is RGB
    assert images.resize(RGB, 12, 4).shape == (12, 4, 3)
    assert images.resize(RGB[..., 0], 12, 4).shape == (12, 4)


def deep_png() -> bytes:
    """1x1, RGB of 16 bits, which Pillow reads as 8 and does not write."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(7)), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


GREY = Image.new("L", (7, 5), 100)
FRAMES = {"save_all": True, "append_images": [Image.new("L", (7, 5), 200)]}


@pytest.mark.parametrize(
    "data",
    [
        save(GREY, "PNG"),
        save(GREY, "JPEG"),
        save(GREY.convert("RGBA"), "WEBP", lossless=True),
        save(GREY.convert("P"), "PNG"),
        save(GREY.convert("1"), "PNG"),
        save(GREY.convert("LA"), "PNG"),
        save(GREY, "MPO", **FRAMES),  # a phone's photo, with another for its screen
        save(GREY, "JPEG") + b"ftypmp42 a film, as some phones append",
        save(GREY, "PNG")[:60],  # cut short: for the decoder to say
    ],
)
def test_what_people_send_passes(data):
    assert images.inspect(data, 35) == (5, 7)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes"),
        (b"GIF89a", "PNG, JPEG or WebP"),
        (save(GREY, "GIF"), "PNG, JPEG or WebP"),
        (save(Image.new("L", (6, 6)), "PNG"), "6x6, more than 35 pixels"),
        (save(GREY, "PNG")[:16] + bytes(8) + save(GREY, "PNG")[24:], "PNG, JPEG or WebP|no pixels"),
        (save(GREY, "PNG", **FRAMES), "animated"),
        (save(GREY, "WEBP", **FRAMES), "animated"),
        (save(GREY.convert("CMYK"), "JPEG"), "RGB"),
        (save(Image.new("I;16", (7, 5)), "PNG"), "16 bits"),
        (deep_png(), "16 bits"),
        (save(GREY, "PNG") + b"x", "1 bytes"),
        (save(GREY, "WEBP") + b"xx", "2 bytes"),
        (save(GREY, "JPEG") + b"PK\x03\x04", "archive"),
        (save(GREY, "JPEG") + b"<SCRIPT>", "script"),
        (save(GREY, "JPEG") + b"%PDF-1.7", "document"),
    ],
)
def test_what_would_be_changed_silently_or_is_two_things_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        images.inspect(data, 35)


def test_rgb_and_opacity_come_from_one_decoding():
    image = np.random.default_rng(0).integers(0, 256, (600, 5, 4), np.uint8)
    data = save(Image.fromarray(image), "PNG")
    rgb, alpha = images.decode_with_alpha(data)
    assert np.array_equal(rgb, images.decode(data))
    assert alpha is not None
    assert np.array_equal(alpha, image[..., 3])
    assert (rgb[alpha == 0] == 255).all()
    assert np.array_equal(rgb[alpha == 255], image[..., :3][alpha == 255])


# ---- files of cameras, editors and downloads


def segment(marker: int, content: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + (len(content) + 2).to_bytes(2, "big") + content


def photo(*segments: bytes, **options) -> bytes:
    """A JPEG with further segments behind its first marker."""
    data = save(Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 56, 3), np.uint8)), "JPEG", **options)
    return data[:2] + b"".join(segments) + data[2:]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_with(*chunks: bytes, picture: Image.Image = GREY) -> bytes:
    data = save(picture, "PNG")
    return data[:33] + b"".join(chunks) + data[33:]


THUMBNAIL = segment(0xE1, b"Exif\0\0" + save(GREY, "JPEG"))


@pytest.mark.parametrize(
    "data",
    [
        photo(THUMBNAIL, segment(0xFE, b"#!/bin/sh <html> %PDF-1.7 PK\x03\x04")),
        photo(THUMBNAIL, segment(0xE2, b"PK\x03\x04" * 999), progressive=True),
        photo(segment(0xE1, b"\xff\xd9<script>")),
        photo(THUMBNAIL) + b"\0" * 999,
        photo(THUMBNAIL) + photo(THUMBNAIL) + b"#!/",
        photo() + b"vendor notes <script> #!/ PK\x03\x04",
        b"\xff\xd8" + b"\xff" * 99 + photo()[3:],
        save(GREY, "PNG") + b"\n",
        save(GREY, "PNG") + b"\r\n \0\0",
        save(GREY, "PNG") + bytes(4096),
        save(GREY, "WEBP") + b"\n\0",
    ],
)
def test_what_cameras_and_transfers_append_is_ignored(data):
    images.inspect(data, 10_000)
    assert images.decode(data).ndim == 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (photo(THUMBNAIL) + b"#!/bin/sh", "script"),
        (photo(THUMBNAIL) + b"\n\0 PK\x03\x04", "archive"),
        (photo(progressive=True) + b"<!DOCTYPE html>", "web page"),
        (photo() + b"MZ\x90\0", "program"),
        (save(GREY, "PNG") + b"PK\x03\x04" + chunk(b"IEND", b""), "archive"),
        (png_with(chunk(b"tEXt", b"a\0IEND\xaeB`\x82")) + b"\n%PDF-1.7", "document"),
        (save(GREY, "WEBP") + b"\0\x7fELF", "program"),
    ],
)
def test_what_begins_another_file_behind_the_image_is_refused(data, message):
    with pytest.raises(UserError, match=message):
        images.inspect(data, 10_000)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_a_picture_is_turned_as_its_exif_says(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 16, 3), np.uint8)), format, exif=exif)
    with Image.open(io.BytesIO(data)) as picture:
        expected = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    assert np.array_equal(images.decode(data), expected)


@given(st.binary(max_size=60), st.sampled_from([b"", b"II*\0", b"MM\0*", b"MM\0*\0\0\0\x08", b"II*\0\x08\0\0\0"]))
def test_damaged_exif_harms_no_pixel(content, head):
    assert images.decode(png_with(chunk(b"eXIf", head + content))).size == 3 * GREY.width * GREY.height
    assert images.decode(photo(segment(0xE1, b"Exif\0\0" + head + content))).size == 40 * 56 * 3


@pytest.mark.parametrize(
    "damage",
    [
        chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2 * 2**20))),
        chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(2 * 2**20))),
        chunk(b"tEXt", bytes(2 * 2**20)),
        chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(80 * 2**20))),
        chunk(b"tEXt", b"no separator"),
        chunk(b"gAMA", b""),
        chunk(b"cHRM", b"x"),
        chunk(b"pHYs", b""),
        chunk(b"acTL", b"\0"),
    ],
)
def test_damaged_and_huge_notes_of_a_png_harm_no_pixel(damage):
    data = png_with(damage)
    images.inspect(data, 10_000)
    assert np.array_equal(images.decode(data), images.decode(save(GREY, "PNG")))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 100, "subsampling": 0}])
def test_a_jpeg_that_lacks_its_end_marker_alone_is_read(options):
    data = photo(**options)
    assert np.array_equal(images.decode(data[:-2]), images.decode(data))
    for cut in (len(data) // 2, len(data) - 60):
        with pytest.raises(UserError, match="cut short"):
            images.decode(data[:cut])


def display_p3() -> bytes:
    """The profile of a display with wider primaries than sRGB."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    wide = bytearray(profile.replace(b"sRGB", b"wide"))
    tags = {bytes(wide[at : at + 4]): at for at in range(132, 132 + 12 * int.from_bytes(wide[128:132], "big"), 12)}
    for name, scale in ((b"rXYZ", 1.15), (b"gXYZ", 0.9)):
        at = int.from_bytes(wide[tags[name] + 4 : tags[name] + 8], "big") + 8
        wide[at : at + 4] = int(int.from_bytes(wide[at : at + 4], "big") * scale).to_bytes(4, "big")
    return bytes(wide)


def test_a_colour_profile_is_applied_in_every_mode():
    profile, colour = display_p3(), Image.new("RGB", (8, 8), (250, 90, 40))
    expected = images.decode(save(colour, "PNG", icc_profile=profile))
    assert not np.array_equal(expected, np.asarray(colour)), "the profile changes nothing"
    for picture in (colour.convert("RGBA"), colour.quantize(4)):
        assert np.abs(images.decode(save(picture, "PNG", icc_profile=profile)).astype(int) - expected).max() <= 2
    transparent = colour.convert("RGBA")
    transparent.putalpha(255)
    transparent.putpixel((0, 0), (250, 90, 40, 0))
    rgb, alpha = images.decode_with_alpha(save(transparent, "PNG", icc_profile=profile))
    assert np.array_equal(rgb[1:], expected[1:]) and rgb[0, 0].tolist() == [255] * 3
    assert alpha is not None and alpha[0, 0] == 0
    for mode in ("L", "LA", "1"):  # a profile for other channels is left out
        assert images.decode(save(GREY.convert(mode), "PNG", icc_profile=profile)).shape == (*GREY.size[::-1], 3)
