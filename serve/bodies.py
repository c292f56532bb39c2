"""Bodies of requests: how large they may be, and how they are parsed.

A body is held in memory until it is parsed. Parsing is bounded before it starts, runs on a thread
where it is heavy, and takes turns between clients, so no body delays other requests.
"""

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.datastructures import FormData
from starlette.types import Message, Receive

from serve.errors import RefusedError
from serve.schema import MAX_BODY_BYTES, MAX_EDITS, MAX_IMAGE_BYTES
from serve.turns import Turns


@dataclass(frozen=True)
class BodyLimits:
    """The content type of a route's bodies, and their most bytes."""

    content_type: str
    most: int
    way_out: str = "send smaller images"


# A path that is not listed takes no body.
BODIES = {
    "/v1/images/edits": BodyLimits("multipart/form-data", MAX_BODY_BYTES),
    "/v1/edits": BodyLimits("application/json", MAX_IMAGE_BYTES * 4 // 3 + 2**20),  # an image in base64
    "/v1/feedback": BodyLimits("application/json", 2**16, "send a shorter comment"),
}
# Of JSON. Edits of MAX_EDITS use 24 strings each at most, 1 KB without them, and a depth of 3.
MAX_STRINGS = 32 * MAX_EDITS
MAX_OUTSIDE = 2**10 * MAX_EDITS
MAX_DEPTH = 8
CHUNK = 2**20  # bytes that a form parser is given at once, between which other requests run
IMAGE_FIELD = re.compile(r"images?(\[\d{0,3}\])?")


class Uploads:
    """The bytes of bodies that are arriving or waiting to be parsed: of all clients, and of each.

    Bodies are parsed one at a time, in fair turns.
    """

    def __init__(self, limit: int, share: int):
        self.limit, self.share = limit, share
        self.held: dict[str, int] = {}
        self.parsing = Turns(1)

    def body(self, client: str) -> "HeldBody":
        return HeldBody(self, client)


class HeldBody:
    """A body in the buffer until `release`, which does nothing the second time."""

    def __init__(self, uploads: Uploads, client: str):
        self._uploads, self._client = uploads, client
        self._size, self._parsing = 0, False

    def add(self, size: int) -> None:
        """Count bytes that have arrived. Raises `RefusedError` (429)."""
        uploads, held = self._uploads, self._uploads.held
        of_client = held.get(self._client, 0) + size
        if of_client > uploads.share or sum(held.values()) + size > uploads.limit:
            raise RefusedError("server busy: too many uploads in flight; retry later", 429, retry_after=2)
        held[self._client] = of_client
        self._size += size

    async def start_parsing(self) -> None:
        """Wait for the turn of this body."""
        await self._uploads.parsing.enter(self._client, self._size)
        self._parsing = True

    def release(self) -> None:
        """Free the buffer, and let the next body be parsed."""
        held = self._uploads.held
        held[self._client] = held.get(self._client, 0) - self._size
        if not held[self._client]:
            del held[self._client]
        self._size = 0
        if self._parsing:
            self._parsing = False
            self._uploads.parsing.leave()


def check_json(body: bytes) -> None:
    """Raises `RefusedError` for JSON that would be slow to parse or to describe.

    What is outside of strings is found by splitting at quotation marks, in time linear in the body
    and at the speed of memchr. In UTF-16 other letters have a byte of that value, and `json.loads`
    would read that, too.
    """
    if json.detect_encoding(body) not in ("utf-8", "utf-8-sig"):
        raise RefusedError("body: not UTF-8, which JSON has to be", 400, param="body")
    parts = body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"', 2 * MAX_STRINGS + 1)
    if len(parts) > 2 * MAX_STRINGS:
        raise RefusedError(f"body: more than {MAX_STRINGS} strings; send fewer fields", 400, param="body")
    outside = b"".join(parts[::2])
    if len(outside) > MAX_OUTSIDE:
        message = f"body: more than {MAX_OUTSIDE} characters outside of strings; send fewer values"
        raise RefusedError(message, 400, param="body")
    depth = 0
    for letter in outside:
        depth += (letter in b"[{") - (letter in b"]}")
        if depth > MAX_DEPTH:
            raise RefusedError(f"body: nested more than {MAX_DEPTH} deep", 400, param="body")


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body in pieces, and then what follows it."""
    starts = iter(range(0, max(1, len(body)), CHUNK))
    left = len(body)

    async def read() -> Message:
        nonlocal left
        start = next(starts, None)
        if start is None:
            return await receive()
        await asyncio.sleep(0)
        piece = body[start : start + CHUNK]
        left -= len(piece)
        return {"type": "http.request", "body": piece, "more_body": left > 0}

    return read


class BodyRequest(Request):
    """A request whose JSON is parsed on a thread, and whose form names every image `image`."""

    async def json(self) -> Any:
        body = await self.body()
        if not hasattr(self, "_json"):
            self._json = await asyncio.to_thread(json.loads, body)
        return self._json

    async def form(self, **limits: Any) -> FormData:  # pyright: ignore[reportIncompatibleMethodOverride]
        form = await super().form(**limits)
        items = [("image" if IMAGE_FIELD.fullmatch(name) else name, value) for name, value in form.multi_items()]
        return FormData(items)


class BodyRoute(APIRoute):
    """A route of `BodyRequest`s."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def handle_body(request: Request) -> Any:
            return await handle(BodyRequest(request.scope, request.receive))

        return handle_body
