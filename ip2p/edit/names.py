"""The names of editors: the one that a workspace trained, the shipped one, and those of its versions/."""

from ip2p.workspace import Workspace

WORKSPACE, SHIPPED = "workspace", "shipped"
EDITORS = (WORKSPACE, SHIPPED)  # and those of evaluate.models


def available(workspace: Workspace | None) -> list[str]:
    """Names of the editors that there are: that of the workspace when it has been trained, then the shipped one."""
    trained = [WORKSPACE] if workspace is not None and workspace.done("model") else []
    return [*trained, SHIPPED]


def version_folder(name: str) -> tuple[str, ...]:
    """Where an editor lies in a workspace: model/, or versions/<name>/."""
    return ("model",) if name == WORKSPACE else ("versions", name)
