"""A model hub on loopback: the calls by which huggingface_hub lists and downloads small files."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "1" * 40


class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.calls.append(self.path)
        path = self.path.split("?")[0]
        files: dict[str, bytes] = self.server.files
        if path == f"/api/models/me/tiny/revision/{COMMIT}":
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            self.answer(json.dumps({"id": "me/tiny", "sha": COMMIT, "siblings": siblings}).encode())
        elif path == f"/api/models/me/tiny/tree/{COMMIT}":
            entries = [{"type": "file", "path": n, "oid": sha(d), "size": len(d)} for n, d in files.items()]
            self.answer(json.dumps(entries).encode())
        elif path.startswith(f"/me/tiny/resolve/{COMMIT}/"):
            data = files[path.removeprefix(f"/me/tiny/resolve/{COMMIT}/")]
            self.answer(data, {"X-Repo-Commit": COMMIT, "ETag": f'"{sha(data)}"'})
        else:
            self.send_error(404)

    do_HEAD = do_GET  # noqa: N815

    def answer(self, data: bytes, headers: dict[str, str] | None = None):
        self.send_response(200)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


def sha(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def hub(files: dict[str, bytes]) -> Iterator[ThreadingHTTPServer]:
    """Has the repository me/tiny with `files` at COMMIT."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.calls = files, []  # pyright: ignore[reportAttributeAccessIssue]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
