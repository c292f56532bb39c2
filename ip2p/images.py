"""Images: bytes <-> uint8 (H, W, 3) in [0, 255] <-> float (B, 3, H, W) in [-1, 1]. The only decoder of untrusted bytes.

`decode` gives what a viewer shows: turned as EXIF says, transparency over white, 8-bit sRGB. An editor that should
keep transparency reads it with `decode_alpha` and puts it back with `encode(image, alpha=...)`.
"""

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 64_000_000
"""Larger images are refused before a pixel is decoded: about 200 MB of RGB."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "PPM")
WHITE = 255.0


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Bytes of a picture -> uint8 (H, W, 3): upright, transparency over white, the first frame of an animation.

    Raises `ValueError` that says what is wrong with the bytes and what to send instead.
    """
    picture = _open(data, max_pixels)
    if not picture.has_transparency_data:
        return np.asarray(_to_srgb(picture))
    rgba = picture.convert("RGBA")
    rgb, alpha = np.asarray(rgba)[..., :3].astype(np.float32), np.asarray(rgba)[..., 3:].astype(np.float32) / 255
    return np.round(rgb * alpha + WHITE * (1 - alpha)).astype(np.uint8)


def decode_alpha(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray | None:
    """Bytes of a picture -> its opacity, uint8 (H, W), upright; None when it is opaque. Raises as `decode` does."""
    picture = _open(data, max_pixels)
    if not picture.has_transparency_data:
        return None
    alpha = np.asarray(picture.convert("RGBA"))[..., 3]
    return None if alpha.min() == 255 else alpha


def encode(image: np.ndarray, format: str = "png", alpha: np.ndarray | None = None) -> bytes:
    """uint8 (H, W, 3), with opacity uint8 (H, W) if any -> bytes of a png or webp (lossless), or a jpeg (quality 95)."""
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3, (image.dtype, image.shape)
    if format not in ("png", "webp", "jpeg"):
        raise ValueError(f"format {format!r}: choose png, webp or jpeg")
    if alpha is not None:
        if format == "jpeg":
            raise ValueError("format 'jpeg' can't hold transparency: choose png or webp")
        image = np.dstack([image, alpha])
    options = {"png": {}, "webp": {"lossless": True, "exact": True}, "jpeg": {"quality": 95, "subsampling": 0}}[format]
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


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """The first frame, decoded and upright, in whatever mode it has."""
    if not data:
        raise ValueError("the image is empty (0 bytes): send the bytes of a PNG, JPEG or WebP file")
    try:
        with warnings.catch_warnings():
            # Pillow's own limit warns from half of it on; ours below is the one that counts.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = picture.size
            if width * height > max_pixels:
                raise ValueError(
                    f"the image is {width}x{height}, more than {max_pixels} pixels: send a smaller version of it"
                )
            picture.load()
            return ImageOps.exif_transpose(picture)
    except Image.DecompressionBombError as error:
        raise ValueError(f"the image has more than {max_pixels} pixels: send a smaller version of it") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"not an image that can be read ({len(data)} bytes): send a PNG, JPEG or WebP file") from error
    except (OSError, SyntaxError, EOFError, IndexError, KeyError, TypeError, ZeroDivisionError) as error:
        # Pillow's decoders raise any of these on damaged files.
        raise ValueError(f"the image is damaged or cut short ({error}): send the whole file again") from error


def _to_srgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":
        return _sixteen_bits(picture).convert("RGB")
    if picture.mode == "CMYK" and (profile := picture.info.get("icc_profile")):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            return converted or picture.convert("RGB")
        except (ImageCms.PyCMSError, OSError):
            return picture.convert("RGB")
    return picture.convert("RGB")


def _sixteen_bits(picture: Image.Image) -> Image.Image:
    """16-bit and float greyscale -> 8 bits; Pillow's own convert clips everything above 255 to white."""
    values = np.asarray(picture).astype(np.float32)
    top = 255.0 if values.max() <= 255 and picture.mode != "I;16" else 65535.0
    if picture.mode == "F" and values.max() <= 1:
        top = 1.0
    return Image.fromarray(np.round(values.clip(0, top) / top * 255).astype(np.uint8))
