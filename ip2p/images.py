"""Images: bytes <-> uint8 (H, W, 3) in [0, 255] <-> float (B, 3, H, W) in [-1, 1]. The only decoder of untrusted bytes.

`decode` gives what a viewer shows: turned as EXIF says, transparency over white, 8-bit sRGB. An editor that should
keep transparency reads it with `decode_with_alpha` and puts it back with `encode(image, alpha=...)`. Datasets are read
as leniently as can be; `inspect` is for a service, which refuses what it would have to change silently.
"""

import io
import re
import struct
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageCms
from torch import Tensor

from ip2p.errors import UserError

MAX_PIXELS = 64_000_000
"""Larger images are refused before a pixel is decoded: about 200 MB of RGB."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "PPM")
UPLOADS = ("PNG", "JPEG", "WEBP", "MPO")
# Beginnings of a tail that make a file two things at once.
FOREIGN = {
    "an archive": (b"pk\x03\x04", b"pk\x05\x06", b"rar!\x1a", b"7z\xbc\xaf\x27\x1c"),
    "a document": (b"%pdf-",),
    "a web page or a script": (b"<script", b"<html", b"<!doctype", b"<?php", b"#!/"),
    "a program": (b"\x7felf", b"mz\x90\x00"),
}
BLANK = b"\x00 \t\r\n"  # what transfers and editors leave behind a file
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Chunks of a PNG that the picture depends on. Others may be damaged, or unpack to gigabytes.
PNG_PICTURE = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"eXIf"}
# In the data of a JPEG, 0xff is followed by 0 or a restart marker; then by a marker that ends it.
JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
JPEG_END = b"\xff\xd9"
MAX_SEGMENTS = 100_000
ORIENTATION = 0x0112  # of EXIF
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
WHITE = 255.0


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Bytes of a picture -> uint8 (H, W, 3): upright, transparency over white, the first frame of an animation.

    Raises `UserError` that says what is wrong with the bytes and what to send instead.
    """
    return decode_with_alpha(data, max_pixels)[0]


