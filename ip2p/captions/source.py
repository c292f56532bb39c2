"""Where captions come from: parquet, JSONL or CSV, local or in a bucket, or a dataset of the hub. All are streamed."""

import io
import json
from collections.abc import Iterator
from itertools import islice
from typing import Any, cast

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.dataset as pads

from ip2p.errors import UserError
from ip2p.recipe import FileCaptions, HubCaptions, locate
from ip2p.workspace import Workspace

ENDINGS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}
ROWS_PER_BATCH = 10_000
CSV_BLOCK = 2**24  # bytes; a row must fit into one


def file_captions(captions: FileCaptions) -> Iterator[str]:
    """The captions of a file, or of all files of a folder in order of name; a missing one is empty.

    What is no UTF-8 in them becomes U+FFFD. At most a few batches are in memory. Raises ValueError for a path where
    nothing is, for files that are not of one known format or cannot be read, and for a column that is not there or
    holds no text.
    """
    source = Workspace(captions.path)
    files = list_files(source)
    read = {"parquet": _arrow_captions, "csv": _arrow_captions, "jsonl": _jsonl_captions}[_format(files[0])]
    every = (caption for file in files for caption in read(source, file, captions.column))
    return islice(every, captions.limit)


def source_bytes(captions: FileCaptions) -> int:
    """Return the size of all caption files together, by which it is noticed that they have grown."""
    source = Workspace(captions.path)
    return sum(info.size for info in source.fs.get_file_info(list_files(source)))


def list_files(source: Workspace) -> list[str]:
    """Paths of the caption files in `source`, which is one itself or a folder of them; all of one format.

    Names that begin with `_` or `.` are what other programs leave beside data, and are passed over.
    """
    if not source.exists():
        raise UserError(f"captions.path: there is nothing at {source.location!r}")
    if source.fs.get_file_info(source.root).is_file:
        files = [source.root]
    else:
        files = [file for file in source.files() if not file.rsplit("/", 1)[-1].startswith(("_", "."))]
    formats = {_format(file) for file in files}
    if len(formats) != 1 or "" in formats:
        odd = next((file for file in files if not _format(file)), None)
        what = f"{odd} is none" if odd else f"there are {' and '.join(sorted(formats)) or 'none'}"
        raise UserError(
            f"captions.path: {source.location!r} should hold files of one format, {', '.join(ENDINGS)} (or these with "
            f".gz, but for parquet); {what}: name a file, or a folder with such files alone"
        )
    return files


def _format(file: str) -> str:
    zipped = file.endswith(".gz")
    kind = next((kind for end, kind in ENDINGS.items() if file.removesuffix(".gz").lower().endswith(end)), "")
    return "" if zipped and kind == "parquet" else kind


def _arrow_captions(source: Workspace, file: str, column: str) -> Iterator[str]:
    kind: Any = "parquet"
    if _format(file) == "csv":
        kind = pads.CsvFileFormat(
            read_options=pacsv.ReadOptions(block_size=CSV_BLOCK),
            parse_options=pacsv.ParseOptions(newlines_in_values=True),
            # Or a column of numbers, or one caption in another encoding, would give the column another type.
            convert_options=pacsv.ConvertOptions(column_types={column: pa.string()}, check_utf8=False),
        )
    try:
        table = pads.dataset(file, filesystem=source.fs, format=kind)
        _check_column(column, table.schema.names, file)
        held = table.schema.field(column).type
        text = held.value_type if pa.types.is_dictionary(held) else held
        if not (pa.types.is_string(text) or pa.types.is_large_string(text) or pa.types.is_string_view(text)):
            raise UserError(f"captions.column: {column!r} of {file} holds {held}, not text")
        # As bytes: pyarrow does not look whether a parquet file's text is UTF-8, and fails on a whole batch.
        raw = {column: pads.field(column).cast(pa.large_binary())}
        for batch in table.to_batches(columns=raw, batch_size=ROWS_PER_BATCH):
            yield from ((caption or b"").decode(errors="replace") for caption in batch[column].to_pylist())
    except pa.ArrowInvalid as error:
        raise UserError(f"captions.path: {file} cannot be read: {error}") from error


def _jsonl_captions(source: Workspace, file: str, column: str) -> Iterator[str]:
    # Line by line, not by pyarrow, which fails on a whole file when a value in any column changes its type.
    stream: Any = source.fs.open_input_stream(file)  # unpacks what ends with .gz
    checked = False
    with io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(
                    f"captions.path: line {number} of {file} is not JSON ({error}): one object a line, each in one line"
                ) from error
            if not isinstance(row, dict):
                raise UserError(f"captions.path: line {number} of {file} is not a JSON object")
            if not checked:
                _check_column(column, list(row), file)
                checked = True
            yield _text(row.get(column), column, f"line {number} of {file}")


def hub_captions(captions: HubCaptions) -> Iterator[str]:
    """The captions of a dataset of the hub, streamed: nothing is kept on disk; a missing one is empty.

    Raises ValueError for a dataset, split or column that is not there or cannot be reached.
    """
    import datasets  # here, as it takes seconds

    path = locate(captions.path, "captions.path")
    try:
        rows = cast(
            datasets.IterableDataset,
            datasets.load_dataset(path, split=captions.split, revision=captions.revision, streaming=True),
        )
        names = rows.column_names or list(next(iter(rows), {}))
    except (OSError, ValueError) as error:
        raise UserError(
            f"captions.path: cannot read split {captions.split!r} of the dataset {captions.path!r}: {error}; check "
            "captions.path (owner/name), captions.split and captions.revision, and that this machine reaches the hub; "
            "without one, copy the dataset's files here and name them: captions.kind files, captions.path their folder"
        ) from error
    _check_column(captions.column, names, captions.path)
    # The other columns may be images, which would be decoded.
    for number, row in enumerate(islice(rows.select_columns([captions.column]), captions.limit), start=1):
        yield _text(row[captions.column], captions.column, f"row {number} of {captions.path}")


def _check_column(column: str, names: list[str], place: str) -> None:
    if column not in names:
        raise UserError(f"captions.column: {column!r} is not in {place}, {', '.join(map(str, names))} are")


def _text(value: Any, column: str, place: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if not isinstance(value, str):
        raise UserError(f"captions.column: {column!r} in {place} holds a {type(value).__name__}, not text")
    # JSON can escape half a character ("\ud83d"), which nothing can write.
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
