import csv
import gzip
import json
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ip2p.captions import source
from ip2p.captions.source import file_captions, hub_captions
from ip2p.recipe import FileCaptions, HubCaptions

CAPTIONS = ["a dog", "", "12", "NA", 'a cat,\non a "mat" — 🙂', "a dog"]


def read(path: Path | str, **keys) -> list[str]:
    return list(file_captions(FileCaptions(path=str(path), column="TEXT", **keys)))


def write_parquet(path: Path, captions: list[str | None] = CAPTIONS) -> Path:
    pq.write_table(pa.table({"url": ["http://…"] * len(captions), "TEXT": pa.array(captions, pa.string())}), path)
    return path


def write_jsonl(path: Path, captions: list[str] = CAPTIONS) -> Path:
    # Another column changes its type from line to line.
    lines = [json.dumps({"url": [1, "x", None][k % 3], "TEXT": caption}) for k, caption in enumerate(captions)]
    path.write_text("\n\n".join(lines) + "\n")
    return path


def write_csv(path: Path, captions: list[str] = CAPTIONS) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["url", "TEXT"], *(["http://…", caption] for caption in captions)])
    return path


WRITERS = {".parquet": write_parquet, ".jsonl": write_jsonl, ".csv": write_csv}


@pytest.mark.parametrize("ending", WRITERS)
def test_captions_come_as_they_are_from_every_format(tmp_path, ending):
    file = WRITERS[ending](tmp_path / f"a{ending}")
    assert read(file) == CAPTIONS
    assert read(file, limit=3) == CAPTIONS[:3]
    assert read(f"file://{file}") == CAPTIONS


@pytest.mark.parametrize("ending", WRITERS)
def test_a_folder_is_read_in_order_of_name(tmp_path, ending):
    for name, caption in [("b", "second"), ("a", "first"), ("c", "third")]:
        WRITERS[ending](tmp_path / f"{name}{ending}", [caption])
    (tmp_path / "_SUCCESS").write_text("{}")
    assert read(tmp_path) == ["first", "second", "third"]
    assert read(tmp_path, limit=2) == ["first", "second"]


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_compressed_text_is_unpacked(tmp_path, ending):
    plain = WRITERS[ending](tmp_path / f"a{ending}")
    zipped = tmp_path / f"zipped{ending}.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    assert read(zipped) == CAPTIONS


def test_a_missing_caption_is_empty(tmp_path):
    assert read(write_parquet(tmp_path / "a.parquet", ["a dog", None])) == ["a dog", ""]
    (tmp_path / "a.jsonl").write_text('{"TEXT": "a dog"}\n{"TEXT": null}\n{"url": "x"}\n')
    assert read(tmp_path / "a.jsonl") == ["a dog", "", ""]


