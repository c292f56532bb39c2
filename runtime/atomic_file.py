"""A small file of a workspace that is written only if nobody else wrote it in between.

`read` returns the content and its version. `write` takes the version that was read, None where
there was no file, and raises `ChangedError` if that is no longer what stands there:

| workspace | condition | version |
|---|---|---|
| `s3://` | `If-None-Match: *`, `If-Match` | ETag |
| `gs://` | `ifGenerationMatch` | generation |
| a folder | a comparison under `flock` on a file beside it | content |
| without conditional writes | a comparison, then a second look a second later | content |

Contents must be unique to their writer and write: a version that came back would hide a change
(ETags are hashes), and a writer whose answer was lost knows its write by the content.

An S3-compatible server may refuse conditions (status 501) or ignore them, and a file system may
have no `flock`. Both raise `UnsupportedError` at the first write, and `PlainFile` is the fallback:
it finds a second writer unless both write within the same second.
"""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import boto3
import google.auth
import pyarrow.fs as pafs
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import GoogleAuthError
from google.auth.transport.requests import AuthorizedSession
from requests import Response
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from ip2p.workspace import Workspace

# Seconds. A heartbeat waits for one request, so a request may not hang.
CONNECT_TIMEOUT, READ_TIMEOUT = 5, 10
ATTEMPTS = 3
LOCK_TIMEOUT = 10.0
SETTLE = 1.0

GCS_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


class ChangedError(Exception):
    """Somebody else created, replaced or removed the file first."""


class UnsupportedError(Exception):
    """The store has no conditional writes. The message says how that was found out."""


@dataclass(frozen=True)
class Stored:
    """A file as it was read. `age`: seconds since it was written, by the clock of the store."""

    content: str
    version: str
    age: float


def atomic_file(workspace: Workspace, name: str) -> "AtomicFile":
    """Return the file `name` at the root of `workspace`. It need not exist."""
    path = workspace.path(name)
    if isinstance(workspace.fs, pafs.LocalFileSystem):
        return LocalFile(Path(path))
    bucket, _, key = path.partition("/")
    if isinstance(workspace.fs, pafs.S3FileSystem):
        return S3File(s3_client(workspace), bucket, key)
    if isinstance(workspace.fs, pafs.GcsFileSystem):
        return GcsFile(gcs_session(workspace), gcs_endpoint(workspace), bucket, key)
    return PlainFile(workspace, name)


