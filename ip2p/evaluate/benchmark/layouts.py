"""Benchmark datasets: parquet files with the columns of MagicBrush or of Emu Edit, read as sessions.

A session is one image and the turns that edit it, one after the other: MagicBrush has up to three, Emu Edit has one.
What is wrong with a row stands in its `reason`: a row is never lost.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ip2p.errors import UserError
from ip2p.workspace import Workspace

# target_img is null where the benchmark has none; so are captions. reason: why the row can't be used, "" when it can.
TURN = pa.struct(
    {
        "turn": pa.int32(),
        "instruction": pa.string(),
        "source_img": pa.binary(),
        "target_img": pa.binary(),
        "input_caption": pa.string(),
        "output_caption": pa.string(),
        "reason": pa.string(),
    }
)
SESSIONS = pa.schema({"id": pa.string(), "turns": pa.list_(TURN)})
# Null where there is nothing to compare with: no ground truth, no caption, no DINO in the recipe.
METRICS = pa.schema(
    {
        "l1": pa.float32(),  # against the ground truth, as the next three
        "l2": pa.float32(),
        "clip_i": pa.float32(),
        "dino": pa.float32(),
        "clip_t": pa.float32(),  # with the caption of the edited image
        "clip_dir": pa.float32(),
        "input_l1": pa.float32(),  # against the image that was edited
        "input_clip_i": pa.float32(),
        "input_dino": pa.float32(),
    }
)
# Each turn on its own source image; or turn k on what the editor made of turn k - 1 (MagicBrush, section 4).
SINGLE, MULTI = "single-turn", "multi-turn"

EDIT = pa.schema(
    [
        *pa.schema(
            {
                "model": pa.string(),
                "mode": pa.string(),
                "turn": pa.int32(),
                "instruction": pa.string(),
                "seed": pa.int64(),
            }
        ),
        *METRICS,
        *pa.schema({"status": pa.string(), "reason": pa.string()}),
    ]
)
# One row for each session, come what may; images: the edited ones as PNG, in the order of `edits`, null where an edit
# failed or changes nothing.
RESULTS = pa.schema(
    {"id": pa.string(), "edits": pa.list_(pa.struct(list(EDIT))), "images": pa.list_(pa.binary())},
)
# One row for each edit.
BENCHMARK = pa.schema([pa.field("id", pa.string()), *EDIT])

ROWS_AT_ONCE = 16  # read from a file: a row of MagicBrush is a few MB
ID_ROWS_AT_ONCE = 10_000


@dataclass(frozen=True)
class Layout:
    """The columns of a benchmark. `id` together name a session; `turn` is its column, None when every row is turn 1."""

    name: str
    id: tuple[str, ...]
    turn: str | None
    source: str
    target: str | None

    @property
    def images(self) -> list[str]:
        return [self.source, *([self.target] if self.target else [])]

    @property
    def keys(self) -> list[str]:
        return [*self.id, *([self.turn] if self.turn else [])]

    @property
    def required(self) -> list[str]:
        return [*self.keys, "instruction", *self.images]


# osunlp/MagicBrush and facebook/emu_edit_test_set. The masks of MagicBrush are for editors that want one.
MAGICBRUSH = Layout("MagicBrush", ("img_id",), "turn_index", "source_img", "target_img")
EMU_EDIT = Layout("Emu Edit", ("idx", "task", "hash"), None, "image", None)
CAPTIONS = ("input_caption", "output_caption")  # Emu Edit has them; to MagicBrush's columns they may be added


def benchmark_files(source: Workspace) -> list[str]:
    """The parquet files of a benchmark, which is one or a folder of them. Raises `UserError` when there are none."""
    if source.fs.get_file_info(source.root).is_file:
        return [source.root]
    files = [path for path in source.files() if path.endswith(".parquet")]
    if not files:
        raise UserError(f"benchmark: there is no *.parquet in {source.location!r}: name the folder that holds them")
    return files


def detect(source: Workspace, files: list[str]) -> Layout:
    """The layout that all files have. Raises `UserError` when one of them can't be read, or has neither."""
    layouts = {path: _layout_of(path, _open(source, path).schema_arrow) for path in files}
    for path, layout in layouts.items():
        if layout != layouts[files[0]]:
            raise UserError(
                f"benchmark: {files[0]} has the columns of {layouts[files[0]].name} and {path} those of {layout.name}: "
                "evaluate one benchmark at a time"
            )
    return layouts[files[0]]


