"""Workspaces in a bucket, against a real S3 protocol server on loopback."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ip2p.recipe import REPOSITORY
from ip2p.workspace import Workspace
from jobs import reproduce
from runtime import lease
from runtime.job import job
from tests.runtime import s3


@pytest.fixture
def bucket(monkeypatch):
    """Address of the server."""
    with s3.s3_server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield environment["AWS_ENDPOINT_URL"]


def test_a_workspace_in_a_bucket_is_like_a_folder(bucket):
    workspace = Workspace("s3://bucket/run")
    assert not workspace.exists("pairs") and workspace.files() == [] and workspace.run() == {}
    for name, values in (("2", [3]), ("1", [1, 2])):
        with workspace.open_out("pairs", f"{name}.parquet") as file:
            pq.write_table(pa.table({"a": values}), file)
    workspace.mark_done("pairs", rows=3)
    workspace.record("generate_pairs", rows=3)
    again = Workspace("s3://bucket/run/")
    assert again.read_table("pairs")["a"].to_pylist() == [1, 2, 3]
    assert again.done("pairs") and again.counts("pairs") == {"rows": 3}
    assert again.run()["stages"]["generate_pairs"]["rows"] == 3
    assert all(not name.endswith(".part") for name in again.files())


def test_one_run_at_a_time_in_a_bucket(bucket, capsys):
    workspace = Workspace("s3://bucket/run")
    with job("train", workspace):
        with pytest.raises(SystemExit), job("evaluate", Workspace("s3://bucket/run")):
            raise AssertionError("let in")
        assert "s3://bucket/run is written by train" in capsys.readouterr().err
    assert '"released": true' in workspace.open_in(lease.OWNER).read().decode()


class SlowDown(BaseHTTPRequestHandler):
    """Answers everything as S3 does when it is asked too often."""

    def do_PUT(self):
        body = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your rate.</Message></Error>"
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(503)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_DELETE = do_PUT  # noqa: N815

    def log_message(self, *_):
        pass


def refused(capsys, location: str) -> str:
    """What is said before anything starts: with whole stages, so with their engines, left."""
    flags = ["--recipe", str(REPOSITORY / "recipes/miniature.yaml"), "--workspace", location]
    with pytest.raises(SystemExit) as end:
        reproduce.main(flags)
    assert end.value.code == 2
    said = capsys.readouterr()
    assert "1/5" not in said.out and "Traceback" not in said.err
    assert said.err.startswith(f"error: workspace {location}: ")
    return said.err


def test_what_is_wrong_with_the_storage_is_told_first(bucket, monkeypatch, capsys):
    assert "there is no such bucket" in refused(capsys, "s3://nobucket/run")
    s3.enforce_authorization(bucket)
    assert "AWS_ACCESS_KEY_ID" in refused(capsys, "s3://bucket/run"), "keys that the server does not know"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert "AWS_ENDPOINT_URL" in refused(capsys, "s3://bucket/run")
    slow = ThreadingHTTPServer(("127.0.0.1", 0), SlowDown)
    threading.Thread(target=slow.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{slow.server_address[1]}")
    assert "asked too often" in refused(capsys, "s3://bucket/run")
    slow.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(1700)
def test_the_whole_paper_in_a_bucket(bucket, capsys):
    """All five stages at their smallest, and again: what is done is not done again."""
    flags = ["--recipe", str(REPOSITORY / "recipes" / "miniature.yaml"), "--workspace", "s3://bucket/run"]
    smallest = {
        "captions.count": 24, "pairs.candidates": 3, "pairs.steps": 8, "dataset.validation_fraction": 0.3,
        "train.steps": 4, "train.checkpoint_every": 2, "sampling.steps": 4, "evaluate.images": 12,
        "evaluate.grid_images": 1, "evaluate.pair_captions": 4, "evaluate.pair_candidates": 2,
        "evaluate.shipped": "false",
    }  # fmt: skip
    flags += [part for key, value in smallest.items() for part in (f"--{key}", str(value))]
    reproduce.main(flags)
    workspace = Workspace("s3://bucket/run")
    assert all(workspace.done(stage) for stage in ("instructions", "pairs", "dataset", "model", "evaluation"))
    assert workspace.fs.get_file_info(workspace.path("report.html")).size > 100_000
    assert "s3://bucket/run/report.html" in capsys.readouterr().out
    ids = workspace.read_table("pairs", columns=["caption_id"])["caption_id"].to_pylist()
    assert len(ids) == len(set(ids)) == workspace.counts("instructions")["captions"]
    before = {path: workspace.fs.get_file_info(path).mtime for path in workspace.files("pairs")}
    reproduce.main(flags)
    assert {path: workspace.fs.get_file_info(path).mtime for path in before} == before
