"""Load an editor by name: the one that this workspace trained, the shipped one, or another of the recipe."""

import tempfile

import pyarrow.fs as pafs

from ip2p.edit.names import SHIPPED, WORKSPACE, version_folder
from ip2p.models import TextToImage, load_text_to_image
from ip2p.recipe import ModelRef, Precision, Recipe
from ip2p.workspace import Workspace


def load_editor(recipe: Recipe, workspace: Workspace | None, name: str) -> TextToImage:
    """Load one of `available`, of `evaluate.models`, or of the workspace's versions/; one in a bucket is fetched first.

    Raises `UserError` when it is not there or no editor.
    """
    if name == SHIPPED:
        return load_text_to_image(recipe.models.editor, None, recipe.device, "models.editor")
    if other := recipe.evaluate.models.get(name):
        key = f"evaluate.models.{name}"
        if other.path is not None:
            ref = ModelRef(path=other.path, revision=other.revision, dtype=other.dtype)
            return load_text_to_image(ref, None, recipe.device, key)
        assert other.workspace is not None
        return _trained(Workspace(other.workspace), version_folder(WORKSPACE), other.dtype, recipe.device, key)
    assert workspace is not None
    folder = version_folder(name)
    key = f"the editor {'/'.join(folder)} of {workspace.location}"
    return _trained(workspace, folder, recipe.models.editor.dtype, recipe.device, key)


def _trained(workspace: Workspace, folder: tuple[str, ...], dtype: Precision, device: str, key: str) -> TextToImage:
    if isinstance(workspace.fs, pafs.LocalFileSystem):
        return load_text_to_image(ModelRef(path=workspace.path(*folder), dtype=dtype), None, device, key)
    with tempfile.TemporaryDirectory() as directory:
        pafs.copy_files(workspace.path(*folder), directory, source_filesystem=workspace.fs)
        return load_text_to_image(ModelRef(path=directory, dtype=dtype), None, device, key)
