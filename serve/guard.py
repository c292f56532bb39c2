"""The checks of a request before it is parsed: key, size, content type, and upload time."""

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.error_handlers import refusal
from serve.errors import RefusedError
from serve.keys import Client, Clients
from serve.schema import CONTENT_TYPES, MAX_BODY_BYTES

OPEN_PATHS = {
    "/", "/static/page.css", "/static/page.js",
    "/healthz", "/readyz", "/docs", "/openapi.json", "/docs/oauth2-redirect",
}  # fmt: skip
MAX_BUFFERED = 8 * MAX_BODY_BYTES  # of all bodies that are arriving or being read


class RequestGuard:
    """ASGI middleware. It puts the key's `Client` into the scope as `client_of_key`.

    upload_s: seconds that a body may take to arrive. count: called with path and status of every
    answer.
    """

    def __init__(self, app: ASGIApp, clients: Clients, upload_s: float, count: Callable[[str, int], None]):
        self.app, self.clients, self.upload_s, self.count = app, clients, upload_s, count
        self.buffered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.count(path, message["status"])
            await send(message)

        held = 0
        try:
            headers = Headers(scope=scope)
            if path not in OPEN_PATHS:
                scope["client_of_key"] = self._authorize(scope, headers)
            if scope["method"] not in ("GET", "HEAD"):
                held = self._reserve(CONTENT_TYPES.get(path), headers)
                body = await self._read(receive)
                receive = _replay(body, receive)
            await self.app(scope, receive, counted)
        except RefusedError as error:
            await refuse(error, counted)
        finally:
            self.buffered -= held

    def _authorize(self, scope: Scope, headers: Headers) -> Client | None:
        """Return the client of the request's key, charged for one edit; None when no keys are set.

        Raises `RefusedError`.
        """
        client = self.clients.of(headers.get("authorization"))
        if client is None:
            host = (scope.get("client") or ("",))[0]
            if host and not _is_loopback(host):
                raise RefusedError("this endpoint has no keys and serves its own machine only", 403)
        else:
            client.charge(1)
        return client

    def _reserve(self, content_type: str | None, headers: Headers) -> int:
        """Reserve buffer space for the body and return its bytes, held until the answer is sent.

        Raises `RefusedError` for a wrong type or length, or when the buffer is full.
        """
        given = headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type and given != content_type:
            message = f"content-type: {given[:80]!r} is wrong; send {content_type}"
            raise RefusedError(message, 415, param="content-type")
        length = headers.get("content-length", str(MAX_BODY_BYTES))
        size = int(length) if length.isascii() and length.isdigit() and len(length) < 20 else -1
        if size < 0:
            message = f"content-length: {length[:80]!r} is not a number of bytes"
            raise RefusedError(message, 400, param="content-length")
        if size > MAX_BODY_BYTES:
            message = f"the body has {size} bytes, more than {MAX_BODY_BYTES}: send smaller images"
            raise RefusedError(message, 413)
        if self.buffered + size > MAX_BUFFERED:
            raise RefusedError("server busy: too many uploads in flight; retry later", 429, retry_after=2)
        self.buffered += size
        return size

    async def _read(self, receive: Receive) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(self.upload_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise RefusedError("the client disconnected", 400)
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > MAX_BODY_BYTES:
                        text = f"the body has more than {MAX_BODY_BYTES} bytes: send smaller images"
                        raise RefusedError(text, 413)
        except TimeoutError as error:
            raise RefusedError(
                f"the body did not arrive within {self.upload_s:g} seconds: "
                "send smaller images, or use a faster connection",
                408,
            ) from error
        return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body as one message, and then what follows it."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def read() -> Message:
        return left.pop() if left else await receive()

    return read


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def refuse(error: RefusedError, send: Callable[[Message], Awaitable[None]]) -> None:
    """Send the answer to a refused request, and close the connection."""
    body, headers = refusal(error)
    headers |= {"content-length": str(len(body)), "connection": "close"}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
