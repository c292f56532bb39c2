"""Other people's datasets: what is read, and how the rest is refused before anything starts."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ip2p.errors import UserError
from ip2p.recipe import REPOSITORY
from ip2p.train.dataset import columns, dataset_files, file_splits, split_by_name
from ip2p.train.encode import REQUIRED
from ip2p.workspace import Workspace

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 146946961\n"
IMAGE = pa.array([{"bytes": b"x", "path": None}], pa.struct({"bytes": pa.binary(), "path": pa.string()}))


def table(**changes) -> pa.Table:
    row = {"original_image": IMAGE, "edit_prompt": pa.array(["make it night"]), "edited_image": IMAGE}
    return pa.table({name: column for name, column in (row | changes).items() if column is not None})


def write(path, content: pa.Table | bytes | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        pq.write_table(table() if content is None else content, path)


@pytest.fixture
def recipe_for(full_recipe):
    def recipe(dataset: str):
        return full_recipe.model_copy(update={"train": full_recipe.train.model_copy(update={"dataset": dataset})})

    return recipe


@pytest.fixture
def read(recipe_for, tmp_path):
    """Return the columns, and the files by split, of a dataset below tmp_path."""

    def read(name: str = "d"):
        source, paths = dataset_files(recipe_for(str(tmp_path / name)), Workspace(tmp_path / "w"))
        splits = {path.removeprefix(source.root).strip("/"): split_by_name(source, path) for path in paths}
        return columns(source, paths), splits

    return read


def test_splits_are_told_by_names_as_datasets_reads_them(tmp_path, read):
    names = {
        "data/train-00000-of-00001.parquet": "train",
        "data/validation-00000-of-00001.parquet": "validation",
        "data/test-00000-of-00001.parquet": "test",
        "dev/0000.parquet": "validation",
        "eval/0000.parquet": "test",
        "default/test/0000.parquet": "test",
        "my_val_file.parquet": "validation",
        "0-testing.parquet": "test",
        "Training 1.parquet": "train",
        "contest.parquet": None,
        "latest/value.parquet": None,
        "devices/trainer.parquet": None,
    }
    for name in names:
        write(tmp_path / "d" / name)
    expected = {name: split for name, split in names.items() if split != "test"}
    assert read()[1] == expected


def test_datasets_itself_finds_the_same_splits(tmp_path, read):
    datasets = pytest.importorskip("datasets")
    for split in ("train", "validation", "test"):
        write(tmp_path / "d" / "data" / f"{split}-00000-of-00001.parquet")
    loaded = datasets.load_dataset(str(tmp_path / "d"), cache_dir=str(tmp_path / "cache"))
    assert set(loaded) - {"test"} == set(read()[1].values())


def test_folders_above_the_dataset_do_not_count(tmp_path, read):
    write(tmp_path / "test" / "validation" / "my-test-pairs" / "a.parquet")
    assert read("test/validation/my-test-pairs")[1] == {"a.parquet": None}


def test_the_folder_of_a_split_is_of_that_split(tmp_path, read):
    write(tmp_path / "validation" / "a.parquet")
    assert read("validation")[1] == {"a.parquet": "validation"}
    write(tmp_path / "test" / "a.parquet")
    with pytest.raises(UserError, match="all of its files are of the test split"):
        read("test")


def test_one_file_is_a_dataset(tmp_path, read):
    write(tmp_path / "pairs.parquet")
    assert len(read("pairs.parquet")[1]) == 1


def test_what_downloads_leave_is_passed_over(tmp_path, read):
    for name in ("README.md", ".cache/huggingface/a.parquet", "_temporary/b.parquet", ".gitattributes"):
        write(tmp_path / "d" / name, b"x")
    write(tmp_path / "d" / "a.parquet")
    assert list(read()[1]) == ["a.parquet"]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "there is nothing at .*hf download"),
        ({"test/a.parquet": None, "test/b.parquet": None}, "all of its files are of the test split"),
        ({"a.csv": b"x", "b.txt": b"x"}, r"it holds .*a\.csv.* no \.parquet file"),
        ({"a.parquet": POINTER}, r"train\.dataset: .*a\.parquet is a pointer of Git LFS"),
        ({"a.parquet": None, "b.parquet": POINTER}, r"b\.parquet is a pointer of Git LFS"),
        ({"a.parquet": b"x" * 99}, r"a\.parquet cannot be read"),
        ({"a.parquet": None, "b.parquet": b""}, r"b\.parquet cannot be read"),
        ({"a.parquet": table(edit_prompt=None)}, r"a\.parquet has no column edit_prompt; it has original_image"),
        ({"a.parquet": table(edit_prompt=pa.array([1]))}, "column edit_prompt holds int64, not text"),
        ({"a.parquet": table(edit_prompt=pa.array([["a", "b"]]))}, "column edit_prompt holds list.*, not text"),
        ({"a.parquet": table(original_prompt=pa.array([1.5]))}, "column original_prompt holds double, not text"),
        ({"a.parquet": table(edited_image=pa.array([[[0, 1], [2, 3]]]))}, "edited_image holds list.*, not the bytes"),
        ({"a.parquet": table(edited_image=pa.array(["a.png"]))}, "edited_image holds string, not the bytes"),
        (
            {"a.parquet": table(original_image=pa.array([{"path": "a.png"}]))},
            "original_image holds struct.*, not the bytes",
        ),
        (
            {"a.parquet": None, "b.parquet": table(original_image=pa.array([b"x"]))},
            r"b\.parquet: column original_image holds binary, and in .*a\.parquet struct",
        ),
    ],
)
def test_what_cannot_be_trained_on_is_refused_with_file_and_column(tmp_path, read, files, says):
    for name, content in files.items():
        write(tmp_path / "d" / name, content)
    with pytest.raises(UserError, match=says):
        read()


def test_a_hub_id_is_told_how_to_come_here(recipe_for, tmp_path):
    with pytest.raises(UserError, match=r"timbrooks/instructpix2pix.*hf download --repo-type dataset"):
        dataset_files(recipe_for("timbrooks/instructpix2pix"), Workspace(tmp_path))


@pytest.mark.parametrize(
    "prompts",
    [
        pa.array(["a"], pa.large_string()),
        pa.array(["a"]).dictionary_encode(),
        pa.array([None], pa.string()),
        pa.array(["a"], pa.string_view()),
    ],
)
def test_text_is_text_however_it_is_held(tmp_path, read, prompts):
    write(tmp_path / "d" / "a.parquet", table(edit_prompt=prompts, original_image=pa.array([b"x"], pa.large_binary())))
    assert read()[0] == list(REQUIRED)


def test_columns_that_only_some_files_have_are_made_up(tmp_path, read):
    write(tmp_path / "d" / "a.parquet", table(pair_id=pa.array(["a"]), original_prompt=pa.array(["b"])))
    write(tmp_path / "d" / "b.parquet", table(original_prompt=pa.array(["b"])))
    assert read()[0] == [*REQUIRED, "original_prompt"]


def test_order_of_names_decides_between_a_folder_and_a_file():
    source = Workspace(REPOSITORY / "d")
    assert split_by_name(source, f"{source.root}/validation/train-0.parquet") == "validation"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["data/train-0.parquet", "data/train-1.parquet"], [None, None]),
        (["train/a.parquet", "validation/a.parquet"], ["train", "validation"]),
        (["a.parquet", "dev/a.parquet"], [None, "validation"]),
    ],
)
def test_a_dataset_without_a_validation_split_has_it_drawn(tmp_path, names, expected):
    source = Workspace(tmp_path)
    assert list(file_splits(source, [source.path(name) for name in names]).values()) == expected
