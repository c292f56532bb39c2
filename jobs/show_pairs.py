"""A contact sheet of a workspace's pairs, while they are being made or after: accepted and rejected, with why.

    python -m jobs.show_pairs --workspace workspace            writes workspace/pairs.html
    python -m jobs.show_pairs --workspace workspace --count 100

Rejected candidates are kept for a share of the captions alone: pairs.keep_rejects in the recipe.
"""

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from ip2p.cli import parse_flags
from ip2p.report.contact_sheet import write_sheet
from ip2p.workspace import Workspace
from runtime.exit import exit_statuses


class Settings(BaseSettings):
    __doc__ = __doc__
    model_config = SettingsConfigDict(cli_prog_name="python -m jobs.show_pairs", extra="forbid")

    workspace: str = Field(description="folder of the run: a local path, s3://... or gs://...")
    count: int = Field(48, ge=1, description="pairs of either kind")


def main(argv: list[str] | None = None) -> None:
    with exit_statuses():
        settings = parse_flags(Settings, argv)
        workspace = Workspace(settings.workspace)
        shown = write_sheet(workspace, settings.count)
    print(f"show_pairs: {shown['accepted']} accepted, {shown['rejected']} rejected: {workspace.uri('pairs.html')}")


if __name__ == "__main__":
    main()
