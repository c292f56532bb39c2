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


def load_editor(recipe: Recipe, workspace: Workspace | None, name: str) -> TextToImage:
    """Load one of `available`; the model of a workspace in a bucket is fetched first.

    Raises `ValueError` when it is not there or no editor.
    """
    if name == SHIPPED:
        return load_text_to_image(recipe.models.editor, None, recipe.device, "models.editor")
    assert workspace is not None
    dtype, key = recipe.models.editor.dtype, f"the editor of {workspace.location}"
    if isinstance(workspace.fs, pafs.LocalFileSystem):
        return load_text_to_image(ModelRef(path=workspace.path("model"), dtype=dtype), None, recipe.device, key)
    with tempfile.TemporaryDirectory() as directory:
        pafs.copy_files(workspace.path("model"), directory, source_filesystem=workspace.fs)
        return load_text_to_image(ModelRef(path=directory, dtype=dtype), None, recipe.device, key)
