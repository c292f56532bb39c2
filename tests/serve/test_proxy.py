"""The proxy middleware on its own. Real Ray proxies are tested in test_hostile.py and test_load.py."""

import asyncio
import json

import pytest

from serve import proxy
from serve.proxy import MAX_HEADER_BYTES, MAX_HEADERS, OF_APPLICATION, ProxyGuard
from serve.schema import MAX_BODY_BYTES

OURS = [(OF_APPLICATION, b"nosniff")]


class Application:
    """An application that reads the body and answers with the statuses in turn.

    Those of Ray have no header of ours, and for 500 it sends nothing.
    """

    def __init__(self, *statuses: int, of_ray: set[int] = frozenset({500, 503}), reads: bool = True):
        self.statuses, self.of_ray, self.reads = list(statuses), of_ray, reads
        self.bodies: list[bytes] = []
        self.headers: list[list[tuple[bytes, bytes]]] = []

    async def __call__(self, scope, receive, send) -> None:
        self.headers.append(scope["headers"])
        body, more = b"", self.reads
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.bodies.append(body)
        status = self.statuses.pop(0)
        if status == 500 and status in self.of_ray:  # upon which uvicorn would answer
            return
        await send({"type": "http.response.start", "status": status, "headers": [] if status in self.of_ray else OURS})
        await send({"type": "http.response.body", "body": b"%d" % status})


def ask(application: Application, *pieces: bytes, headers=()) -> tuple[int, bytes, ProxyGuard]:
    """Return the status and the body of the answer."""
    guard, sent = ProxyGuard(application), []
    messages = [
        {"type": "http.request", "body": piece, "more_body": k < len(pieces) - 1} for k, piece in enumerate(pieces)
    ]

    async def receive():
        return messages.pop(0) if messages else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    asyncio.run(guard({"type": "http", "headers": list(headers)}, receive, send))
    starts = [message for message in sent if message["type"] == "http.response.start"]
    assert len(starts) == 1
    assert guard.held == 0
    return starts[0]["status"], b"".join(message.get("body", b"") for message in sent), guard


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(proxy, "PAUSES", (0.0, 0.0, 0.0))


def test_answers_of_the_application_pass(hurried):
    for status in (200, 404, 503):
        application = Application(status, of_ray=set())
        assert ask(application, b"a", b"b")[:2] == (status, b"%d" % status)
        assert application.bodies == [b"ab"]


def test_a_lost_ingress_is_replaced_and_gets_the_whole_body(hurried):
    application = Application(500, 503, 200)
    assert ask(application, b"a", b"b", b"c")[:2] == (200, b"200")
    assert application.bodies == [b"abc"] * 3


def test_a_body_that_was_replayed_in_part_is_read_to_its_end(hurried):
    """The answer starts, and the body is kept no longer, while earlier pieces still wait."""

    class Early(Application):
        async def __call__(self, scope, receive, send) -> None:
            if not self.bodies:
                await super().__call__(scope, receive, send)
                return
            await receive()
            await send({"type": "http.response.start", "status": 200, "headers": OURS})
            self.bodies.append(b"".join([(await receive())["body"] for _ in range(2)]))
            await send({"type": "http.response.body", "body": b""})

    application = Early(500)
    assert ask(application, b"a", b"b", b"c")[0] == 200
    assert application.bodies == [b"abc", b"bc"]


def test_a_service_that_stays_lost_is_said_to_be(hurried):
    application = Application(500, 503, 500, 500)
    status, body, _ = ask(application, b"a")
    assert status == 503
    assert "retry later" in json.loads(body)["error"]["message"]
    assert len(application.bodies) == 4


def test_a_bug_of_the_application_is_not_retried(hurried):
    application = Application(500, of_ray=set())
    assert ask(application, b"a")[0] == 500
    assert len(application.bodies) == 1


def test_a_client_that_left_gets_no_retry(hurried):
    calls = 0

    async def application(scope, receive, send) -> None:
        nonlocal calls
        calls += 1
        await receive()

    async def receive():
        return {"type": "http.disconnect"}

    asyncio.run(ProxyGuard(application)({"type": "http", "headers": []}, receive, None))
    assert calls == 1


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([(b"x-request-id", b"\xff")], 400),
        ([(b"x-request-timeout-seconds", b"\xc3(")], 400),
        ([(b"anything", b"\xf0\x28\x8c\xbc")], 400),
        ([(b"\xff", b"a")], 400),
        ([(b"a", b"b")] * (MAX_HEADERS + 1), 431),
        ([(b"a", b"b" * MAX_HEADER_BYTES)], 431),
        ([(b"content-length", b"%d" % (MAX_BODY_BYTES + 1))], 413),
        ([(b"content-length", b"9" * 5000)], 413),
        ([(b"content-length", b"-1"), (b"x", "夜".encode())], 200),
        ([(b"cookie", b"b" * (MAX_HEADER_BYTES - 9))], 200),
    ],
)
def test_headers_are_checked_before_ray_reads_them(headers, status):
    application = Application(200)
    assert ask(application, b"", headers=headers)[0] == status
    assert len(application.bodies) == (status == 200)


def test_headers_that_ray_obeys_are_dropped():
    kept = [(b"accept", b"*/*"), (b"x-request-id", b"a-1.B_2"), (b"authorization", b"Bearer x")]
    dropped = [
        (b"x-request-disconnect-disabled", b"?1"),
        (b"X-Request-Timeout-Seconds", b"0"),
        (b"x_session_id", b"1"),
        (b"serve_multiplexed_model_id", b"1"),
        (b"Serve-Multiplexed-Model-Id", b"1"),
        (b"x-serve-router-anything", b"1"),
        (b"x-request-id", b"a b"),
        (b"x-request-id", b"a" * 65),
    ]
    application = Application(200)
    ask(application, b"", headers=kept + dropped)
    assert application.headers == [kept]


def test_a_body_without_end_is_not_read_to_its_end():
    piece = bytes(2**20)
    application = Application(413, reads=False)
    read = 0

    class Reader(Application):
        async def __call__(self, scope, receive, send) -> None:
            nonlocal read
            try:
                async with asyncio.timeout(0.2):
                    while True:
                        read += len((await receive())["body"])
            except TimeoutError:
                await super().__call__(scope, receive, send)

    application = Reader(413, reads=False)
    assert ask(application, *[piece] * 80)[0] == 413
    assert read == MAX_BODY_BYTES + len(piece)


def test_all_bodies_together_are_bounded(monkeypatch):
    monkeypatch.setattr(proxy, "MAX_HELD", 10)
    sizes = []

    async def application(scope, receive, send) -> None:
        for _ in range(2):
            await receive()
            sizes.append(guard.held)
            await asyncio.sleep(0)
        await send({"type": "http.response.start", "status": 200, "headers": OURS})

    guard = ProxyGuard(application)

    async def request() -> None:
        messages = [{"type": "http.request", "body": bytes(6), "more_body": True}] * 2

        async def receive():
            return messages.pop()

        async def send(_):
            pass

        await guard({"type": "http", "headers": []}, receive, send)

    async def several() -> None:
        await asyncio.wait_for(asyncio.gather(request(), request()), 0.5)

    with pytest.raises(TimeoutError):
        asyncio.run(several())
    assert max(sizes) <= 12 + 6


def test_websockets_are_refused():
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(ProxyGuard(Application())({"type": "websocket", "headers": []}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
