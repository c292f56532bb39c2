"""Where captions come from: parquet, JSONL or CSV, local or in a bucket, or a dataset of the hub. All are streamed."""

import csv
import io
import json
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from ip2p.errors import UserError
from ip2p.files import check_no_pointer, is_beside_data
from ip2p.recipe import FileCaptions, HubCaptions, locate
from ip2p.workspace import Workspace

ENDINGS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}
ROWS_PER_BATCH = 10_000
LONGEST_FIELD = 2**24  # letters of a CSV field
ROWS_WITHOUT = 1000  # first rows of a JSONL file that may all lack the column


def file_captions(captions: FileCaptions) -> Iterator[str]:
    """The captions of a file, or of all files of a folder in order of name; a missing one is empty.

    What is no UTF-8 in them becomes U+FFFD. At most a few batches are in memory. Raises ValueError for a path where
    nothing is, for files that are not of one known format or cannot be read, and for a column that is not there or
    holds no text.
    """
    source = Workspace(captions.path)
    files = list_files(source)
    read = {"parquet": _parquet_captions, "csv": _csv_captions, "jsonl": _jsonl_captions}[_format(files[0])]
    every = (caption for file in files for caption in read(source, file, captions.column))
    return islice(every, captions.limit)


def source_bytes(captions: FileCaptions) -> int:
    """Return the size of all caption files together, by which it is noticed that they have grown."""
    source = Workspace(captions.path)
    return sum(info.size for info in source.fs.get_file_info(list_files(source)))


def list_files(source: Workspace) -> list[str]:
    """Paths of the caption files in `source`, which is one itself or a folder of them; all of one format.

    What other programs leave beside data is passed over.
    """
    if not source.exists():
        raise UserError(f"captions.path: there is nothing at {source.location!r}")
    if source.fs.get_file_info(source.root).is_file:
        files = [source.root]
    else:
        files = [file for file in source.files() if not is_beside_data(file.removeprefix(f"{source.root}/"))]
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


@contextmanager
def _readable(source: Workspace, file: str) -> Iterator[None]:
    """Raises `UserError` naming the file for what goes wrong in the block while it is read."""
    check_no_pointer(source.fs, file, "captions.path")
    try:
        yield
    except (pa.ArrowInvalid, OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"captions.path: {file} cannot be read ({error}): it is damaged or cut short; copy it again"
        ) from error


def _parquet_captions(source: Workspace, file: str, column: str) -> Iterator[str]:
    with _readable(source, file), source.fs.open_input_file(file) as opened:
        table = pq.ParquetFile(opened)
        schema = table.schema_arrow
        _check_column(column, schema.names, file)
        held = schema.field(column).type
        text = held.value_type if pa.types.is_dictionary(held) else held
        if not (pa.types.is_string(text) or pa.types.is_large_string(text) or pa.types.is_string_view(text)):
            raise UserError(f"captions.column: {column!r} of {file} holds {held}, not text")
        for batch in table.iter_batches(ROWS_PER_BATCH, columns=[column]):
            # As bytes: pyarrow does not look whether a parquet file's text is UTF-8, and fails on a whole batch.
            for caption in batch[column].cast(text).cast(pa.large_binary()).to_pylist():
                yield (caption or b"").decode(errors="replace")


@contextmanager
def _lines(source: Workspace, file: str, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
    """The text of a file, unpacked if its name ends with .gz. What is no UTF-8 becomes U+FFFD."""
    with _readable(source, file):
        stream: Any = source.fs.open_input_stream(file)
        with io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline=newline) as lines:
            yield lines


def _csv_captions(source: Workspace, file: str, column: str) -> Iterator[str]:
    # Not by pyarrow, which takes all that follows an unclosed quotation mark for one caption.
    csv.field_size_limit(LONGEST_FIELD)
    with _lines(source, file, newline="") as lines:
        rows = csv.reader(lines, strict=True)
        started = 0  # line of the row that is read
        try:
            header = next(rows, None)
            if header is None:
                raise UserError(f"captions.path: {file} is empty; its first line should name the columns")
            _check_column(column, header, file)
            if header.count(column) > 1:
                raise UserError(
                    f"captions.column: {file} has {header.count(column)} columns {column!r}; name one apart"
                )
            at, started = header.index(column), rows.line_num
            for row in rows:
                if row and len(row) != len(header):
                    raise UserError(
                        f"captions.path: line {started + 1} of {file} has {len(row)} fields and the header "
                        f'{len(header)}; put texts with commas into quotation marks: "a, b"'
                    )
                if row:
                    yield row[at]
                started = rows.line_num
        except csv.Error as error:
            raise UserError(
                f"captions.path: {file} cannot be read from line {started + 1} on ({error}); "
                'close its quotation marks, and write "" for one inside of a text'
            ) from error


def _jsonl_captions(source: Workspace, file: str, column: str) -> Iterator[str]:
    # Line by line, not by pyarrow, which fails on a whole file when a value in any column changes its type.
    names: dict[str, None] = {}
    found, rows = False, 0
    with _lines(source, file) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"captions.path: line {number} of {file} is not JSON ({error}): one object a line, each in one line"
                ) from error
            if not isinstance(row, dict):
                raise UserError(f"captions.path: line {number} of {file} is not a JSON object")
            rows += 1
            found |= column in row
            if not found:
                names |= dict.fromkeys(row)
                if rows == ROWS_WITHOUT:
                    break
            yield _text(row.get(column), column, f"line {number} of {file}")
    if not found:
        _check_column(column, list(names), file)


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
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""  # NaN is how tables of numbers write that a value is missing
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if not isinstance(value, str):
        raise UserError(f"captions.column: {column!r} in {place} holds a {type(value).__name__}, not text")
    # JSON can escape half a character ("\ud83d"), which nothing can write.
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