def _layout_of(path: str, schema: pa.Schema) -> Layout:
    for layout in (MAGICBRUSH, EMU_EDIT):
        if set(layout.required) <= set(schema.names):
            for column in layout.images:
                held = schema.field(column).type
                if not pa.types.is_struct(held) or held.get_field_index("bytes") < 0:
                    raise UserError(
                        f"benchmark: column {column!r} of {path} holds {held}, not structs of bytes and path: write it "
                        "as an Image of the datasets library"
                    )
            if layout.turn and not pa.types.is_integer(held := schema.field(layout.turn).type):
                raise UserError(f"benchmark: column {layout.turn!r} of {path} holds {held}, not whole numbers")
            return layout
    raise UserError(
        f"benchmark: {path} has the columns {', '.join(schema.names)}; needed are "
        + ", or ".join(f"{', '.join(layout.required)} ({layout.name})" for layout in (MAGICBRUSH, EMU_EDIT))
    )


def read_sessions(source: Workspace, files: list[str], layout: Layout) -> Iterator[dict[str, Any]]:
    """Rows of SESSIONS, each as soon as its last turn was read; its turns, which may lie anywhere, in order.

    The ids are read first, to know how many turns are to come: only sessions that have begun are held in memory.
    A row without id or turn is a session of its own, named by its file and number.
    """
    to_come = Counter(id_ for id_, _ in _rows(source, files, layout, layout.keys, ID_ROWS_AT_ONCE))
    begun: dict[str, list[dict[str, Any]]] = defaultdict(list)
    columns = [*layout.required, *CAPTIONS]
    for id_, row in _rows(source, files, layout, columns, ROWS_AT_ONCE):
        begun[id_].append(_turn(layout, row))
        if len(begun[id_]) == to_come[id_]:
            yield {"id": id_, "turns": _in_order(begun.pop(id_))}


def _rows(
    source: Workspace, files: list[str], layout: Layout, columns: list[str], at_once: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(session id, row) of every row of all files."""
    for path in files:
        number = 0
        with _open(source, path) as file:
            there = [name for name in columns if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=at_once, columns=there):
                for row in _as_bytes(batch).to_pylist():
                    missing = any(row[key] is None for key in layout.keys)
                    keys = [_text(row[key]) for key in layout.id]
                    yield f"{path.rsplit('/', 1)[-1]}:{number}" if missing else "-".join(keys), row
                    number += 1


def _as_bytes(batch: pa.RecordBatch) -> pa.Table:
    """Text as bytes: pyarrow does not look whether a parquet file's text is UTF-8, and fails on a whole batch."""
    table = pa.Table.from_batches([batch])
    text = [
        field.with_type(pa.large_binary())
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
        else field
        for field in table.schema
    ]
    return table.cast(pa.schema(text))


def _open(source: Workspace, path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(source.fs.open_input_file(path))
    except pa.ArrowInvalid as error:
        raise UserError(f"benchmark: {path} is no parquet file: {error}") from error


def _turn(layout: Layout, row: dict[str, Any]) -> dict[str, Any]:
    """A row of a benchmark as a TURN."""
    instruction = _text(row["instruction"])
    pictures = {column: (row[column] or {}).get("bytes") for column in layout.images}
    missing = [key for key in layout.keys if row[key] is None]
    missing += [] if instruction.strip() else ["instruction"]
    missing += [column for column, data in pictures.items() if not data]
    return {
        "turn": row[layout.turn] if layout.turn else 1,
        "instruction": instruction,
        "source_img": pictures[layout.source],
        "target_img": pictures[layout.target] if layout.target else None,
        **{name: _text(row[name]) if row.get(name) else None for name in CAPTIONS},
        "reason": f"no {', '.join(missing)}" if missing else "",
    }


def _in_order(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By number; which of two with the same number is meant nobody can tell."""
    often = Counter(turn["turn"] for turn in turns)
    for turn in turns:
        if often[turn["turn"]] > 1:
            turn["reason"] = f"turn {turn['turn']} is there {often[turn['turn']]} times"
    return sorted(turns, key=lambda turn: turn["turn"] or 0)


def _text(value: Any) -> str:
    """Text that can be written; what is no UTF-8 becomes U+FFFD."""
    return value.decode(errors="replace") if isinstance(value, bytes) else "" if value is None else str(value)
