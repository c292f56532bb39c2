"""The application as Serve builds it for a config file: connected to Ray, here with two GPUs."""

from pathlib import Path

import pytest
import ray
import yaml
from pydantic import ValidationError
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

from ip2p.cli import read_recipe
from ip2p.errors import UserError
from ip2p.recipe import REPOSITORY
from ip2p.workspace import Workspace
from runtime.connect import connect
from serve.app import ApplicationArgs, application, build, check_open, engine_resources, label, main
from serve.keys import VARIABLE
from tests.serve.conftest import make_key

RECIPE = "recipes/miniature.yaml"
CPU = {"num_cpus": 1}
OVERLAYS = sorted((REPOSITORY / "cluster" / "kuberay" / "overlays").glob("*/serve.yaml"))


@pytest.fixture(scope="module", autouse=True)
def _ray_with_gpus():
    connected = ray.is_initialized()
    ray.shutdown()
    ray.init("local", num_gpus=2, include_dashboard=False)
    yield
    ray.shutdown()
    if connected:
        connect()


@pytest.fixture(autouse=True)
def _keys(monkeypatch):
    monkeypatch.setenv(VARIABLE, yaml.safe_dump([make_key("shop", "x").model_dump()]))


def engines_of(built) -> dict:
    """Return the deployment of each version's engines."""
    engines = built._bound_deployment.init_args[2]
    return {version: bound._bound_deployment for version, bound in engines.items()}


def test_serve_builds_the_application_of_a_config_file(tmp_path):
    args = {"recipe": RECIPE, "workspace": str(tmp_path)}
    built = call_user_app_builder_with_args_if_necessary(build, args)
    recipe, workspace, _, keys, *_ = built._bound_deployment.init_args
    assert built._bound_deployment.name == "EditIngress"
    assert recipe.name == "miniature"
    assert workspace.location == str(tmp_path)
    assert [key.name for key in keys] == ["shop"]
    ((version, engine),) = engines_of(built).items()
    assert (version, engine.name, engine.init_args[2]) == ("shipped", "EditService", "shipped")


def test_workspace_is_optional_and_missing_keys_need_open(monkeypatch):
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(ValueError, match="no keys"):
        build(ApplicationArgs(recipe=RECIPE))
    _, workspace, _, keys, *_ = build(ApplicationArgs(recipe=RECIPE, open=True))._bound_deployment.init_args
    assert workspace is None
    assert keys is None


def test_applying_a_config_again_changes_nothing(tmp_path):
    """Serve compares arguments; equal arguments replace no replica."""
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


def test_version_and_canary_of_a_workspace_are_deployed(tmp_path):
    workspace = versioned(tmp_path)
    recipe = read_recipe(RECIPE)
    serve = recipe.serve.model_validate({"version": "one", "canary": {"version": "two", "share": 0.2}})
    engines = engines_of(application(recipe.model_copy(update={"serve": serve}), workspace, None, CPU))
    assert {version: engine.name for version, engine in engines.items()} == {
        "one": "EditService",
        "two": "EditServiceCanary",
    }
    assert engines["two"].init_args[3].startswith("two@")


def test_changed_version_has_another_label(tmp_path):
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
        ({"version": "one", "canary": {"version": "one"}}, "name another one"),
        ({"replicas": (2, 1)}, "low <= high"),
        ({"canary": {"version": "one", "share": 2}}, "less than or equal to 1"),
    ],
)
def test_unservable_recipe_is_rejected(tmp_path, serve, says):
    recipe = read_recipe(RECIPE)

    def serve_it() -> None:
        changed = recipe.model_copy(update={"serve": recipe.serve.model_validate(serve)})
        application(changed, versioned(tmp_path), None, CPU)

    with pytest.raises(ValueError, match=says):
        serve_it()


def test_manifests_arguments_are_valid():
    for file in OVERLAYS:
        ApplicationArgs.model_validate(manifest_application(file)["args"])


def manifest_application(file: Path) -> dict:
    config = yaml.safe_load(yaml.safe_load(file.read_text())["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    return application


@pytest.mark.parametrize(("device", "resources"), [("cuda", {"num_gpus": 1}), ("cpu", {"num_cpus": 1})])
def test_canary_gets_the_resources_of_the_main_version(tmp_path, device, resources):
    versioned(tmp_path / "run")
    content = yaml.safe_load((REPOSITORY / RECIPE).read_text())
    content |= {"device": device, "serve": {"version": "one", "canary": {"version": "two"}}}
    recipe = tmp_path / "canary.yaml"
    recipe.write_text(yaml.safe_dump(content))
    built = build(ApplicationArgs(recipe=str(recipe), workspace=str(tmp_path / "run")))
    options = {engine.name: engine.ray_actor_options for engine in engines_of(built).values()}
    assert options["EditService"] == options["EditServiceCanary"]
    assert resources.items() <= options["EditServiceCanary"].items()


def test_gpu_manifest_asks_for_what_a_canary_gets():
    """Serve applies the manifest's overrides to EditService alone."""
    (file,) = [file for file in OVERLAYS if file.parent.name == "gpu"]
    application = manifest_application(file)
    (engine,) = application["deployments"]
    resources = engine_resources(read_recipe(application["args"]["recipe"]))
    assert {"num_cpus": 1} | resources == engine["ray_actor_options"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"recipe": RECIPE, "workspce": "w"}, "workspce"),
        ({"workspace": "w"}, "recipe"),
        ({"recipe": "recipes/nothing.yaml"}, "no such file"),
    ],
)
def test_wrong_arguments_are_rejected(args, message):
    with pytest.raises((ValidationError, ValueError), match=message):
        call_user_app_builder_with_args_if_necessary(build, args)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--open", "--host", "0.0.0.0"], "error: --open serves this machine only; use --host 127.0.0.1"),
        (["--keys", "nowhere.yaml"], "error: --keys nowhere.yaml: "),
        (["--keys", "k", "--host", "0.0.0.0"], "error: --host 0.0.0.0: keys and pictures would cross the network"),
        (["--keys", "k", "--host", "192.0.2.1", "--tls_cert", "c"], "error: --tls_cert and --tls_key belong together"),
        (["--open", "--tls_cert", "nowhere.pem", "--tls_key", "k"], "error: --tls_cert nowhere.pem: no such file"),
        (["--open", "--serve.version", "three"], "error: serve.version: 'three' can't be served: no --workspace"),
    ],
)
def test_users_mistake_ends_the_command_with_status_2_and_one_line(capsys, flags, message):
    with pytest.raises(SystemExit) as ended:
        main(["--recipe", RECIPE, *flags])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)


def test_an_open_service_refuses_to_believe_forwarded_addresses(tmp_path, monkeypatch):
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    with pytest.raises(UserError, match="FORWARDED_ALLOW_IPS"):
        check_open("127.0.0.1")
    with pytest.raises(UserError, match="FORWARDED_ALLOW_IPS"):
        call_user_app_builder_with_args_if_necessary(build, {"recipe": RECIPE, "open": True})
