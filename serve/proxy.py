"""A middleware in Ray Serve's HTTP proxies, which a request passes before any process of ours.

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.proxy:middlewares

The variable must be set where Ray is started, because its proxies are Ray's processes. `serve.app`
sets it when it starts a local Ray.

- Ray obeys some control headers from any client and fails on headers that are not UTF-8. The first
  are dropped here, the second refused.
- Ray forwards bodies without a limit. Here each body and their sum are bounded.
- Ray answers 500 for requests of an ingress that died. Here they are retried on another ingress,
  unless the answer has started.
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
# Control headers between Ray's own components. They switch off time limits and the cancelling of
# abandoned requests, or choose replicas.
CONTROL = {
    b"x-request-timeout-seconds",
    b"x-request-disconnect-disabled",
    b"x-session-id",
    b"serve-multiplexed-model-id",
}
CONTROL_PREFIX = b"x-serve-router-"
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
    """The ASGI middleware that the module describes."""

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
            await self._answer({**scope, "headers": without_control(scope["headers"])}, body, send)
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
        """Stop keeping messages for a retry."""
        self._kept = False
        self._guard.held -= self._held
        self._held = 0


class _Answer:
    """Passes the application's answer on.

    For a lost ingress Ray's proxy sends nothing (upon which its server answers 500), or a 503 of its
    own, which is dropped. started: an answer of the application is being sent.
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


def without_control(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the headers that Ray does not obey. A well-formed x-request-id is kept."""
    return [(name, value) for name, value in headers if _harmless(name.lower().replace(b"_", b"-"), value)]


def _harmless(name: bytes, value: bytes) -> bool:
    if name in CONTROL or name.startswith(CONTROL_PREFIX):
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
