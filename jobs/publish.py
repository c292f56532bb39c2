"""Put the editor and the dataset of a workspace on a hub, with their cards. Without --yes it lists, and sends nothing.

The hub is Hugging Face's, or the one that HF_ENDPOINT names; the token is HF_TOKEN or that of `hf auth login`.
"""

import tempfile
from pathlib import Path

import pyarrow.fs as pafs
from huggingface_hub import HfApi
from pydantic import BaseModel, Field
from pydantic_settings import CliImplicitFlag

from ip2p.cli import load_settings
from ip2p.errors import UserError
from ip2p.pairs.export import dataset_card
from ip2p.recipe import Recipe
from ip2p.stage import PLANS
from ip2p.workspace import Workspace
from runtime.job import job

NOT_SENT = ("_SUCCESS",)


class Flags(BaseModel):
    model_repo: str | None = Field(None, description="repository for model/, e.g. me/my-editor")
    dataset_repo: str | None = Field(None, description="repository for dataset/, e.g. me/my-pairs")
    private: CliImplicitFlag[bool] = Field(False, description="make repositories that are not there yet private")
    yes: CliImplicitFlag[bool] = Field(False, description="send them; without it they are only listed")


def run(recipe: Recipe, workspace: Workspace, flags: Flags) -> None:
    """List what goes where and, with `flags.yes`, send it; files that are there already are not sent again.

    Raises `UserError` when no repository is named, or there is nothing complete to send.
    """
    repositories = {"model": flags.model_repo, "dataset": flags.dataset_repo}
    wanted = {stage: repository for stage, repository in repositories.items() if repository}
    if not wanted:
        raise UserError("--model_repo, --dataset_repo: name one at least, e.g. --model_repo me/my-editor")
    for stage in wanted:
        if not workspace.done(stage):
            raise UserError(f"{workspace.uri(stage)} is not complete: run {PLANS[stage].job} first")
    for stage, repository in wanted.items():
        infos = workspace.fs.get_file_info([path for path in workspace.files(stage) if not path.endswith(NOT_SENT)])
        for info in infos:
            print(f"  {info.size / 2**20:10.1f} MB  {info.path.removeprefix(workspace.path(stage) + '/')}")
        megabytes = sum(info.size for info in infos) / 2**20
        print(f"publish: {stage}/, {len(infos)} files of {megabytes:.1f} MB, to {repository}")
        if flags.yes:
            print(f"publish: {send(recipe, workspace, stage, repository, flags.private)}")
    if not flags.yes:
        print("publish: nothing was sent; --yes sends it")


def send(recipe: Recipe, workspace: Workspace, stage: str, repository: str, private: bool) -> str:
    """Upload a stage's folder in one commit; returns the address of the commit."""
    hub = HfApi()
    hub.create_repo(repository, repo_type=stage, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        pafs.copy_files(workspace.path(stage), folder, source_filesystem=workspace.fs)
        if stage == "dataset":
            Path(folder, "README.md").write_text(dataset_card(recipe, workspace.counts("dataset")))
        commit = hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            repo_type=stage,
            ignore_patterns=list(NOT_SENT),
            commit_message=f"{recipe.name}: {stage}",
        )
    return commit.commit_url


def main(argv: list[str] | None = None) -> None:
    recipe, workspace, flags = load_settings(__doc__ or "", Flags, argv=argv)
    assert workspace is not None
    with job("publish", workspace):
        run(recipe, workspace, flags)


if __name__ == "__main__":
    main()