class LocalFile:
    """A file in a folder. Network file systems need a working `flock` (NFS 4, Lustre: -o flock)."""

    def __init__(self, path: Path):
        self._path = path

    def read(self) -> Stored | None:
        """Return the file, None if there is none."""
        try:
            with self._path.open("rb") as file:
                content = file.read().decode()
                age = time.time() - os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return None
        return Stored(content, content, age)

    def write(self, content: str, version: str | None) -> str:
        """Write the file and return its version. Raises `ChangedError`, `OSError`."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked():
            now = self.read()
            if (now.version if now else None) != version:
                raise ChangedError
            part = self._path.with_name(f".{self._path.name}.part")
            part.write_text(content)
            part.replace(self._path)  # a reader never sees half of it
        return content

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # The lock file is never removed: a process could hold the lock of a removed one.
        path = self._path.with_name(f".{self._path.name}.lock")
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            lock(file, path)
            yield
        finally:
            os.close(file)  # unlocks, too


def lock(file: int, path: Path) -> None:
    """Lock a file descriptor of `path`. Raises `TimeoutError` after LOCK_TIMEOUT seconds."""
    deadline = time.monotonic() + LOCK_TIMEOUT
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path}: locked for {LOCK_TIMEOUT:.0f} s") from error
        except OSError as error:
            if error.errno in NO_FLOCK:
                raise UnsupportedError(f"flock: {error}") from error
            raise
        time.sleep(0.01)


class S3File:
    """An object in S3, or in a store that speaks its protocol."""

    def __init__(self, client: Any, bucket: str, key: str):
        self._client, self._at = client, {"Bucket": bucket, "Key": key}
        self._conditions_hold = False

    def read(self) -> Stored | None:
        """Return the object, None if there is none. Raises `OSError`."""
        with boto_raises_os_errors():
            try:
                answer = self._client.get_object(**self._at)
            except self._client.exceptions.NoSuchKey:
                return None
            content = answer["Body"].read().decode()
        headers = answer["ResponseMetadata"]["HTTPHeaders"]
        return Stored(content, answer["ETag"], age_by(headers["date"], headers["last-modified"]))

    def write(self, content: str, version: str | None) -> str:
        """Write the object and return its ETag. Raises `ChangedError`, `OSError`."""
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        version = self._put(content, **condition)
        if not self._conditions_hold:
            self._check_conditions(content)
        return version

    def _put(self, content: str, **condition: str) -> str:
        with boto_raises_os_errors():
            try:
                answer = self._client.put_object(**self._at, Body=content.encode(), **condition)
            except ClientError as error:
                status = error.response["ResponseMetadata"]["HTTPStatusCode"]
                # 409: another conditional write was in flight. NoSuchKey: it was removed.
                if status in (409, 412) or error.response["Error"]["Code"] == "NoSuchKey":
                    raise ChangedError from error
                if status == 501:
                    raise UnsupportedError(f"a conditional write was refused: {error}") from error
                raise
        return answer["ETag"]

    def _check_conditions(self, content: str) -> None:
        """Raise `UnsupportedError` unless two writes are refused that must be.

        `content` stands there already, so a server that ignores conditions loses nothing.
        """
        for condition in ({"IfNoneMatch": "*"}, {"IfMatch": f'"{"0" * 32}"'}):
            try:
                self._put(content, **condition)
            except ChangedError:
                continue
            raise UnsupportedError(f"{'/'.join(condition)} was ignored")
        self._conditions_hold = True


def s3_client(workspace: Workspace) -> Any:  # boto3 makes its types at run time
    """Return a client with the endpoint, region and addressing that pyarrow uses for `workspace`.

    Credentials and AWS_ENDPOINT_URL are found in the same places by both libraries.
    """
    options = uri_options(workspace)
    virtual = options.get("force_virtual_addressing") == "true"
    return boto3.client(
        "s3",
        region_name=workspace.fs.region,
        endpoint_url=endpoint_override(options),
        verify=options.get("tls_ca_file_path"),
        config=Config(
            connect_timeout=CONNECT_TIMEOUT,
            read_timeout=READ_TIMEOUT,
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
            # Many S3-compatible servers know no checksums beyond MD5.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "virtual" if virtual else "auto"},
        ),
    )


@contextmanager
def boto_raises_os_errors() -> Iterator[None]:
    """Map boto's errors to `OSError`, which is what pyarrow raises."""
    try:
        yield
    except ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        raise OSError(f"{error} (HTTP status {status})") from error
    except BotoCoreError as error:
        raise OSError(str(error)) from error


class GcsFile:
    """An object in Google Cloud Storage, through its JSON API."""

    def __init__(self, session: AuthorizedSession, endpoint: str, bucket: str, name: str):
        self._session, self._endpoint = session, endpoint
        self._bucket, self._name = bucket, name

    def read(self) -> Stored | None:
        """Return the object, None if there is none. Raises `OSError`."""
        path = f"/storage/v1/b/{self._bucket}/o/{quote(self._name, safe='')}"
        answer = self._request("GET", path, {"alt": "media"})
        if answer.status_code == 404:
            return None
        raise_for_status(answer)
        age = age_by(answer.headers["Date"], answer.headers["Last-Modified"])
        return Stored(answer.content.decode(), answer.headers["x-goog-generation"], age)

    def write(self, content: str, version: str | None) -> str:
        """Write the object and return its generation. Raises `ChangedError`, `OSError`."""
        # Generation 0 means that there is no object.
        query = {"uploadType": "media", "name": self._name, "ifGenerationMatch": version or "0"}
        answer = self._request("POST", f"/upload/storage/v1/b/{self._bucket}/o", query, content)
        if answer.status_code == 412:
            raise ChangedError
        if answer.status_code == 404:
            raise OSError(f"bucket '{self._bucket}' not found")
        raise_for_status(answer)
        return answer.json()["generation"]

    def _request(self, method: str, path: str, query: dict[str, str], body: str = "") -> Response:
        try:
            return self._session.request(
                method,
                self._endpoint + path,
                params=query,
                data=body.encode(),
                headers={"Content-Type": "application/json"},
                timeout=READ_TIMEOUT,
            )
        except GoogleAuthError as error:
            raise OSError(f"Google Cloud credentials: {error}") from error


