"""The checks of a request before it is parsed: key, size, content type, upload time, origin."""

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.bodies import BODIES, BodyLimits, HeldBody, Uploads, check_json, replay
from serve.error_handlers import SECURITY_HEADERS, refusal
from serve.errors import RefusedError
from serve.keys import Client, Clients
from serve.schema import MAX_BODY_BYTES

OPEN_PATHS = {
    "/", "/static/page.css", "/static/page.js",
    "/healthz", "/readyz", "/openapi.json",
}  # fmt: skip
MAX_BUFFERED = 8 * MAX_BODY_BYTES  # of all bodies that are arriving or being parsed
SHARE_OF_KEY = MAX_BUFFERED // 4
LOCAL_NAMES = {"localhost", "127.0.0.1", "::1"}
# Statuses of answers that are not charged. A late edit (408) has cost an engine its time.
REFUNDED = {400, 401, 403, 404, 405, 409, 413, 415, 429, 503}


class RequestGuard:
    """ASGI middleware. It puts the key's `Client` into the scope as `client_of_key`.

    The scope's `body_parsed` is to be called once the body is parsed: it frees the body's share of
    the buffer, and lets the next body be parsed.

    upload_s: seconds that a body may take to arrive. count: called with path and status of every
    answer.
    """

    def __init__(self, app: ASGIApp, clients: Clients, upload_s: float, count: Callable[[str, int], None]):
        self.app, self.clients, self.upload_s, self.count = app, clients, upload_s, count
        self.uploads = Uploads(MAX_BUFFERED, SHARE_OF_KEY if clients.clients else MAX_BUFFERED)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))
        head = scope["method"] == "HEAD"
        if head:  # routes know GET; the headers are the same, the body is left out
            scope = {**scope, "method": "GET"}
        client: Client | None = None

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.count(path, message["status"])
                if client is not None and message["status"] in REFUNDED:
                    client.refund(1)
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            elif head:
                message = {**message, "body": b""}
            await send(message)

        try:
            headers = Headers(scope=scope)
            if path not in OPEN_PATHS:
                known = self._authorize(scope, headers)
                if known is not None:
                    known.charge(1)
                client = scope["client_of_key"] = known
            limits = BODIES.get(path) if scope["method"] == "POST" else None
            if limits is None:
                return await self.app(scope, _no_body(receive), answer)
            await self._with_body(scope, headers, limits, receive, answer)
        except RefusedError as error:
            await refuse(error, answer)

    async def _with_body(
        self, scope: Scope, headers: Headers, limits: BodyLimits, receive: Receive, answer: Send
    ) -> None:
        _check_headers(limits, headers)
        client = scope["client_of_key"]
        held = self.uploads.body(client.key.name if client else "")
        try:
            body = await self._read(receive, limits, held)
            await held.start_parsing()
            if limits.content_type == "application/json":
                await asyncio.to_thread(check_json, body)
            scope["body_parsed"] = held.release
            await self.app(scope, replay(body, receive), answer)
        finally:
            held.release()

    def _authorize(self, scope: Scope, headers: Headers) -> Client | None:
        """Return the client of the request's key, None when no keys are set.

        Raises `RefusedError`.
        """
        client = self.clients.of(headers.get("authorization"))
        if client is None:
            _check_local(scope, headers)
        return client

    async def _read(self, receive: Receive, limits: BodyLimits, held: HeldBody) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(self.upload_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise RefusedError("the client disconnected", 400)
                    piece = message.get("body", b"")
                    held.add(len(piece))
                    body += piece
                    more = message.get("more_body", False)
                    if len(body) > limits.most:
                        text = f"the body has more than {limits.most} bytes: {limits.way_out}"
                        raise RefusedError(text, 413)
        except TimeoutError as error:
            raise RefusedError(
                f"the body did not arrive within {self.upload_s:g} seconds: "
                f"{limits.way_out}, or use a faster connection",
                408,
            ) from error
        return bytes(body)


def _check_headers(limits: BodyLimits, headers: Headers) -> None:
    """Raises `RefusedError` for a wrong content type or length."""
    # By the parser that Starlette decodes forms with, so that what is checked is what is obeyed.
    kind, parameters = parse_options_header(headers.get("content-type"))
    given = kind.decode(errors="replace").lower()
    if given != limits.content_type:
        message = f"content-type: {given[:80]!r} is wrong; send {limits.content_type}"
        raise RefusedError(message, 415, param="content-type")
    charset = parameters.get(b"charset", b"utf-8").decode(errors="replace")
    if charset.lower() not in ("utf-8", "utf8"):
        message = f"content-type: charset {charset[:80]!r} is not supported; send utf-8"
        raise RefusedError(message, 415, param="content-type")
    length = headers.get("content-length", "0")
    size = int(length) if length.isascii() and length.isdigit() and len(length) < 20 else -1
    if size < 0:
        message = f"content-length: {length[:80]!r} is not a number of bytes"
        raise RefusedError(message, 400, param="content-length")
    if size > limits.most:
        message = f"the body has {size} bytes, more than {limits.most}: {limits.way_out}"
        raise RefusedError(message, 413)


def _check_local(scope: Scope, headers: Headers) -> None:
    """Raises `RefusedError` unless a program or a page of this machine asks.

    A browser sends requests of other sites here, too: with their `Origin`, or with their `Host` when
    their name was made to point here (DNS rebinding).
    """
    host = (scope.get("client") or ("",))[0]
    if not is_loopback(host):
        raise RefusedError("this endpoint has no keys and serves its own machine only", 403)
    named = headers.get("host", "")
    if _address(f"//{named}")[0] not in LOCAL_NAMES:
        message = f"host: {named[:80]!r} is refused; an endpoint without keys is called localhost or 127.0.0.1"
        raise RefusedError(message, 403)
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    if (origin is not None and _address(origin)[1] != named) or site not in ("none", "same-origin"):
        raise RefusedError("origin: a page of another site may not use this endpoint", 403)


def _address(url: str) -> tuple[str, str]:
    """Return the host and host:port of a URL, empty where it has none or can't be read."""
    try:
        parts = urlsplit(url)
        return parts.hostname or "", parts.netloc
    except ValueError:  # e.g. an unclosed bracket
        return "", ""


def _no_body(receive: Receive) -> Receive:
    """Return a `receive` without the body: nothing of it is read before the answer."""
    sent = False

    async def read() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": b"", "more_body": False}
        while (message := await receive())["type"] == "http.request":
            await asyncio.sleep(0)
        return message

    return read


def is_loopback(host: str) -> bool:
    """Return whether a name or an address is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def refuse(error: RefusedError, send: Callable[[Message], Awaitable[None]]) -> None:
    """Send the answer to a refused request, and close the connection."""
    body, headers = refusal(error)
    headers |= {"content-length": str(len(body)), "connection": "close"}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