def test_what_is_no_text_is_marked_and_the_rest_is_read(tmp_path):
    broken = pa.array([b"a \xff dog", b"a cat"], pa.binary())
    text = pa.StringArray.from_buffers(2, *broken.buffers()[1:])
    pq.write_table(pa.table({"TEXT": text}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_bytes(b'{"TEXT": "a \xff dog"}\n{"TEXT": "a cat"}\n')
    (tmp_path / "a.csv").write_bytes(b"TEXT\na \xff dog\na cat\n")
    for name in ("a.parquet", "a.jsonl", "a.csv"):
        assert read(tmp_path / name) == ["a \ufffd dog", "a cat"], name
    (tmp_path / "half.jsonl").write_text('{"TEXT": "a \\ud83d dog"}\n{"TEXT": "\\ud83d\\ude42"}\n{"TEXT": 12}\n')
    assert read(tmp_path / "half.jsonl") == ["a \ufffd dog", "🙂", "12"]


def test_text_is_text_however_parquet_holds_it(tmp_path):
    for name, array in [
        ("large", pa.array(CAPTIONS, pa.large_string())),
        ("view", pa.array(CAPTIONS, pa.string_view())),
        ("dictionary", pa.array(CAPTIONS).dictionary_encode()),
    ]:
        pq.write_table(pa.table({"TEXT": array}), tmp_path / f"{name}.parquet")
        assert read(tmp_path / f"{name}.parquet") == CAPTIONS, name


def test_captions_are_read_as_they_are_asked_for(tmp_path, monkeypatch):
    # What stands behind the first rows is not looked at.
    file = write_jsonl(tmp_path / "a.jsonl")
    file.write_text(file.read_text() + "not JSON\n")
    captions = file_captions(FileCaptions(path=str(file), column="TEXT"))
    assert list(islice(captions, len(CAPTIONS))) == CAPTIONS
    with pytest.raises(ValueError, match=r"captions\.path: line 12 of .* is not JSON"):
        next(captions)
    monkeypatch.setattr(source, "ROWS_PER_BATCH", 2)
    assert read(write_parquet(tmp_path / "a.parquet")) == CAPTIONS


@pytest.mark.parametrize(
    ("files", "column", "message"),
    [
        ({}, "TEXT", r"captions\.path: there is nothing at"),
        ({"a.txt": "a dog"}, "TEXT", r"a\.txt is none.*name a file, or a folder"),
        ({"_SUCCESS": "{}"}, "TEXT", r"files of one format, .*there are none"),
        ({"a.csv": "TEXT\nx\n", "b.jsonl": '{"TEXT": "x"}\n'}, "TEXT", r"there are csv and jsonl"),
        ({"a.csv": "url,TEXT\nx,y\n"}, "caption", r"captions\.column: 'caption' is not in .*a\.csv, url, TEXT are"),
        ({"a.jsonl": '{"url": 1, "TEXT": "y"}\n'}, "caption", r"captions\.column: 'caption' is not in .*url, TEXT are"),
        ({"a.csv": "TEXT\nx\n", "b.csv": "url\nx\n"}, "TEXT", r"captions\.column: 'TEXT' is not in .*b\.csv"),
        ({"a.jsonl": '{"TEXT": ["x"]}\n'}, "TEXT", r"'TEXT' in line 1 of .* holds a list, not text"),
        ({"a.jsonl": '["x"]\n'}, "TEXT", r"line 1 of .* is not a JSON object"),
        (
            {"a.csv": "url,TEXT\nx,a dog, red\n"},
            "TEXT",
            r"captions\.path: .*a\.csv cannot be read: .*Expected 2 columns",
        ),
        ({"a.parquet": "no parquet"}, "TEXT", r"captions\.path: .*a\.parquet cannot be read"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path, files, column, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        list(file_captions(FileCaptions(path=str(tmp_path), column=column)))


def test_a_column_of_numbers_is_no_text(tmp_path):
    pq.write_table(pa.table({"TEXT": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"captions\.column: 'TEXT' of .* holds int64, not text"):
        read(tmp_path)


def test_a_dataset_is_streamed_by_the_hubs_own_library(tmp_path):
    write_parquet(tmp_path / "train.parquet", ["a dog", None, "a cat"])
    keys = {"path": str(tmp_path), "column": "TEXT"}
    assert list(hub_captions(HubCaptions(**keys))) == ["a dog", "", "a cat"]
    assert list(hub_captions(HubCaptions(**keys, limit=1))) == ["a dog"]
    with pytest.raises(ValueError, match=r"captions\.column: 'caption' is not in .*, url, TEXT are"):
        list(hub_captions(HubCaptions(path=str(tmp_path))))
    with pytest.raises(ValueError, match=r"captions\.path: cannot read split 'test' of .*Available splits: \['tr"):
        list(hub_captions(HubCaptions(**keys, split="test")))


def test_a_hub_that_cannot_be_reached_is_told_with_the_way_out(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"captions\.path: cannot read .*'owner/captions': .*captions\.kind files"):
        list(hub_captions(HubCaptions(path="owner/captions")))
    with pytest.raises(ValueError, match=r"captions\.path: there is no directory 'nowhere'"):
        list(hub_captions(HubCaptions(path="nowhere")))
