"""Publishing by the real client of the hub, against a hub on loopback that keeps what it is sent."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi, constants

from ip2p.recipe import ClipRef, GrammarCaptions, ModelRef, Models, Recipe
from ip2p.workspace import Workspace
from jobs import publish


class Hub(BaseHTTPRequestHandler):
    """The calls that an upload of small files makes."""

    def do_GET(self):
        self.answer(404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.calls.append((self.path, self.headers.get("Authorization"), body))
        if self.path == "/api/repos/create":
            named = json.loads(body)
            self.answer(200, {"url": f"{self.server.address}/datasets/{named['organization']}/{named['name']}"})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self.answer(200, {"files": modes})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                value = json.loads(line)["value"]
                if "content" in value:
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            url = f"{self.server.address}/datasets/me/pairs/commit/1"
            self.answer(200, {"success": True, "commitOid": "1" * 40, "commitUrl": url})
        else:
            self.answer(404, {"error": self.path})

    def answer(self, status, value, headers=None):
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.calls, server.files = [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(publish, "HfApi", lambda: HfApi(endpoint=server.address, token="hf_secret"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()


@pytest.fixture
def recipe():
    ref = ModelRef(path="a/b")
    models = Models(text_to_image=ref, clip=ClipRef(name="ViT-B-32", pretrained="openai"), llm=ref, editor=ref)
    return Recipe(name="smallest", models=models, captions=GrammarCaptions())


@pytest.fixture
def workspace(tmp_path):
    workspace = Workspace(tmp_path)
    for split in ("train", "validation"):
        with workspace.open_out("dataset", split, "part.parquet") as file:
            pq.write_table(pa.table({"edit_prompt": [f"an instruction of {split}"]}), file)
    workspace.mark_done("dataset", train=1, validation=1, test=0)
    return workspace


def test_nothing_is_sent_until_it_is_said(recipe, workspace, hub, capsys):
    publish.run(recipe, workspace, publish.Flags(dataset_repo="me/pairs"))
    printed = capsys.readouterr().out
    assert "train/part.parquet" in printed and "to me/pairs" in printed and "--yes sends it" in printed
    assert "_SUCCESS" not in printed and hub.calls == []


def test_the_folder_arrives_with_a_card(recipe, workspace, hub, capsys):
    publish.run(recipe, workspace, publish.Flags(dataset_repo="me/pairs", private=True, yes=True))
    created = json.loads(hub.calls[0][2])
    assert (created["name"], created["organization"], created["type"]) == ("pairs", "me", "dataset")
    assert created.get("private") or created.get("visibility") == "private"
    assert {authorization for _, authorization, _ in hub.calls} == {"Bearer hf_secret"}
    assert set(hub.files) == {"README.md", "train/part.parquet", "validation/part.parquet"}
    assert hub.files["train/part.parquet"] == (workspace.open_in("dataset", "train", "part.parquet").read())
    card = hub.files["README.md"].decode()
    assert "- train: 1 pairs\n- validation: 1 pairs\n" in card and "test:" not in card and "name: smallest" in card
    assert f"{hub.address}/datasets/me/pairs/commit/1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "name one at least"),
        ({"model_repo": "me/editor", "dataset_repo": "me/pairs"}, "/model is not complete: run jobs.train first"),
    ],
)
def test_what_can_not_be_published_is_said_before_anything_is_sent(recipe, workspace, hub, flags, message):
    with pytest.raises(ValueError, match=message):
        publish.run(recipe, workspace, publish.Flags(**flags, yes=True))
    assert hub.calls == []
