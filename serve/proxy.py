"""A middleware in Ray Serve's HTTP proxies, which a request passes before any process of ours.

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.proxy:middlewares

The variable must be set where Ray is started, because its proxies are Ray's processes. `serve.app`
sets it when it starts a local Ray.

- Ray obeys some headers whoever sends them, and fails on those that are not UTF-8. Strangers' ones
  are dropped or refused here.
- Ray forwards a body without limit. Here it is bounded, of a request and of all.
- When an ingress dies, Ray answers its requests with 500. Here they are sent to another ingress,
  unless the answer has started: an edit has its seed, and is charged where it is answered.
"""

import asyncio
import json
import os
import re

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.schema import MAX_BODY_BYTES

VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
IMPORT_PATH = "serve.proxy:middlewares"

MAX_HEADER_BYTES, MAX_HEADERS = 32 * 2**10, 100
MAX_HELD = 2**30  # bytes of all bodies that were not answered yet
# Headers by which Ray's own components talk to its proxy: they switch off time limits and the end
# of abandoned requests, or choose replicas.
OF_RAY = {
    b"x-request-timeout-seconds",
    b"x-request-disconnect-disabled",
    b"x-session-id",
    b"serve-multiplexed-model-id",
}
OF_RAYS_ROUTER = b"x-serve-router-"
REQUEST_ID = re.compile(rb"[\w.-]{1,64}")
# Every answer of the application has this header, and no answer of Ray's proxy has.
OF_APPLICATION = b"x-content-type-options"
PAUSES = (0.1, 0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each retry


def middlewares() -> list[Middleware]:
    """Return what Ray Serve adds to each of its proxies."""
    return [Middleware(ProxyGuard)]


def install() -> None:
    """Have the proxies of a Ray that is started from here use the middleware."""
    os.environ[VARIABLE] = IMPORT_PATH


class ProxyGuard:
    """ASGI middleware. See the module."""

    def __init__(self, app: ASGIApp):
        self.app = app
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if problem := check_headers(scope["headers"]):
            return await refuse(*problem, send)
        body = _Body(self, receive)
        try:
            await self._answer({**scope, "headers": strangers(scope["headers"])}, body, send)
        finally:
            body.forget()

    async def _answer(self, scope: Scope, body: "_Body", send: Send) -> None:
        for pause in (*PAUSES, None):
            answer = _Answer(send, body)
            await self.app(scope, body.replayed(), answer.send)
            if answer.started or body.abandoned:
                return
            if pause is not None:
                await asyncio.sleep(pause)
        await refuse(503, "no part of the service could answer: retry later", send)


class _Body:
    """The messages of a request so far, so that they can be sent again until an answer starts."""

    def __init__(self, guard: ProxyGuard, receive: Receive):
        self._guard, self._receive = guard, receive
        self._messages: list[Message] = []
        self._size = 0  # of the whole body so far
        self._held = 0
        self._kept = True
        self.abandoned = False  # by the client

    def replayed(self) -> Receive:
        at = 0

        async def read() -> Message:
            nonlocal at
            if at == len(self._messages):
                await self._read()
            message = self._messages[at]
            at += 1
            if not self._kept:
                del self._messages[:at]
                at = 0
            return message

        return read

    async def _read(self) -> None:
        if self._size > MAX_BODY_BYTES:  # the application has enough to refuse it
            await asyncio.Event().wait()
        while self._guard.held > MAX_HELD:
            await asyncio.sleep(0.05)
        message = await self._receive()
        self.abandoned |= message["type"] == "http.disconnect"
        size = len(message.get("body", b""))
        self._size += size
        self._guard.held += size
        self._held += size
        self._messages.append(message)

    def forget(self) -> None:
        """Keep no message any longer than it takes to pass it on."""
        self._kept = False
        self._guard.held -= self._held
        self._held = 0


class _Answer:
    """Passes the application's answer on.

    Of a lost ingress Ray's proxy answers nothing (upon which its server says 500), or 503. started:
    an answer of the application is on its way.
    """

    def __init__(self, send: Send, body: _Body):
        self._send, self._body = send, body
        self.started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            of_application = any(name.lower() == OF_APPLICATION for name, _ in message.get("headers", []))
            if message["status"] < 500 or of_application:
                self.started = True
                self._body.forget()
        if self.started:
            await self._send(message)


def check_headers(headers: list[tuple[bytes, bytes]]) -> tuple[int, str] | None:
    """Return the status and the message of a refusal, None for headers that are in order."""
    size = sum(len(name) + len(value) for name, value in headers)
    if size > MAX_HEADER_BYTES or len(headers) > MAX_HEADERS:
        return 431, f"the headers are too large; send at most {MAX_HEADERS}, of {MAX_HEADER_BYTES} bytes together"
    for name, value in headers:
        try:
            name.decode()
            value.decode()
        except UnicodeDecodeError:
            return 400, f"header {name.decode(errors='replace')[:80]!r} is not UTF-8"
        # Its digits are checked by the application. Here a body is refused before any of it is read.
        if name.lower() == b"content-length" and value.isdigit() and int(value[:20]) > MAX_BODY_BYTES:
            return 413, f"the body has {value[:20].decode()} bytes, more than {MAX_BODY_BYTES}: send smaller images"
    return None


def strangers(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the headers without those that Ray would obey. A well-formed x-request-id is kept."""
    return [(name, value) for name, value in headers if _harmless(name.lower().replace(b"_", b"-"), value)]


def _harmless(name: bytes, value: bytes) -> bool:
    if name in OF_RAY or name.startswith(OF_RAYS_ROUTER):
        return False
    return name != b"x-request-id" or bool(REQUEST_ID.fullmatch(value))


async def refuse(status: int, message: str, send: Send) -> None:
    """Send an error in the shape of OpenAI's API, and close the connection."""
    body = json.dumps({"error": {"message": message, "type": "invalid_request_error", "param": None}}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        (OF_APPLICATION, b"nosniff"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
