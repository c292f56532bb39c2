"""People's opinions of edits, in append-only parquet files of the workspace's feedback/.

The id of an edit holds its settings, signed, so that any ingress can read it without stored state.
"""

import base64
import binascii
import hashlib
import hmac
import json
import secrets
import time
import uuid
import zlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ip2p.records import FEEDBACK
from ip2p.workspace import Workspace

FOLDER, SECRET = "feedback", "signature.key"
SIGNATURE_BYTES = 12


def image_id(image: np.ndarray) -> str:
    """Return a hash of the pixels, uint8 (H, W, 3), as 16 hex digits."""
    return hashlib.blake2b(repr(image.shape).encode() + np.ascontiguousarray(image).data, digest_size=8).hexdigest()


def signing_secret(workspace: Workspace | None) -> bytes:
    """Return the workspace's signing secret, creating it on first use.

    Without a workspace, return a random one.
    """
    if workspace is None:
        return secrets.token_bytes(32)
    if not workspace.exists(FOLDER, SECRET):
        with workspace.open_out(FOLDER, SECRET) as file:
            file.write(secrets.token_bytes(32))
    with workspace.open_in(FOLDER, SECRET) as file:
        return file.read()


def _signature(secret: bytes, body: bytes) -> bytes:
    return hmac.digest(secret, body, "sha256")[:SIGNATURE_BYTES]


def make_edit_id(record: dict[str, Any], secret: bytes) -> str:
    """Return an id that holds `record`, columns of FEEDBACK."""
    body = zlib.compress(json.dumps(record, separators=(",", ":")).encode(), 9)
    return base64.urlsafe_b64encode(_signature(secret, body) + body).decode().rstrip("=")


def read_edit_id(edit_id: str, secret: bytes) -> dict[str, Any] | None:
    """Return the record in an id, None for an id that `make_edit_id` did not make."""
    try:
        data = base64.b64decode(edit_id + "=" * (-len(edit_id) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return None
    body = data[SIGNATURE_BYTES:]
    if not hmac.compare_digest(data[:SIGNATURE_BYTES], _signature(secret, body)):
        return None
    return json.loads(zlib.decompress(body))


def append(workspace: Workspace, row: dict[str, Any]) -> None:
    """Write one row of FEEDBACK as a new file. Existing files are never touched."""
    name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:12]}.parquet"
    with workspace.open_out(FOLDER, name) as file:
        pq.write_table(pa.Table.from_pylist([row], schema=FEEDBACK), file)