def decode_alpha(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray | None:
    """Bytes of a picture -> its opacity, uint8 (H, W), upright; None when it is opaque. Raises as `decode` does."""
    return decode_with_alpha(data, max_pixels)[1]


def decode_with_alpha(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, np.ndarray | None]:
    """What `decode` and `decode_alpha` give, decoded once."""
    picture = _open(data, max_pixels)
    rgb = np.array(_srgb(picture))
    if not picture.has_transparency_data:
        return rgb, None
    alpha = _alpha(picture)
    if alpha.min() == 255:
        return rgb, None
    for band in range(0, len(rgb), 256):  # floats of a whole photo would be eight times its size
        rows = slice(band, band + 256)
        opacity = alpha[rows, :, None].astype(np.float32) / 255
        rgb[rows] = np.round(rgb[rows] * opacity + WHITE * (1 - opacity))
    return rgb, alpha


def inspect(data: bytes, max_pixels: int) -> tuple[int, int]:
    """(height, width) as stored, read from the header alone: no pixel is decoded.

    Raises `UserError`, telling what to send instead, for what is no PNG, JPEG or WebP of 8 bits a channel in grey or
    RGB: too many pixels, animations, CMYK, 16 bits, and files that go on as something else.
    """
    picture = _header(data, max_pixels, UPLOADS)
    if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":  # of a phone: a photo and its thumbnails
        raise UserError("the image is animated: send one frame of it")
    if picture.mode == "CMYK":
        raise UserError("the image is CMYK, for print: save it as RGB and send that")
    if picture.mode.startswith(("I", "F")) or (picture.format == "PNG" and data[24:25] == b"\x10"):
        raise UserError("the image has 16 bits a channel: save it with 8 bits and send that")
    if foreign := _goes_on(data, picture.format or ""):
        raise UserError(f"the file goes on after the image ends ({foreign}): save the image anew and send that")
    return picture.height, picture.width


def encode(
    image: np.ndarray, format: str = "png", alpha: np.ndarray | None = None, quality: int | None = None
) -> bytes:
    """Return uint8 (H, W, 3), with or without an opacity, uint8 (H, W), as a file: png, webp or jpeg.

    A png or webp is lossless, unless `quality`, 0 to 100, asks for a lossy webp. Both are compressed
    at the fastest level: for a photo of 12 megapixels that takes 0.5 s instead of 2.0 (png) and
    4.2 (webp), and adds 24% and 58% to the file.
    """
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3, (image.dtype, image.shape)
    if format not in ("png", "webp", "jpeg"):
        raise UserError(f"format {format!r}: choose png, webp or jpeg")
    if alpha is not None:
        if format == "jpeg":
            raise UserError("format 'jpeg' can't hold transparency: choose png or webp")
        image = np.dstack([image, alpha])
    lossless = {"lossless": True, "exact": True, "quality": 0, "method": 0}
    options = {
        "png": {"compress_level": 1},
        "webp": lossless if quality is None else {"quality": quality},
        "jpeg": {"quality": 95, "subsampling": 0} if quality is None else {"quality": quality},
    }[format]
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format, **options)
    return buffer.getvalue()


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    assert images.dtype == np.uint8 and images.ndim == 4, (images.dtype, images.shape)
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images: Tensor) -> np.ndarray:
    """float (B, 3, H, W) in [-1, 1], clipped -> uint8 (B, H, W, 3)."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (H, W[, C]) -> uint8 (height, width[, C]), antialiased."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def fit(image: np.ndarray, max_side: int, multiple: int) -> np.ndarray:
    """uint8 (H, W, 3) -> the nearest size whose sides are multiples of `multiple`, the longer at most `max_side`.

    Small images are not enlarged beyond the next multiple; both sides are at least `multiple`.
    """
    assert max_side >= multiple, (max_side, multiple)
    scale = min(1.0, max_side / max(image.shape[:2]))
    sides = [max(multiple, round(side * scale / multiple) * multiple) for side in image.shape[:2]]
    height, width = (min(side, max_side // multiple * multiple) for side in sides)
    return resize(image, height, width)


def _header(data: bytes, max_pixels: int, formats: tuple[str, ...]) -> Image.Image:
    """Return the picture, opened and not decoded."""
    if not data:
        raise UserError("the image is empty (0 bytes): send the bytes of a PNG, JPEG or WebP file")
    try:
        picture = _opened(data, formats)
    except Image.DecompressionBombError as error:
        raise UserError(f"the image has more than {max_pixels} pixels: send a smaller version of it") from error
    except Exception as error:  # whatever a decoder makes of hostile bytes
        raise UserError(f"not an image that can be read ({len(data)} bytes): send a PNG, JPEG or WebP file") from error
    width, height = picture.size
    if width * height > max_pixels:
        raise UserError(f"the image is {width}x{height}, more than {max_pixels} pixels: send a smaller version of it")
    if width * height == 0:
        raise UserError(f"the image is {width}x{height}, it has no pixels: send a larger one")
    return picture


def _opened(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except Exception:
        if not data.startswith(PNG_SIGNATURE):
            raise
        return Image.open(io.BytesIO(_png_of_picture(data)), formats=formats)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Return the first frame, decoded and upright, 8 bits a channel in the colour space that it has."""
    picture = _header(data, max_pixels, FORMATS)
    try:
        picture.load()
    except Exception as error:
        picture = _loaded_again(data, picture)
        if picture is None:
            raise UserError(f"the image is damaged or cut short ({error}): send the whole file again") from error
    profile = picture.info.get("icc_profile")
    orientation = _orientation(picture)
    turn = UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    upright = picture if turn is None else picture.transpose(turn)
    if not upright.mode.startswith(("I", "F")):
        return upright
    eight_bits = _eight_bits(upright)
    eight_bits.info["icc_profile"] = profile
    return eight_bits


def _orientation(picture: Image.Image) -> Any:
    """Return the orientation in the EXIF, 1 (upright) where that can't be read: no pixel depends on the rest."""
    try:
        return picture.getexif().get(ORIENTATION, 1)
    except Exception:
        return 1


def _loaded_again(data: bytes, picture: Image.Image) -> Image.Image | None:
    """Return the decoded picture if only data that no pixel depends on is missing or damaged, else None."""
    if picture.format == "PNG":
        candidate = _png_of_picture(data)
    elif picture.format in ("JPEG", "MPO") and not data.endswith(JPEG_END) and _has_all_rows(data):
        candidate = data + JPEG_END
    else:
        return None
    try:
        again = Image.open(io.BytesIO(candidate), formats=FORMATS)
        again.load()
    except Exception:
        return None
    return again


