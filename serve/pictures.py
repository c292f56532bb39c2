"""Decode uploads, and encode results with the ids that feedback names them by."""

import asyncio
import binascii
import os
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
from serve.schema import MAX_IMAGE_BYTES, MAX_SIDE, AskedFormat, OutputFormat
from serve.turns import Turns

T = TypeVar("T")
MAX_THREADS = 8
SMALL = 2**20  # pixels up to which a PNG is answered with a PNG


@dataclass(frozen=True)
class Upload:
    """A file whose header was read. pixels: of its picture."""

    data: bytes
    pixels: int


@dataclass(frozen=True, eq=False)
class Source:
    """An uploaded picture.

    rgb: uint8 (H, W, 3), upright. alpha: uint8 (H, W), None if opaque. output_format: the format of
    its edits.
    """

    rgb: np.ndarray
    alpha: np.ndarray | None
    output_format: OutputFormat


class Pictures:
    """Decodes and encodes on a thread per core, in fair turns. The event loop stays free.

    max_pixels: the largest picture that is decoded. secret: encrypts the ids of edits.
    """

    def __init__(self, max_pixels: int, secret: bytes):
        self.max_pixels, self.secret = max_pixels, secret
        threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="pictures")
        self._turns = Turns(threads)

    async def _run(self, client: str, cost: float, function: Callable[..., T], *args: Any) -> T:
        """Return what `function` returns on a thread, once it is the client's turn."""
        await self._turns.enter(client, cost)
        loop = asyncio.get_running_loop()
        future = self._threads.submit(function, *args)
        # Free the slot when the thread ends, which is later than this coroutine if that is cancelled.
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._turns.leave))
        return await asyncio.wrap_future(future)

    async def inspect(self, client: str, data: bytes | str) -> Upload:
        """Return a file, given as bytes, base64 or a data: URL, by its header.

        Raises `RefusedError` when it is no picture that is served.
        """
        try:
            return await self._run(client, len(data), self._inspect, data)
        except UserError as error:
            raise RefusedError(f"image: {error}", 400, param="image") from error

    def _inspect(self, data: bytes | str) -> Upload:
        file = from_base64(data) if isinstance(data, str) else data
        if len(file) > MAX_IMAGE_BYTES:
            message = f"image: {len(file)} bytes, more than {MAX_IMAGE_BYTES}: send a smaller file"
            raise RefusedError(message, 413, param="image")
        height, width = images.inspect(file, self.max_pixels)
        return Upload(file, height * width)

    async def decode(self, client: str, upload: Upload, output_format: AskedFormat, opaque: bool = False) -> Source:
        """Return the picture in a file, with `opaque` over white.

        Raises `RefusedError` when it can't be read, or when `output_format` can't hold its
        transparency.
        """
        try:
            rgb, alpha = await self._run(client, upload.pixels, images.decode_with_alpha, upload.data, self.max_pixels)
        except UserError as error:
            raise RefusedError(f"image: {error}", 400, param="image") from error
        if opaque:
            alpha = None
        if output_format == "jpeg" and alpha is not None:
            raise RefusedError(
                "output_format: jpeg can't hold the image's transparency: ask for png or webp",
                400,
                param="output_format",
            )
        return Source(rgb, alpha, choose_format(output_format, upload, alpha is not None))

    async def fit(self, client: str, source: Source, model: Description) -> np.ndarray:
        """Return the source at the size that the model sees, uint8 (H, W, 3)."""
        cost = source.rgb.shape[0] * source.rgb.shape[1]
        return await self._run(client, cost, images.fit, source.rgb, model.max_side, model.multiple)

    async def encode_preview(self, client: str, image: np.ndarray) -> bytes:
        """Return uint8 (H, W, 3) as a JPEG."""
        return await self._run(client, image.shape[0] * image.shape[1], images.encode, image, "jpeg")

    async def finish(
        self,
        client: str,
        request: EditRequest,
        source: Source,
        result: EditResult,
        size: tuple[int, int],
        quality: int | None = None,
    ) -> tuple[bytes, str]:
        """Return the result as a file, and the edit's id for POST /v1/feedback.

        The picture has `size` (H, W), and the transparency and the output format of the source.
        """
        record = {
            "client": client,
            "instruction": request.instruction,
            "negative_prompt": request.negative_prompt,
            "guidance_scale": request.guidance_scale,
            "image_guidance_scale": request.image_guidance_scale,
            "steps": request.steps,
            "seed": request.seed,
            "solver": request.solver,
            "model": result.engine.version,
        }
        return await self._run(client, size[0] * size[1], self._finish, record, source, result.image, size, quality)

    def _finish(
        self,
        record: dict[str, Any],
        source: Source,
        result: np.ndarray,
        size: tuple[int, int],
        quality: int | None,
    ) -> tuple[bytes, str]:
        alpha = None if source.alpha is None else images.resize(source.alpha, *size)
        image = images.resize(result, *size)
        ids = {"source_id": feedback.image_id(source.rgb), "result_id": feedback.image_id(image)}
        edit_id = feedback.make_edit_id(ids | record, self.secret)
        return images.encode(image, source.output_format, alpha, quality), edit_id


def choose_format(asked: AskedFormat, upload: Upload, transparent: bool) -> OutputFormat:
    """Return the format of the edits of an upload."""
    if asked != "auto":
        return asked
    png = upload.data.startswith(b"\x89PNG") and upload.pixels <= SMALL
    return "png" if transparent or png else "jpeg"


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
        return binascii.a2b_base64(text.encode("ascii").translate(None, b" \t\r\n"), strict_mode=True)
    except UnicodeEncodeError as error:
        message = f"image: not base64 ({error.object[error.start]!r} is no letter of it): send the file in base64"
        raise RefusedError(message, 400, param="image") from error
    except binascii.Error as error:
        message = f"image: not base64 ({error}): send the file in base64"
        raise RefusedError(message, 400, param="image") from error


def output_size(size: str, image: np.ndarray, max_pixels: int) -> tuple[int, int]:
    """Return (H, W) of a result: the image's own for `auto`, else the largest that fits `size`.

    The aspect is the image's. Raises `RefusedError` for a size that can't be read or is too large.
    """
    height, width = image.shape[:2]
    box = size_box(size)
    if box is None:
        return height, width
    scale = min(box[0] / height, box[1] / width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    if rows * columns > max_pixels:
        message = f"size: {columns}x{rows} is more than {max_pixels} pixels; ask for a smaller size"
        raise RefusedError(message, 400, param="size")
    return rows, columns


def size_box(size: str) -> tuple[int, int] | None:
    """Return (H, W) of a `size`, None for `auto`. Raises `RefusedError` when it can't be read."""
    if size == "auto":
        return None
    numbers = re.fullmatch("([1-9][0-9]{0,3})x([1-9][0-9]{0,3})", size)
    if not numbers or max(map(int, numbers.groups())) > MAX_SIDE:
        raise RefusedError(
            f"size: {size!r} is not auto or WIDTHxHEIGHT with at most {MAX_SIDE} pixels per side",
            400,
            param="size",
        )
    return int(numbers[2]), int(numbers[1])
