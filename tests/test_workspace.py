import json

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from ip2p.workspace import Workspace


def write(workspace: Workspace, table: pa.Table, *parts: str):
    with workspace.open_out(*parts) as file:
        pq.write_table(table, file)


def test_local_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace = Workspace("run")
    assert workspace.path("pairs") == workspace.uri("pairs") == f"{tmp_path}/run/pairs"
    assert Workspace(f"file://{tmp_path}/run/").uri("pairs") == f"{tmp_path}/run/pairs"
    assert not (tmp_path / "run").exists(), "nothing is made before it is written to"


def test_bucket_addresses_keep_scheme_and_query():
    workspace = Workspace("s3://bucket/run?region=eu-west-1")
    assert isinstance(workspace.fs, pafs.S3FileSystem)
    assert workspace.path("pairs") == "bucket/run/pairs"
    assert workspace.uri("pairs", "a.parquet") == "s3://bucket/run/pairs/a.parquet?region=eu-west-1"


def test_bucket_addresses_keep_who_asks_but_may_hold_no_keys():
    workspace = Workspace("gs://anonymous@bucket/run?endpoint_override=127.0.0.1:1&scheme=http")
    assert workspace.path("pairs") == "bucket/run/pairs"
    assert workspace.uri("pairs") == "gs://anonymous@bucket/run/pairs?endpoint_override=127.0.0.1:1&scheme=http"
    with pytest.raises(ValueError, match=r"s3://\.\.\.@bucket/run: .*AWS_ACCESS_KEY_ID") as refused:
        Workspace("s3://me:secret@bucket/run")
    assert "secret@" not in str(refused.value)


@pytest.mark.parametrize("location", ["ftp://host/x", "s3//:x://"])
def test_unknown_schemes_are_refused(location):
    with pytest.raises(ValueError, match="give a local path, s3://"):
        Workspace(location)


def test_tables_come_back_in_order_of_file(tmp_path):
    workspace = Workspace(tmp_path)
    write(workspace, pa.table({"a": [3], "b": ["z"]}), "pairs", "2.parquet")
    write(workspace, pa.table({"a": [1, 2], "b": ["x", "y"]}), "pairs", "1.parquet")
    workspace.mark_done("pairs", rows=3)
    assert workspace.read_table("pairs").to_pydict() == {"a": [1, 2, 3], "b": ["x", "y", "z"]}
    assert workspace.read_table("pairs", columns=["a"]).column_names == ["a"]


def test_a_missing_table_names_the_stage(tmp_path):
    with pytest.raises(ValueError, match=r"no dataset/train/\*\.parquet .* run the stage that writes dataset/train/"):
        Workspace(tmp_path).read_table("dataset", "train")


def test_done(tmp_path):
    workspace = Workspace(tmp_path)
    assert not workspace.done("pairs")
    with workspace.open_out("pairs", "half.parquet") as file:
        file.write(b"x")
    assert workspace.exists("pairs")
    assert not workspace.done("pairs")
    workspace.mark_done("pairs", rows=7, accepted=3)
    assert workspace.done("pairs")
    assert workspace.counts("pairs") == {"rows": 7, "accepted": 3}
    assert [path.rsplit("/", 1)[1] for path in workspace.files("pairs")] == ["_SUCCESS", "half.parquet"]


def test_an_empty_folder_does_not_exist(tmp_path):
    (tmp_path / "pairs").mkdir()
    workspace = Workspace(tmp_path)
    assert not workspace.exists("pairs")
    assert not workspace.exists("nothing")
    assert workspace.files("nothing") == []


def test_run_json_gathers_what_the_stages_record(tmp_path):
    workspace = Workspace(tmp_path)
    assert workspace.run() == {}
    workspace.record("pairs", recipe={"name": "x"}, rows=3, seconds=1.5)
    workspace.record("train", steps=10)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["recipe"] == {"name": "x"}
    assert run["stages"]["pairs"]["rows"] == 3
    assert run["stages"]["train"]["steps"] == 10
    assert "torch" in run["versions"]
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"], "no partial file stays"
