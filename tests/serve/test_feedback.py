"""Ids that say what made an edit, and what people think of it; no server."""

import base64
import random
import stat
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest

from ip2p.errors import UserError
from ip2p.records import FEEDBACK
from ip2p.workspace import Workspace
from serve.feedback import PATH, image_id, make_edit_id, read_edit_id, store, workspace_secret
from tests.serve.conftest import noise

SECRET = bytes(range(32))
RECORD = {"source_id": "a", "result_id": "b", "instruction": "mach es Nacht – 夜", "seed": 2**62, "guidance_scale": 7.5}


def test_id_is_readable_only_with_its_secret():
    edit_id = make_edit_id(RECORD, SECRET)
    assert read_edit_id(edit_id, SECRET) == RECORD
    assert read_edit_id(edit_id, bytes(32)) is None
    for wrong in ("", "x", edit_id[:-2], edit_id + "AA", edit_id.swapcase(), "…", "\ud800", "=" * 99, "A" * 100):
        assert read_edit_id(wrong, SECRET) is None


def test_id_tells_a_stranger_nothing():
    edit_id = make_edit_id(RECORD, SECRET)
    data = base64.urlsafe_b64decode(edit_id + "=" * (-len(edit_id) % 4))
    assert b"Nacht" not in data
    for start in range(len(data)):
        with pytest.raises(zlib.error):
            zlib.decompress(data[start:])
    assert edit_id != make_edit_id(RECORD, SECRET), "equal edits have equal ids"


@pytest.mark.parametrize("letter", ["a", "夜", "😀", "\x00"])
def test_id_of_long_texts_fits_into_a_header(letter):
    rng = random.Random(0)  # or they would be compressed
    texts = ["".join(chr(ord(letter) + rng.randrange(60)) for _ in range(2000)) for _ in range(2)]
    edit_id = make_edit_id(RECORD | dict(zip(("instruction", "negative_prompt"), texts)), SECRET)
    assert len(edit_id) < 3900, "more than the header buffer of common proxies"
    record = read_edit_id(edit_id, SECRET)
    assert record is not None and texts[0].startswith(record["instruction"])


def test_secret_belongs_to_the_workspace_and_to_its_owner(tmp_path):
    assert workspace_secret(Workspace(tmp_path)) == workspace_secret(Workspace(tmp_path))
    assert stat.S_IMODE((tmp_path / PATH).stat().st_mode) == 0o600


def test_services_that_start_together_agree_on_the_secret(tmp_path):
    with ThreadPoolExecutor(8) as threads:
        secrets = list(threads.map(lambda _: workspace_secret(Workspace(tmp_path)), range(8)))
    assert len(set(secrets)) == 1
    assert len(secrets[0]) == 32


@pytest.mark.parametrize("content", [b"", b"\xff" * 32, b"00" * 31, b"x" * 64])
def test_damaged_secret_is_refused(tmp_path, content):
    (tmp_path / "feedback").mkdir()
    (tmp_path / PATH).write_bytes(content)
    with pytest.raises(UserError, match="remove the file"):
        workspace_secret(Workspace(tmp_path))


def test_workspace_that_cannot_be_written_has_no_secret(tmp_path):
    (tmp_path / "feedback").write_text("a file where the folder belongs")
    assert workspace_secret(Workspace(tmp_path)) is None


def test_a_later_opinion_replaces_the_earlier_and_other_files_are_kept(tmp_path):
    workspace = Workspace(tmp_path)
    store(workspace, RECORD | {"edit_id": "one", "choice": "up"})
    store(workspace, RECORD | {"edit_id": "two", "choice": "up"})
    for choice in ("up", "down"):
        store(workspace, RECORD | {"edit_id": "one", "choice": choice, "client": "shop"})
    table = workspace.read_table("feedback")
    assert table.schema.equals(pa.schema(FEEDBACK))
    rows = {row["edit_id"]: row for row in table.to_pylist()}
    assert len(rows) == table.num_rows == 2
    assert (rows["one"]["choice"], rows["one"]["client"], rows["two"]["choice"]) == ("down", "shop", "up")
    assert rows["one"]["seed"] == 2**62


def test_image_id_depends_on_pixels_only():
    image = noise(5, 7, 3)
    assert image_id(image) == image_id(np.asfortranarray(image))
    assert image_id(image) != image_id(image.reshape(7, 5, 3))
