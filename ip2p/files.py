"""Files of other people: what lies beside data, and what only stands for it."""

import fnmatch

import pyarrow.fs as pafs

from ip2p.errors import UserError

# Of downloads and repositories.
BESIDE_DATA = ("_*", ".*", "*.md", "LICENSE*", "dataset_info.json", "dataset_infos.json")
POINTER = b"version https://git-lfs.github.com/spec/"


def is_beside_data(path: str) -> bool:
    """Return whether a path below a folder of data names no data: hidden, or about the folder."""
    *folders, name = path.split("/")
    hidden = any(folder.startswith(("_", ".")) for folder in folders)
    return hidden or any(fnmatch.fnmatchcase(name, pattern) for pattern in BESIDE_DATA)


def check_no_pointer(fs: pafs.FileSystem, path: str, key: str) -> None:
    """Raises `UserError`, naming `key`, if a file only stands for one of Git LFS."""
    with fs.open_input_file(path) as file:
        start = file.read(len(POINTER))
    if start == POINTER:
        raise UserError(
            f"{key}: {path} is a pointer of Git LFS, not the file itself; run `git lfs pull` in its repository, or "
            "download the file"
        )
