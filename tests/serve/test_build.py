"""The application as a Serve config file names it; Ray is not started."""

import pytest
import yaml
from pydantic import ValidationError
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

from ip2p.cli import read_recipe
from ip2p.recipe import REPOSITORY
from ip2p.workspace import Workspace
from serve.app import ApplicationArgs, application, build, label
from serve.keys import VARIABLE
from tests.serve.conftest import make_key

RECIPE = "recipes/miniature.yaml"


@pytest.fixture(autouse=True)
def _keys(monkeypatch):
    monkeypatch.setenv(VARIABLE, yaml.safe_dump([make_key("shop", "x").model_dump()]))


def engines_of(built) -> dict:
    """What the ingress is told of its engines: version -> (deployment's name, its arguments)."""
    _, _, engines, _, _ = built._bound_deployment.init_args
    found = {version: bound._bound_deployment for version, bound in engines.items()}
    return {version: (deployment.name, deployment.init_args) for version, deployment in found.items()}


def test_serve_builds_the_application_of_a_config_file(tmp_path):
    args = {"recipe": RECIPE, "workspace": str(tmp_path)}
    built = call_user_app_builder_with_args_if_necessary(build, args)
    recipe, workspace, _, keys, _ = built._bound_deployment.init_args
    assert built._bound_deployment.name == "EditIngress"
    assert recipe.name == "miniature"
    assert workspace.location == str(tmp_path)
    assert [key.name for key in keys] == ["shop"]
    ((name, (_, _, version, _)),) = engines_of(built).values()
    assert (name, version) == ("EditService", "shipped")


def test_a_workspace_can_be_left_out_and_keys_only_on_purpose(monkeypatch):
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(ValueError, match="no keys"):
        build(ApplicationArgs(recipe=RECIPE))
    _, workspace, _, keys, _ = build(ApplicationArgs(recipe=RECIPE, open=True))._bound_deployment.init_args
    assert workspace is None
    assert keys is None


def test_applying_a_config_anew_changes_nothing(tmp_path):
    """Serve compares arguments: equal ones replace no replica."""
    args = ApplicationArgs(recipe=RECIPE, workspace=str(tmp_path))
    first, again = build(args)._bound_deployment.init_args, build(args)._bound_deployment.init_args
    assert first[0] == again[0]
    assert first[3:] == again[3:]


def versioned(tmp_path) -> Workspace:
    workspace = Workspace(tmp_path)
    for name in ("one", "two"):
        with workspace.open_out("versions", name, "model_index.json") as file:
            file.write(b"{}")
    return workspace


def test_versions_of_a_workspace_are_served_and_tried_on_a_share(tmp_path):
    workspace = versioned(tmp_path)
    recipe = read_recipe(RECIPE)
    serve = recipe.serve.model_validate({"version": "one", "canary": {"version": "two", "share": 0.2}})
    found = engines_of(application(recipe.model_copy(update={"serve": serve}), workspace, None))
    assert {version: name for version, (name, _) in found.items()} == {"one": "EditService", "two": "EditServiceCanary"}
    assert found["two"][1][3].startswith("two@")


def test_a_version_that_has_changed_has_another_label(tmp_path):
    workspace, recipe = versioned(tmp_path), read_recipe(RECIPE)
    before = label(recipe, workspace, "one")
    assert before == label(recipe, workspace, "one") != label(recipe, workspace, "two")
    with workspace.open_out("versions", "one", "unet", "weights") as file:
        file.write(b"new")
    assert label(recipe, workspace, "one") != before


@pytest.mark.parametrize(
    ("serve", "says"),
    [
        ({"version": "three"}, "versions/three"),
        ({"version": "one", "canary": {"version": "one"}}, "name another version"),
        ({"replicas": (2, 1)}, "low <= high"),
        ({"canary": {"version": "one", "share": 2}}, "less than or equal to 1"),
    ],
)
def test_what_can_not_be_served_is_refused(tmp_path, serve, says):
    recipe = read_recipe(RECIPE)

    def serve_it() -> None:
        changed = recipe.model_copy(update={"serve": recipe.serve.model_validate(serve)})
        application(changed, versioned(tmp_path), None)

    with pytest.raises(ValueError, match=says):
        serve_it()


def test_the_manifests_arguments_are_the_builders():
    for file in (REPOSITORY / "cluster" / "kuberay" / "overlays").glob("*/serve.yaml"):
        config = yaml.safe_load(yaml.safe_load(file.read_text())["spec"]["serveConfigV2"])
        (application,) = config["applications"]
        ApplicationArgs.model_validate(application["args"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"recipe": RECIPE, "workspce": "w"}, "workspce"),
        ({"workspace": "w"}, "recipe"),
        ({"recipe": "recipes/nothing.yaml"}, "no such file"),
    ],
)
def test_what_is_wrong_is_refused(args, message):
    with pytest.raises((ValidationError, ValueError), match=message):
        call_user_app_builder_with_args_if_necessary(build, args)
