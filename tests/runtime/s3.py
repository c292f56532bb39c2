"""An S3 server on loopback, the environment in which pyarrow finds it, and a proxy that counts requests."""

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import boto3
import httpx
from moto.server import ThreadedMotoServer

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Serves a bucket named `bucket`; yields environment variables."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    try:
        client(address).create_bucket(Bucket="bucket")
        yield {**KEYS, "AWS_ENDPOINT_URL": address}
    finally:
        httpx.post(f"{address}/moto-api/reset", timeout=60)  # moto's buckets are the process's
        server.stop()


def client(address: str):  # boto3 makes its types at run time
    names = {"aws_access_key_id": KEYS["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": KEYS["AWS_SECRET_ACCESS_KEY"]}
    return boto3.client("s3", endpoint_url=address, region_name="us-east-1", **names)


def enforce_authorization(address: str) -> None:
    """From now on keys must be known to the server, and allowed what they ask for."""
    httpx.post(f"{address}/moto-api/reset-auth", content=b"0", timeout=60).raise_for_status()


@contextmanager
def counting_proxy(address: str, folder: str, on_write: Callable[[int, int], None]) -> Iterator[str]:
    """Serve `address` at another address, which is yielded.

    After the server has carried out the n-th request that writes below `folder`, and before the client
    has the answer, `on_write(n, port of the client)` is called. n counts from 1.
    """
    server, lock, writes = urlsplit(address), threading.Lock(), 0

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            nonlocal writes
            body = self._read_body()
            hop = ("transfer-encoding", "connection", "expect", "content-length")
            headers = {name: value for name, value in self.headers.items() if name.lower() not in hop}
            upstream = http.client.HTTPConnection(server.hostname or "", server.port, timeout=60)
            upstream.request(self.command, self.path, body, headers)
            answer = upstream.getresponse()
            content = answer.read()
            if self.command in ("PUT", "POST", "DELETE") and f"/{folder}/" in self.path:
                with lock:
                    writes += 1
                    number = writes
                on_write(number, self.client_address[1])
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else len(content)
            self.send_header("Content-Length", str(length or 0))
            self.end_headers()
            self.wfile.write(content)

        def _read_body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """Clients are killed here: that their connections break is no error."""

    proxy = Quiet(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{proxy.server_address[1]}"
    finally:
        proxy.shutdown()
