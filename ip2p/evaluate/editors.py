"""Where the editors lie: the one that this workspace trained, and the shipped one."""

import tempfile

import pyarrow.fs as pafs

from ip2p.evaluate.sweep import SHIPPED, WORKSPACE
from ip2p.models import TextToImage, load_text_to_image
from ip2p.recipe import ModelRef, Recipe
from ip2p.workspace import Workspace


def available(workspace: Workspace | None) -> list[str]:
    """Names of the editors that there are: that of the workspace when it has been trained, then the shipped one."""
    trained = [WORKSPACE] if workspace is not None and workspace.done("model") else []
    return [*trained, SHIPPED]


def version_folder(name: str) -> tuple[str, ...]:
    """Where an editor lies in a workspace: model/, or versions/<name>/."""
    return ("model",) if name == WORKSPACE else ("versions", name)


def load_editor(recipe: Recipe, workspace: Workspace | None, name: str) -> TextToImage:
    """Load one of `available`, or a folder of the workspace's versions/; one in a bucket is fetched first.

    Raises `ValueError` when it is not there or no editor.
    """
    if name == SHIPPED:
        return load_text_to_image(recipe.models.editor, None, recipe.device, "models.editor")
    assert workspace is not None
    folder = version_folder(name)
    dtype, key = recipe.models.editor.dtype, f"the editor {'/'.join(folder)} of {workspace.location}"
    if isinstance(workspace.fs, pafs.LocalFileSystem):
        return load_text_to_image(ModelRef(path=workspace.path(*folder), dtype=dtype), None, recipe.device, key)
    with tempfile.TemporaryDirectory() as directory:
        pafs.copy_files(workspace.path(*folder), directory, source_filesystem=workspace.fs)
        return load_text_to_image(ModelRef(path=directory, dtype=dtype), None, recipe.device, key)
