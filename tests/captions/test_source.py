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
from ip2p.errors import UserError
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
            r"captions\.path: line 2 of .*a\.csv has 3 fields and the header 2; put texts with commas",
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


def rows_of(tmp_path, name: str, content: str | bytes, column: str = "caption") -> list[str]:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(file_captions(FileCaptions(path=str(path), column=column)))


@pytest.mark.parametrize(
    ("csv", "line"),
    [
        ('id,caption\n1,a\n2,"tall vase\n3,b\n4,c\n', 3),
        ('id,caption\n1,a\n2,"tall vase\n3,b\n4,the "best" cat\n5,c\n', 3),
        ('caption\n"a" dog\n', 2),
        ('caption\na\n\n"b\nb"\n"c', 6),
        ("id,caption\n1,a\n2\n", 3),
        ("id,caption\n1,a\n2,a dog, running\n", 3),
    ],
)
def test_a_csv_that_would_lose_captions_is_refused_with_the_line(tmp_path, csv, line):
    with pytest.raises(UserError, match=rf"captions\.path: .*line {line} "):
        rows_of(tmp_path, "a.csv", csv)


def test_a_csv_may_hold_quotation_marks_and_lines_as_csv_does(tmp_path):
    csv = 'id,caption\r\n1,"a ""red"" dog, running"\r\n\r\n2,a 6" ruler\r\n3,"two\nlines"\r\n4,\r\n'
    assert rows_of(tmp_path, "a.csv", csv) == ['a "red" dog, running', 'a 6" ruler', "two\nlines", ""]
    assert rows_of(tmp_path, "b.csv", b"\xef\xbb\xbfcaption\ncaf\xe9\n") == ["caf\ufffd"]


@pytest.mark.parametrize(
    ("csv", "says"), [("", "is empty"), ("caption,caption\na,b\n", "2 columns"), ("a\tcaption\n", "is not in")]
)
def test_a_csv_without_one_such_column_is_refused(tmp_path, csv, says):
    with pytest.raises(UserError, match=says):
        rows_of(tmp_path, "a.csv", csv)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[:-40], lambda data: data[:200], lambda data: b"not packed" + data]
)
def test_damaged_compressed_text_is_refused_by_name(tmp_path, ending, damage):
    lines = [f"a dog number {k * 7919 % 1000}" for k in range(2000)]
    text = "\n".join(["caption", *lines] if ending == "csv" else [json.dumps({"caption": line}) for line in lines])
    with pytest.raises(UserError, match=rf"captions\.path: .*a\.{ending}\.gz cannot be read .*copy it again"):
        rows_of(tmp_path, f"a.{ending}.gz", damage(gzip.compress(text.encode())))


def test_a_missing_number_is_a_missing_caption(tmp_path):
    rows = '{"caption": "a"}\n{"caption": NaN}\n{"caption": Infinity}\n{"caption": null}\n{}\n{"caption": 7}\n'
    assert rows_of(tmp_path, "a.jsonl", rows) == ["a", "", "", "", "", "7"]


def test_rows_before_the_first_with_the_column_are_empty(tmp_path):
    rows = '{"url": "x"}\n' * 5 + '{"url": "y", "caption": "a dog"}\n'
    assert rows_of(tmp_path, "a.jsonl", rows) == [""] * 5 + ["a dog"]
    for count in (3, 3000):
        with pytest.raises(UserError, match=r"'caption' is not in .*, url, more are"):
            rows_of(tmp_path, "b.jsonl", '{"url": "x"}\n{"more": 1}\n' * count)


def test_a_folder_may_hold_what_downloads_and_notebooks_leave(tmp_path):
    for name in (
        ".cache/huggingface/download/a.jsonl.metadata",
        ".cache/b.jsonl",
        "data/.ipynb_checkpoints/a-checkpoint.jsonl",
        "data/_temporary/0.jsonl",
        ".gitattributes",
        "README.md",
        "LICENSE",
        "dataset_infos.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{not json")
    (tmp_path / "data" / "train.jsonl").write_text('{"caption": "a dog"}\n')
    assert list(file_captions(FileCaptions(path=str(tmp_path)))) == ["a dog"]


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.jsonl"])
def test_a_pointer_of_git_lfs_is_named_as_one(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 146946961\n"
    with pytest.raises(UserError, match=rf"captions\.path: .*{name} is a pointer of Git LFS.*git lfs pull"):
        rows_of(tmp_path, name, pointer)


def test_a_folder_named_like_a_partition_adds_no_column(tmp_path):
    folder = tmp_path / "caption=x" / "model=a"
    folder.mkdir(parents=True)
    write_parquet(folder / "a.parquet", ["a dog"])
    assert read(folder) == ["a dog"]
