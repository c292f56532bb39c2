"""Decode uploads, and encode results with the ids that feedback names them by."""

import asyncio
import base64
import binascii
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ip2p import images
from ip2p.edit.editor import EditRequest
from ip2p.errors import UserError
from serve import feedback
from serve.engine_client import Description, EditResult
from serve.errors import RefusedError
from serve.schema import MAX_IMAGE_BYTES, MAX_SIDE, OutputFormat

T = TypeVar("T")
THREADS = 2  # that decode and encode


@dataclass(frozen=True, eq=False)
class Source:
    """An uploaded picture. rgb: uint8 (H, W, 3), upright; alpha: uint8 (H, W), None if opaque."""

    rgb: np.ndarray
    alpha: np.ndarray | None


class Pictures:
    """Decodes and encodes on threads, which keeps the event loop free.

    max_pixels: the largest picture that is decoded. secret: signs the ids of edits.
    """

    def __init__(self, max_pixels: int, secret: bytes):
        self.max_pixels, self.secret = max_pixels, secret
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="pictures")

    async def _run(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    async def decode(self, data: bytes, output_format: OutputFormat) -> Source:
        """Return the picture in a file.

        Raises `RefusedError` when it is no picture that is served, or when `output_format` can't
        hold its transparency.
        """
        if len(data) > MAX_IMAGE_BYTES:
            raise RefusedError(
                f"image: {len(data)} bytes, more than {MAX_IMAGE_BYTES}: send a smaller file",
                413,
                param="image",
            )
        try:
            source = await self._run(self._decode, data)
        except UserError as error:
            raise RefusedError(f"image: {error}", 400, param="image") from error
        if output_format == "jpeg" and source.alpha is not None:
            raise RefusedError(
                "output_format: jpeg can't hold the image's transparency: ask for png or webp",
                400,
                param="output_format",
            )
        return source

    def _decode(self, data: bytes) -> Source:
        images.inspect(data, self.max_pixels)  # reads the header before any pixel is decoded
        return Source(*images.decode_with_alpha(data, self.max_pixels))

    async def fit(self, source: Source, model: Description) -> np.ndarray:
        """Return the source at the size that the model sees, uint8 (H, W, 3)."""
        return await self._run(images.fit, source.rgb, model.max_side, model.multiple)

    async def encode(self, image: np.ndarray, output_format: OutputFormat) -> bytes:
        """Return uint8 (H, W, 3) as a file."""
        return await self._run(images.encode, image, output_format)

    async def finish(
        self,
        request: EditRequest,
        source: Source,
        result: EditResult,
        output_format: OutputFormat,
        size: tuple[int, int],
    ) -> tuple[bytes, str]:
        """Return the result as a file, and the edit's id for POST /v1/feedback.

        The picture has `size` (H, W) and the transparency of the source.
        """
        return await self._run(self._finish, request, source, result, output_format, size)

    def _finish(
        self,
        request: EditRequest,
        source: Source,
        result: EditResult,
        output_format: OutputFormat,
        size: tuple[int, int],
    ) -> tuple[bytes, str]:
        alpha = None if source.alpha is None else images.resize(source.alpha, *size)
        image = images.resize(result.image, *size)
        record = {
            "source_id": feedback.image_id(source.rgb),
            "result_id": feedback.image_id(image),
            "instruction": request.instruction,
            "negative_prompt": request.negative_prompt,
            "guidance_scale": request.guidance_scale,
            "image_guidance_scale": request.image_guidance_scale,
            "steps": request.steps,
            "seed": request.seed,
            "solver": request.solver,
            "model": result.engine.version,
        }
        edit_id = feedback.make_edit_id(record, self.secret)
        return images.encode(image, output_format, alpha), edit_id


def from_base64(text: str) -> bytes:
    """Return the bytes of base64 or of a data: URL. Raises `RefusedError`."""
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise RefusedError(
                "image: write the data: URL of an image as data:image/png;base64,…",
                400,
                param="image",
            )
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        message = f"image: not base64 ({error}): send the file in base64"
        raise RefusedError(message, 400, param="image") from error


def output_size(size: str, image: np.ndarray) -> tuple[int, int]:
    """Return (H, W) of a result: the image's own for `auto`, else the largest that fits `size`.

    The aspect is the image's. Raises `RefusedError` when `size` can't be read.
    """
    height, width = image.shape[:2]
    if size == "auto":
        return height, width
    numbers = re.fullmatch("([1-9][0-9]{0,3})x([1-9][0-9]{0,3})", size)
    if not numbers or max(map(int, numbers.groups())) > MAX_SIDE:
        raise RefusedError(
            f"size: {size!r} is not auto or WIDTHxHEIGHT with at most {MAX_SIDE} pixels per side",
            400,
            param="size",
        )
    scale = min(int(numbers[1]) / width, int(numbers[2]) / height)
    return max(1, round(height * scale)), max(1, round(width * scale))
