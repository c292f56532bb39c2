"""The dataset to train on: its files, its columns, and the share of it that is used."""

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ip2p.errors import UserError
from ip2p.files import check_no_pointer, is_beside_data
from ip2p.recipe import Recipe
from ip2p.train.encode import IMAGES, REQUIRED, TEXTS, WELCOME
from ip2p.train.latents import some_captions
from ip2p.train.previews import is_readable
from ip2p.workspace import Workspace

FOOTERS_AT_ONCE = 16  # on an object store each takes a round trip
# Words for a split in names of files and folders, and what may stand around them: those of `datasets`.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_IN_NAME = {
    split: re.compile(rf"(?:^|[-._ 0-9])(?:{'|'.join(words)})(?:[-._ 0-9]|$)", re.IGNORECASE)
    for split, words in SPLIT_NAMES.items()
}


def dataset_files(recipe: Recipe, workspace: Workspace) -> tuple[Workspace, list[str]]:
    """Return where the dataset is and its files without those of the test split.

    It is the workspace's own unless `train.dataset` names another one, a folder or a file. Raises `UserError` when it
    has no files.
    """
    source = Workspace(recipe.train.dataset or workspace.uri("dataset"))
    if not source.exists() and recipe.train.dataset is None:
        raise UserError(f"no pairs to train on in {source.location}: run jobs.export_dataset first")
    if not source.exists():
        raise UserError(
            f"train.dataset: there is nothing at {source.location!r}; it is a folder of parquet files or one of them, "
            "and `hf download --repo-type dataset OWNER/NAME --local-dir FOLDER` brings one of the hub"
        )
    if source.fs.get_file_info(source.root).is_file:
        return source, [source.root]
    present = [path for path in source.files() if not is_beside_data(path.removeprefix(f"{source.root}/"))]
    files = [path for path in present if path.endswith(".parquet")]
    trained_on = [path for path in files if split_by_name(source, path) != "test"]
    if trained_on:
        return source, trained_on
    if files:
        raise UserError(
            f"no pairs to train on in {source.location}: all of its files are of the test split, e.g. {files[0]}; name "
            "a dataset with others"
        )
    holds = f"it holds {', '.join(present[:3])}" if present else "it holds no data"
    raise UserError(
        f"no pairs to train on in {source.location}: {holds}, and no .parquet file: run jobs.export_dataset, or accept "
        "more pairs"
    )


def file_splits(source: Workspace, paths: list[str]) -> dict[str, str | None]:
    """Return the split of each file by its name; None for files whose rows are split by caption.

    A dataset that names no validation split, as the published one, has it drawn from all of its rows.
    """
    splits = {path: split_by_name(source, path) for path in paths}
    return splits if "validation" in splits.values() else dict.fromkeys(paths)


def split_by_name(source: Workspace, path: str) -> str | None:
    """Return the split named by a file's nearest folder or by the file, or None.

    Folders above the dataset do not count. Its own folder counts if its whole name is that of a split.
    """
    *folders, name = path.removeprefix(source.root).strip("/").split("/")
    for part in (*reversed(folders), name.removesuffix(".parquet")):
        for split, pattern in SPLIT_IN_NAME.items():
            if pattern.search(part):
                return split
    own = source.root.rsplit("/", 1)[-1].lower()
    return next((split for split, words in SPLIT_NAMES.items() if own in words), None)


def columns(source: Workspace, paths: list[str]) -> list[str]:
    """Return the columns that training reads of every file.

    Raises `UserError`, naming file and column, when one is missing or holds what can't be trained on.
    """
    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as threads:
        schemas = list(threads.map(lambda path: _schema(source, path), paths))
    for path, schema in zip(paths, schemas):
        for name in (*REQUIRED, *WELCOME):
            if name in schema.names and name in schemas[0].names:
                held, first = schema.field(name).type, schemas[0].field(name).type
                if held != first:
                    raise UserError(f"{path}: column {name} holds {held}, and in {paths[0]} {first}; write both alike")
    return [name for name in (*REQUIRED, *WELCOME) if all(name in schema.names for schema in schemas)]


def _schema(source: Workspace, path: str) -> pa.Schema:
    check_no_pointer(source.fs, path, "train.dataset")
    try:
        with source.fs.open_input_file(path) as file:
            schema = pq.ParquetFile(file).schema_arrow
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"train.dataset: {path} cannot be read ({error}): copy it again, or leave it out") from error
    if missing := [name for name in REQUIRED if name not in schema.names]:
        raise UserError(f"{path} has no column {', '.join(missing)}; it has {', '.join(schema.names)}")
    for name in IMAGES:
        held = schema.field(name).type
        inside = held.field("bytes").type if pa.types.is_struct(held) and held.get_field_index("bytes") >= 0 else held
        if not (pa.types.is_binary(inside) or pa.types.is_large_binary(inside)):
            raise UserError(
                f"{path}: column {name} holds {_short(held)}, not the bytes of image files; save it with "
                "datasets' Image feature, or as binary"
            )
    for name in (*TEXTS, *WELCOME):
        if name in schema.names and not _is_text(held := schema.field(name).type):
            raise UserError(f"{path}: column {name} holds {_short(held)}, not text; write one string a row")
    return schema


def _is_text(held: pa.DataType) -> bool:
    text = held.value_type if pa.types.is_dictionary(held) else held
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(is_kind(text) for is_kind in kinds)


def _short(held: pa.DataType) -> str:
    return str(held) if len(str(held)) < 60 else f"{str(held)[:57]}..."


def content(source: Workspace, paths: list[str]) -> list[list[Any]]:
    """Return [name, bytes] of each file, by which a dataset is recognised."""
    return [[info.path.removeprefix(source.root), info.size] for info in source.fs.get_file_info(paths)]


def validation_rows(recipe: Recipe, workspace: Workspace) -> list[dict[str, Any]]:
    """Return the first readable held-out pairs, each with another instruction; at most `train.pictures`."""
    source, paths = dataset_files(recipe, workspace)
    held_out = [path for path in paths if split_by_name(source, path) == "validation"]
    if not held_out or not recipe.train.pictures:
        return []
    file = pq.ParquetFile(source.fs.open_input_file(held_out[0]))
    chosen: dict[str, dict[str, Any]] = {}
    for batch in file.iter_batches(recipe.train.pictures, columns=list(REQUIRED)):
        for row in batch.to_pylist():
            if row["edit_prompt"] and row["edit_prompt"] not in chosen and is_readable(row):
                chosen[row["edit_prompt"]] = row
        if len(chosen) >= recipe.train.pictures:
            break
    return list(chosen.values())[: recipe.train.pictures]


def share_of_train(recipe: Recipe) -> tuple[float, int]:
    """Return (fraction, seed): which of the encoded captions are trained on."""
    return recipe.train.fraction, recipe.seed if recipe.train.fraction < 1 else 0


def trained_pairs(recipe: Recipe, data: Workspace) -> int:
    """Return how many encoded pairs `train.fraction` leaves."""
    table = data.read_table("latents", columns=["caption_id", "split", "status"])
    captions = table.filter((pc.field("split") == "train") & (pc.field("status") == "ok"))["caption_id"].to_pylist()
    kept = some_captions(captions, *share_of_train(recipe))
    return sum(caption in kept for caption in captions)