def raise_for_status(answer: Response) -> None:
    """Raise an `OSError` with the status and the text of an answer that is no success."""
    if not answer.ok:
        raise OSError(f"{answer.text.strip()} (HTTP status {answer.status_code})")


def gcs_session(workspace: Workspace) -> AuthorizedSession:
    """Return an HTTP session with the default credentials, or none for `gs://anonymous@...`."""
    if urlsplit(workspace.location).username == "anonymous":
        credentials = AnonymousCredentials()
    else:
        try:
            credentials, _ = google.auth.default(scopes=[GCS_SCOPE])
        except GoogleAuthError as error:
            raise OSError(f"Google Cloud credentials: {error}") from error
    session = AuthorizedSession(credentials)
    retry = Retry(
        ATTEMPTS - 1,
        backoff_factor=0.5,
        status_forcelist=(429, 500, 502, 503, 504),
        allowed_methods=None,
        raise_on_status=False,
    )
    for scheme in ("https://", "http://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    return session


def gcs_endpoint(workspace: Workspace) -> str:
    """Return the address of the JSON API."""
    return endpoint_override(uri_options(workspace)) or "https://storage.googleapis.com"


class PlainFile:
    """A file in a store without conditional writes, through pyarrow.

    Of two writers within the same second the one that wrote last stays, and the other gets a
    `ChangedError` after SETTLE seconds, or at its next write.
    """

    def __init__(self, workspace: Workspace, name: str):
        self._workspace, self._name = workspace, name

    def read(self) -> Stored | None:
        """Return the file, None if there is none. Raises `OSError`."""
        try:
            with self._workspace.open_in(self._name) as file:
                content = file.read().decode()
        except FileNotFoundError:
            return None
        info = self._workspace.fs.get_file_info(self._workspace.path(self._name))
        written = info.mtime.timestamp() if info.mtime else time.time()
        return Stored(content, content, time.time() - written)

    def write(self, content: str, version: str | None) -> str:
        """Write the file and return its version. Raises `ChangedError`, `OSError`."""
        before = self.read()
        if (before.version if before else None) != version:
            raise ChangedError
        self._workspace.write(content, *self._name.split("/"))
        time.sleep(SETTLE)
        after = self.read()
        if after is None or after.content != content:
            raise ChangedError
        return content


AtomicFile = LocalFile | S3File | GcsFile | PlainFile


def uri_options(workspace: Workspace) -> dict[str, str]:
    """Return the query parameters of the workspace's URI: {"region": "eu-west-1", ...}."""
    query = parse_qs(urlsplit(workspace.location).query)
    return {key: values[-1] for key, values in query.items()}


def endpoint_override(options: dict[str, str]) -> str | None:
    """Return the URL that a workspace's URI names in place of the cloud's own endpoint."""
    endpoint = options.get("endpoint_override")
    if endpoint is None or "://" in endpoint:
        return endpoint
    return f"{options.get('scheme', 'https')}://{endpoint}"


def age_by(now: str, then: str) -> float:
    """Return the seconds between two HTTP dates of one answer."""
    return (parsedate_to_datetime(now) - parsedate_to_datetime(then)).total_seconds()
