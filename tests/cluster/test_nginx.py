"""cluster/nginx/ip2p.conf in a real nginx before a real server."""

import asyncio
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from ip2p.recipe import REPOSITORY
from tests.serve.conftest import free_port

NGINX = shutil.which("nginx") or "/usr/sbin/nginx"
pytestmark = pytest.mark.skipif(not Path(NGINX).exists(), reason="no nginx: apt-get install nginx-light")
CONFIG = REPOSITORY / "cluster" / "nginx" / "ip2p.conf"
MANY = b"\r\n".join(b"a%d: " % k + b"x" * 900 for k in range(99))
SEEN: list[dict[str, str]] = []


async def application(scope, receive, send) -> None:
    """Answer with the size of the body, and at /events with three events 0.3 s apart."""
    if scope["type"] != "http":
        return
    SEEN.append({name.decode(): value.decode() for name, value in scope["headers"]})
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    if scope["path"] == "/events":
        for k in range(3):
            await send({"type": "http.response.body", "body": b"data: %d\n\n" % k, "more_body": True})
            await asyncio.sleep(0.3)
    await send({"type": "http.response.body", "body": b"%d" % size})


@pytest.fixture(scope="module")
def front(tmp_path_factory) -> Iterator[tuple[int, ssl.SSLContext]]:
    """The port of nginx, and what trusts its certificate. Its time limits are a tenth of the shipped ones."""
    folder, behind, port = tmp_path_factory.mktemp("nginx"), free_port(), free_port()
    made = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -days 1 -keyout tls.key -out tls.crt"
    made += " -addext subjectAltName=DNS:localhost"
    subprocess.run(made.split(), cwd=folder, check=True, capture_output=True, timeout=60)
    text = CONFIG.read_text().replace("127.0.0.1:8000", f"127.0.0.1:{behind}").replace("listen 443", f"listen {port}")
    text = text.replace("/etc/nginx/tls", str(folder)).replace("ip2p.example.com", "localhost")
    text = re.sub(r"(client_\w+_timeout) (\d+)0s", r"\1 \2s", text)
    user = "user root;" if os.getuid() == 0 else ""  # or its workers may not write to the folder
    (folder / "nginx.conf").write_text(
        f"{user} daemon off; pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
        f"http {{ access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;\n"
        f"fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;\n{text} }}"
    )
    server = uvicorn.Server(uvicorn.Config(application, port=behind, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    nginx = subprocess.Popen([NGINX, "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")])
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert nginx.poll() is None, (folder / "error.log").read_text()
            time.sleep(0.1)
        yield port, ssl.create_default_context(cafile=folder / "tls.crt")
    finally:
        nginx.terminate()
        nginx.wait(20)
        server.should_exit = True
        thread.join(20)


def client(front) -> httpx.Client:
    port, context = front
    return httpx.Client(base_url=f"https://localhost:{port}", verify=context, timeout=30)


def connect(front) -> ssl.SSLSocket:
    port, context = front
    return context.wrap_socket(socket.create_connection(("localhost", port), timeout=30), server_hostname="localhost")


def test_a_request_passes_over_https(front):
    with client(front) as https:
        assert https.post("/v1/edits", content=b"x" * 5_000_000).text == "5000000"


def test_events_are_passed_on_at_once(front):
    with client(front) as https, https.stream("POST", "/events", content=b"{}") as answer:
        arrived = [time.monotonic() for _ in answer.iter_raw()]
    assert len(arrived) >= 3
    assert arrived[-1] - arrived[0] > 0.4, "they came together"


def test_a_large_body_is_refused_before_it_is_sent(front):
    with connect(front) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % (64 * 2**20 + 1))
        assert b" 413 " in connection.recv(4096)


@pytest.mark.parametrize("start", [b"G", b"POST / HTTP/1.1\r\nhost: localhost\r\nx-slow: "])
def test_a_client_that_sends_no_whole_header_is_closed(front, start):
    began = time.monotonic()
    with connect(front) as connection:
        connection.sendall(start)
        assert end_of(connection) in (b"", b"HTTP/1.1 408")
    assert 0.5 < time.monotonic() - began < 10


def test_a_slow_body_never_reaches_the_endpoint(front):
    before, began = len(SEEN), time.monotonic()
    with connect(front) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\nx")
        assert end_of(connection) in (b"", b"HTTP/1.1 408")
    assert 2 < time.monotonic() - began < 20
    assert len(SEEN) == before


def end_of(connection: ssl.SSLSocket) -> bytes:
    """Wait until the server closes the connection, and return the start of what it said."""
    said = b""
    try:
        while piece := connection.recv(4096):
            said += piece
    except (ConnectionResetError, ssl.SSLEOFError):
        pass
    return said[:12]


@pytest.mark.parametrize("header", [b"cookie: " + b"x" * 40_000, MANY])
def test_large_headers_are_refused(front, header):
    with connect(front) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n" + header + b"\r\n\r\n")
        assert b" 400 " in connection.recv(4096)


def test_one_address_has_a_limit_of_connections(front):
    with client(front) as https:
        streams = []
        try:
            for _ in range(70):
                connection = connect(front)
                streams.append(connection)
                connection.sendall(b"POST /events HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n")
            refused = https.post("/events", content=b"")
            assert refused.status_code == 429
        finally:
            for connection in streams:
                connection.close()


def test_headers_that_ray_obeys_are_dropped_and_ours_are_set(front):
    sent = {"x-request-disconnect-disabled": "?1", "x-request-timeout-seconds": "0", "x-forwarded-for": "127.0.0.1"}
    time.sleep(1)  # the requests of the test before
    with client(front) as https:
        assert https.get("/", headers=sent | {"x-request-id": "mine"}).status_code == 200
    seen = SEEN[-1]
    assert not {"x-request-disconnect-disabled", "x-request-timeout-seconds"} & set(seen)
    assert seen["x-request-id"] != "mine" and len(seen["x-request-id"]) == 32
    assert seen["x-forwarded-proto"] == "https"
