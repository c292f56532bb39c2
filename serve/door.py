"""What every request passes before any of it is parsed: its key, size, type, and how long it takes to arrive."""

import asyncio
import ipaddress
import json
from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.keys import Clients, RefusedError
from serve.schema import MAX_BODY_BYTES, ErrorResponse, Problem

OPEN_PATHS = {"/", "/healthz", "/readyz", "/docs", "/openapi.json", "/docs/oauth2-redirect"}
CONTENT_TYPES = {
    "/v1/images/edits": "multipart/form-data",
    "/v1/edits": "application/json",
    "/v1/feedback": "application/json",
}
MAX_BUFFERED = 8 * MAX_BODY_BYTES  # of all bodies that are arriving or being read


class Door:
    """ASGI middleware. `upload_s`: seconds that a body may take to arrive."""

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
                scope["client_of_key"] = self._let_in(scope, headers)
            if scope["method"] not in ("GET", "HEAD"):
                held = self._room_for(CONTENT_TYPES.get(path), headers)
                body = await self._read(receive)
                receive = _replay(body, receive)
            await self.app(scope, receive, counted)
        except RefusedError as error:
            await refuse(error, counted)
        finally:
            self.buffered -= held

    def _let_in(self, scope: Scope, headers: Headers):
        client = self.clients.of(headers.get("authorization"))
        if client is None:
            host = (scope.get("client") or ("",))[0]
            if host and not _is_loopback(host):
                raise RefusedError("this endpoint is open, without keys, to its own machine only", 403)
        else:
            client.charge(1)
        return client

    def _room_for(self, wanted: str | None, headers: Headers) -> int:
        """Bytes that the body may have, which are held until it has been answered."""
        given = headers.get("content-type", "").partition(";")[0].strip().lower()
        if wanted and given != wanted:
            raise RefusedError(f"content-type {given[:80]!r}: send {wanted}", 415, param="content-type")
        length = headers.get("content-length", str(MAX_BODY_BYTES))
        size = int(length) if length.isascii() and length.isdigit() and len(length) < 20 else -1
        if size < 0:
            raise RefusedError(f"content-length {length[:80]!r}: send the number of bytes", 400, param="content-length")
        if size > MAX_BODY_BYTES:
            raise RefusedError(f"the body has {size} bytes, more than {MAX_BODY_BYTES}: send smaller images", 413)
        if self.buffered + size > MAX_BUFFERED:
            raise RefusedError("too much is being uploaded at once: try again", 429, retry_after=2)
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
                        raise RefusedError("the client went away", 400)
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > MAX_BODY_BYTES:
                        raise RefusedError(f"the body has more than {MAX_BODY_BYTES} bytes: send smaller images", 413)
        except TimeoutError as error:
            raise RefusedError(
                f"the body did not arrive within {self.upload_s:g} seconds: send smaller images, or over a faster line",
                408,
            ) from error
        return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message, and then what comes after it, i.e. the client's going away."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def read() -> Message:
        return left.pop() if left else await receive()

    return read


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def problem(error: RefusedError) -> tuple[bytes, dict[str, str]]:
    """Body and headers of the answer to a refused request."""
    kind = {401: "authentication_error", 403: "authentication_error", 429: "rate_limit_error"}
    told = Problem(message=error.message, param=error.param, type=kind.get(error.status, "invalid_request_error"))
    headers = {"content-type": "application/json"}
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return json.dumps(ErrorResponse(error=told).model_dump()).encode(), headers


async def refuse(error: RefusedError, send: Callable[[Message], Awaitable[None]]) -> None:
    body, headers = problem(error)
    headers |= {"content-length": str(len(body)), "connection": "close"}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
