"""People's opinions of edits, in parquet files of the workspace's feedback/.

An edit id holds the settings and the client's name, encrypted: any ingress can read it without
stored state, and clients cannot. A later opinion of the same edit replaces the earlier one.
"""

import base64
import binascii
import hashlib
import io
import json
import logging
import secrets
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ip2p.errors import UserError
from ip2p.records import FEEDBACK
from ip2p.workspace import Workspace
from runtime.atomic_file import AtomicFile, ChangedError, PlainFile, UnsupportedError, atomic_file

logger = logging.getLogger("ray.serve")

FOLDER = "feedback"
PATH = f"{FOLDER}/signature.key"
SECRET_BYTES, NONCE_BYTES = 32, 12
# Of each text in an id, so that it fits into a header: 300 letters of any script are below 1 KB.
# CLIP reads 77 tokens, which are about as many.
TEXT_IN_ID = 300


def image_id(image: np.ndarray) -> str:
    """Return a hash of the pixels, uint8 (H, W, 3), as 16 hex digits."""
    return hashlib.blake2b(repr(image.shape).encode() + np.ascontiguousarray(image).data, digest_size=8).hexdigest()


def workspace_secret(workspace: Workspace) -> bytes | None:
    """Return the workspace's secret, creating it on first use. None: the workspace can't be written.

    Raises `UserError` for a damaged secret.
    """
    try:
        try:
            stored = _read_or_create(workspace, atomic_file(workspace, PATH))
        except UnsupportedError:
            stored = _read_or_create(workspace, PlainFile(workspace, PATH))
    except OSError as error:
        logger.warning("feedback is off: %s can't be written: %s", workspace.location, error)
        return None
    except UnicodeDecodeError:
        stored = ""
    try:
        secret = bytes.fromhex(stored)
    except ValueError:
        secret = b""
    if len(secret) != SECRET_BYTES:
        raise UserError(
            f"{workspace.location}/{PATH}: not a secret of {2 * SECRET_BYTES} hex digits; "
            "remove the file, and a new one is created (feedback on older edits is then refused)"
        )
    return secret


def _read_or_create(workspace: Workspace, file: AtomicFile) -> str:
    """Return the content of the secret's file, which the first of several processes writes."""
    if stored := file.read():
        return stored.content.strip()
    content = secrets.token_hex(SECRET_BYTES)
    try:
        file.write(content, None)
    except ChangedError:
        return _read_or_create(workspace, file)
    if isinstance(workspace.fs, pafs.LocalFileSystem):
        Path(workspace.path(PATH)).chmod(0o600)
    return content


def make_edit_id(record: dict[str, Any], secret: bytes) -> str:
    """Return an id that holds `record`, columns of FEEDBACK. Long texts are cut."""
    short = {key: value[:TEXT_IN_ID] if isinstance(value, str) else value for key, value in record.items()}
    body = zlib.compress(json.dumps(short, separators=(",", ":"), ensure_ascii=False).encode(), 9)
    nonce = secrets.token_bytes(NONCE_BYTES)
    return base64.urlsafe_b64encode(nonce + AESGCM(secret).encrypt(nonce, body, None)).decode().rstrip("=")


def read_edit_id(edit_id: str, secret: bytes) -> dict[str, Any] | None:
    """Return the record in an id, None for an id that `make_edit_id` did not make."""
    try:
        data = base64.b64decode(edit_id + "=" * (-len(edit_id) % 4), altchars=b"-_", validate=True)
        body = AESGCM(secret).decrypt(data[:NONCE_BYTES], data[NONCE_BYTES:], None)
    except (binascii.Error, ValueError, InvalidTag):
        return None
    return json.loads(zlib.decompress(body))


def store(workspace: Workspace, row: dict[str, Any]) -> None:
    """Write one row of FEEDBACK, in place of an earlier opinion of the same edit."""
    name = hashlib.blake2b(row["edit_id"].encode(), digest_size=16).hexdigest()
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([row], schema=FEEDBACK), buffer)
    workspace.write(buffer.getvalue(), FOLDER, f"{name}.parquet")
