"""Stores on loopback: S3 behind a proxy that misbehaves on demand, and the objects of GCS."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import httpx
from moto.s3.responses import S3Response

CONDITIONS = ("if-match", "if-none-match")


@contextmanager
def atomic_puts(monkeypatch) -> Iterator[None]:
    """Make moto's PUT atomic, as S3's is: it compares, and writes in a second step."""
    lock, put_object = threading.Lock(), S3Response.put_object

    def locked(self):
        with lock:
            return put_object(self)

    with monkeypatch.context() as patch:
        patch.setattr(S3Response, "put_object", locked)
        yield


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def body(self) -> bytes:
        """Read the request's body. pyarrow sends chunks, boto3 a length."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response_only(status)
        for name, value in {"Date": formatdate(usegmt=True), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


class ProxyHandler(Handler):
    """Forwards to `server.upstream`, as `server.mode` says.

    hang: never answer. ignore: drop conditions. refuse: 501 for conditions. lose: pass a
    conditional write on once, and answer 503.
    """

    def forward(self) -> None:
        server, body = self.server, self.body()
        conditional = any(name in self.headers for name in CONDITIONS)
        if server.mode == "hang":
            server.resumed.wait()
        if server.mode == "refuse" and conditional:
            return self.answer(501, b"<Error><Code>NotImplemented</Code></Error>")
        dropped = ("transfer-encoding", *(CONDITIONS if server.mode == "ignore" else ()))
        headers = [(k, v) for k, v in self.headers.items() if k.lower() not in dropped]
        url = server.upstream + self.path
        answer = server.client.request(self.command, url, headers=headers, content=body)
        if server.mode == "lose" and conditional:
            server.mode = "pass"
            return self.answer(503, b"<Error><Code>ServiceUnavailable</Code></Error>")
        keep = {
            name: value
            for name, value in answer.headers.items()
            if name not in ("content-length", "date", "connection")
        }
        if self.command == "HEAD":
            self.send_response_only(answer.status_code)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            return None
        return self.answer(answer.status_code, answer.content, **keep)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward  # noqa: N815


class Server(ThreadingHTTPServer):
    daemon_threads = True

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


class Proxy(Server):
    def __init__(self, upstream: str):
        super().__init__(("127.0.0.1", 0), ProxyHandler)
        self.upstream, self.mode = upstream, "pass"
        self.client = httpx.Client(timeout=30)
        self.resumed = threading.Event()

    def resume(self) -> None:
        self.mode = "pass"
        self.resumed.set()


class GcsHandler(Handler):
    """Reads and conditional uploads of Cloud Storage's JSON API."""

    def do_GET(self):
        name = unquote(urlsplit(self.path).path.rsplit("/o/", 1)[1])
        found = self.server.objects.get(name)
        if found is None:
            return self.answer(404)
        content, generation, written = found
        return self.answer(200, content, x_goog_generation=str(generation), Last_Modified=written)

    def do_POST(self):
        body, server = self.body(), self.server
        query = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
        if server.failures:
            server.failures -= 1
            return self.answer(503)
        with server.lock:
            found = server.objects.get(query["name"])
            if (found[1] if found else 0) != int(query["ifGenerationMatch"]):
                return self.answer(412)
            server.generation += 7
            written = formatdate(usegmt=True)
            server.objects[query["name"]] = (body, server.generation, written)
        return self.answer(200, json.dumps({"generation": str(server.generation)}).encode())


class Gcs(Server):
    """`failures`: how many of the next uploads get a 503."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), GcsHandler)
        self.objects, self.lock = {}, threading.Lock()
        self.generation, self.failures = 1000, 0

    def location(self, path: str) -> str:
        return f"gs://anonymous@bucket/{path}?scheme=http&endpoint_override={self.address}"
