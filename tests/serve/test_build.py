"""The application as a Serve config file names it; Ray is not started."""

import pytest
import yaml
from pydantic import ValidationError
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

from ip2p.recipe import REPOSITORY
from serve.app import ApplicationArgs, build


def test_serve_builds_the_application_of_a_config_file(tmp_path):
    args = {"recipe": "recipes/miniature.yaml", "workspace": str(tmp_path)}
    application = call_user_app_builder_with_args_if_necessary(build, args)
    deployment = application._bound_deployment
    recipe, workspace = deployment.init_args
    assert deployment.name == "EditService"
    assert recipe.name == "miniature"
    assert workspace.location == str(tmp_path)


def test_a_workspace_can_be_left_out():
    assert build(ApplicationArgs(recipe="recipes/miniature.yaml"))._bound_deployment.init_args[1] is None


def test_the_manifests_arguments_are_the_builders():
    for file in (REPOSITORY / "cluster" / "kuberay" / "overlays").glob("*/serve.yaml"):
        config = yaml.safe_load(yaml.safe_load(file.read_text())["spec"]["serveConfigV2"])
        (application,) = config["applications"]
        ApplicationArgs.model_validate(application["args"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"recipe": "recipes/miniature.yaml", "workspce": "w"}, "workspce"),
        ({"workspace": "w"}, "recipe"),
        ({"recipe": "recipes/nothing.yaml"}, "no such file"),
    ],
)
def test_what_is_wrong_is_refused(args, message):
    with pytest.raises((ValidationError, ValueError), match=message):
        call_user_app_builder_with_args_if_necessary(build, args)
