import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ip2p.evaluate.benchmark import layouts as benchmarks
from ip2p.evaluate.benchmark.layouts import SESSIONS, benchmark_files, detect, read_sessions
from ip2p.records import IMAGE
from ip2p.workspace import Workspace
from tests.evaluate.benchmark.synthetic_benchmarks import (
    EMU_EDIT,
    MAGICBRUSH,
    emu_edit_row,
    image,
    magicbrush_row,
    write,
)


def read(folder) -> dict[str, list[dict]]:
    """The turns of each session, after a round trip through the table's schema."""
    source = Workspace(folder)
    files = benchmark_files(source)
    rows = list(read_sessions(source, files, detect(source, files)))
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row["turns"] for row in pa.Table.from_pylist(rows, schema=SESSIONS).to_pylist()}


def test_turns_come_together_and_in_order_wherever_they_lie(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks, "ROWS_AT_ONCE", 2)
    first = [magicbrush_row("7", 3), magicbrush_row("5", 1), magicbrush_row("7", 1)]
    second = [magicbrush_row("8", 2), magicbrush_row("7", 2), magicbrush_row("8", 1)]
    found = read(write(tmp_path, first, second))
    assert {id_: [turn["turn"] for turn in turns] for id_, turns in found.items()} == {
        "5": [1],
        "7": [1, 2, 3],
        "8": [1, 2],
    }
    assert [turn["instruction"] for turn in found["7"]] == [f"edit {k} of 7" for k in (1, 2, 3)]
    for one, after in zip(found["7"], found["7"][1:], strict=False):
        assert one["target_img"] == after["source_img"]
    assert all(turn["reason"] == "" and turn["input_caption"] is None for turns in found.values() for turn in turns)


def test_sessions_are_passed_on_as_soon_as_they_are_complete(tmp_path):
    source = Workspace(write(tmp_path, *([magicbrush_row(str(n), 1)] for n in range(3))))
    sessions = read_sessions(source, benchmark_files(source), benchmarks.MAGICBRUSH)
    assert next(sessions)["id"] == "0"
    (tmp_path / "test-00002.parquet").unlink()  # not yet read again
    assert next(sessions)["id"] == "1"


def test_emu_edit_has_captions_and_no_ground_truth(tmp_path):
    found = read(write(tmp_path, [emu_edit_row(4), emu_edit_row(9)], schema=EMU_EDIT))
    assert list(found) == ["4-color-h4", "9-color-h9"]
    (turn,) = found["9-color-h9"]
    assert turn == {
        "turn": 1, "instruction": "edit 9", "source_img": image(9, 24, 40)["bytes"], "target_img": None,
        "input_caption": "a red square", "output_caption": "9 blue squares", "reason": "",
    }  # fmt: skip


def test_captions_that_were_added_to_magicbrush_are_read(tmp_path):
    schema = pa.schema([*MAGICBRUSH, pa.field("output_caption", pa.string())])
    (turn,) = read(write(tmp_path, [magicbrush_row("1", 1, output_caption="a cat")], schema=schema))["1"]
    assert (turn["input_caption"], turn["output_caption"]) == (None, "a cat")


def test_a_row_that_cannot_be_used_stays_with_its_reason(tmp_path):
    rows = [
        magicbrush_row("1", 1, target_img=None),
        magicbrush_row("2", 1, source_img={"bytes": None, "path": "2.png"}, instruction=" "),
        magicbrush_row(None, 1),
        magicbrush_row("3", None),
        magicbrush_row("4", 1),
        magicbrush_row("4", 1),
        magicbrush_row("4", 2),
    ]
    reasons = {id_: [turn["reason"] for turn in turns] for id_, turns in read(write(tmp_path, rows)).items()}
    assert reasons == {
        "1": ["no target_img"],
        "2": ["no instruction, source_img"],
        "test-00000.parquet:2": ["no img_id"],
        "test-00000.parquet:3": ["no turn_index"],
        "4": ["turn 1 is there 2 times", "turn 1 is there 2 times", ""],
    }


def test_text_that_is_no_utf8_loses_no_row(tmp_path):
    rows = [magicbrush_row("1", 1), magicbrush_row("2", 1)]
    table = pa.Table.from_pylist(rows, schema=MAGICBRUSH)
    latin = pa.array([b"caf\xe9", b"tea"]).view(pa.string())  # as some writers leave it
    pq.write_table(table.set_column(4, "instruction", latin), tmp_path / "0.parquet")
    found = read(tmp_path)
    assert [found[id_][0]["instruction"] for id_ in ("1", "2")] == ["caf�", "tea"]


def test_other_columns_are_refused_by_name(tmp_path):
    schema = pa.schema({"img_id": pa.string(), "before": IMAGE})
    source = Workspace(write(tmp_path, [{"img_id": "1", "before": image(1)}], schema=schema))
    needed = (
        r"img_id, turn_index, instruction, source_img, target_img \(MagicBrush\), or idx, task, hash, instruction, "
    )
    with pytest.raises(ValueError, match=rf"has the columns img_id, before; needed are {needed}image \(Emu Edit\)"):
        detect(source, benchmark_files(source))


@pytest.mark.parametrize(
    ("column", "type_", "value", "message"),
    [
        ("target_img", pa.binary(), b"x", "'target_img' of .* holds binary, not structs of bytes and path"),
        ("turn_index", pa.string(), "1", "'turn_index' of .* holds string, not whole numbers"),
    ],
)
def test_columns_of_other_types_are_refused(tmp_path, column, type_, value, message):
    schema = pa.schema([field.with_type(type_) if field.name == column else field for field in MAGICBRUSH])
    source = Workspace(write(tmp_path, [magicbrush_row("1", 1, **{column: value})], schema=schema))
    with pytest.raises(ValueError, match=message):
        detect(source, benchmark_files(source))


def test_files_that_are_no_benchmark_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no \*\.parquet in .*nothing"):
        benchmark_files(Workspace(tmp_path / "nothing"))
    (tmp_path / "a.parquet").write_bytes(b"PAR0")
    source = Workspace(tmp_path)
    with pytest.raises(ValueError, match=r"a\.parquet is no parquet file"):
        detect(source, benchmark_files(source))


def test_one_file_is_a_benchmark_too(tmp_path):
    write(tmp_path, [magicbrush_row("1", 1)], [magicbrush_row("2", 1)])
    assert list(read(tmp_path / "test-00001.parquet")) == ["2"]


def test_two_benchmarks_in_one_folder_are_refused(tmp_path):
    write(tmp_path / "a", [magicbrush_row("1", 1)])
    write(tmp_path / "b", [emu_edit_row(1)], schema=EMU_EDIT)
    source = Workspace(tmp_path)
    with pytest.raises(ValueError, match=r"MagicBrush and .*b/test-00000.parquet those of Emu Edit"):
        detect(source, benchmark_files(source))
