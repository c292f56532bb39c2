"""Ids that say what made an edit, and what people think of it; no server."""

import numpy as np
import pyarrow as pa

from ip2p.records import FEEDBACK
from ip2p.workspace import Workspace
from serve.feedback import append, image_id, make_edit_id, read_edit_id, signing_secret
from tests.serve.conftest import noise

RECORD = {"source_id": "a", "result_id": "b", "instruction": "mach es Nacht – 夜", "seed": 2**62, "guidance_scale": 7.5}


def test_id_is_readable_only_with_its_secret():
    edit_id = make_edit_id(RECORD, b"secret")
    assert read_edit_id(edit_id, b"secret") == RECORD
    assert read_edit_id(edit_id, b"another") is None
    for wrong in ("", "x", edit_id[:-2], edit_id + "AA", edit_id.swapcase(), "…", "\ud800", "=" * 99):
        assert read_edit_id(wrong, b"secret") is None


def test_secret_belongs_to_the_workspace(tmp_path):
    workspace = Workspace(tmp_path)
    assert signing_secret(workspace) == signing_secret(Workspace(tmp_path))
    assert signing_secret(None) != signing_secret(None)


def test_rows_are_added_and_existing_files_kept(tmp_path):
    workspace = Workspace(tmp_path)
    signing_secret(workspace)
    append(workspace, RECORD | {"choice": "up"})
    before = workspace.files("feedback")
    append(workspace, RECORD | {"choice": "down"})
    assert set(before) < set(workspace.files("feedback"))
    table = workspace.read_table("feedback")
    assert table.schema.equals(pa.schema(FEEDBACK))
    assert sorted(table["choice"].to_pylist()) == ["down", "up"]
    assert table["seed"].to_pylist() == [2**62] * 2


def test_image_id_depends_on_pixels_only():
    image = noise(5, 7, 3)
    assert image_id(image) == image_id(np.asfortranarray(image))
    assert image_id(image) != image_id(image.reshape(7, 5, 3))