def _has_all_rows(data: bytes) -> bool:
    """Return whether a JPEG without an end marker has the data of all its pixels.

    A decoder ignores what follows the last of them, and takes it for pixels otherwise.
    """
    try:
        one, other = (np.asarray(Image.open(io.BytesIO(data + more + JPEG_END))) for more in (b"", b"\x55" * 4096))
    except Exception:
        return False
    return np.array_equal(one, other)


def _goes_on(data: bytes, format: str) -> str:
    """Describe what follows the end of the image. Return "" for nothing, blanks, and a camera's own data in a JPEG."""
    if format == "WEBP":
        size = struct.unpack("<I", data[4:8])[0]
        tail = data[8 + size + size % 2 :]
    elif format == "PNG":
        tail = data[_png_chunks(data)[1] :]
    else:
        tail = data[_jpeg_end(data) :]
    tail = tail.lstrip(BLANK)
    start = tail[:16].lower()
    foreign = next((name for name, marks in FOREIGN.items() if start.startswith(marks)), "")
    if foreign or format not in ("WEBP", "PNG"):
        return foreign
    return f"{len(tail)} bytes" if tail else ""


def _png_chunks(data: bytes) -> tuple[list[tuple[bytes, bytes]], int]:
    """Return the chunks of a PNG, (type, the whole chunk), and where they end."""
    chunks, at = [], len(PNG_SIGNATURE)
    while at + 12 <= len(data) and len(chunks) < MAX_SEGMENTS:
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        chunks.append((kind, data[at : at + 12 + length]))
        at += 12 + length
        if kind == b"IEND":
            return chunks, at
    return chunks, len(data)


def _png_of_picture(data: bytes) -> bytes:
    """Return a PNG without the chunks that no pixel depends on."""
    return PNG_SIGNATURE + b"".join(chunk for kind, chunk in _png_chunks(data)[0] if kind in PNG_PICTURE)


def _jpeg_end(data: bytes) -> int:
    """Return the offset behind the first picture of a JPEG, or the length of the data if it has no end marker.

    The segments are walked, because a thumbnail in the EXIF segment has an end marker of its own.
    """
    at = 2
    for _ in range(MAX_SEGMENTS):
        marker = JPEG_MARKER.search(data, at)
        if marker is None:
            break
        if marker.group() == JPEG_END:
            return marker.end()
        at = marker.end()
        if marker.group()[1] not in (0x01, 0xD8):  # markers without a segment
            at += int.from_bytes(data[at : at + 2], "big")
    return len(data)


def _eight_bits(picture: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float greyscale -> 8 bits. Pillow's own convert makes everything above 255 white."""
    values = np.asarray(picture).astype(np.float32)
    deep = picture.mode.startswith("I;16") or values.max() > 255
    top = 65535.0 if deep else 1.0 if picture.mode == "F" and values.max() <= 1 else 255.0
    return Image.fromarray(np.round(values.clip(0, top) / top * 255).astype(np.uint8))


def _alpha(picture: Image.Image) -> np.ndarray:
    return np.array(picture.convert("RGBA").getchannel("A"))


def _srgb(picture: Image.Image) -> Image.Image:
    """Return RGB without transparency, turned into sRGB where the picture brings another colour profile."""
    profile = picture.info.get("icc_profile")
    if picture.mode != "CMYK":
        # By way of RGBA, where there is transparency: a palette's transparent entry has a colour, too.
        opaque = picture.convert("RGBA").convert("RGB") if picture.has_transparency_data else picture
        grey = opaque.mode in ("1", "L", "LA", "La")
        picture = opaque.convert("L" if grey and profile else "RGB")
    if not profile or b"sRGB" in profile:
        return picture.convert("RGB")
    try:
        source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        if picture.mode == "RGB" and cast(Any, source.profile).xcolor_space.strip() == "GRAY":
            picture = picture.convert("L")  # a grey picture with transparency
        return ImageCms.profileToProfile(picture, source, target, outputMode="RGB") or picture.convert("RGB")
    except (ImageCms.PyCMSError, OSError):  # a broken profile, or one for other channels: the pixels are as good
        return picture.convert("RGB")
