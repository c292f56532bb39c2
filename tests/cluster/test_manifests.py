"""cluster/kuberay: what kustomize makes of it, against KubeRay's CRDs and against what the jobs ask Ray for.

The CRDs lie beside the repository or where KUBERAY_CRDS says; kubectl renders (it needs no cluster for that). Where
either is not to be had, the tests that need it are skipped.
"""

import ast
import copy
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from ip2p.cli import load_settings
from ip2p.recipe import REPOSITORY
from tests.cluster.test_image import pins

KUBERAY = REPOSITORY / "cluster" / "kuberay"
CRDS = Path(os.environ.get("KUBERAY_CRDS", REPOSITORY.parent / "shared" / "kuberay-crds"))
OVERLAYS = ["gpu", "miniature"]
KUSTOMIZATIONS = sorted(file.parent for file in KUBERAY.rglob("kustomization.yaml"))
STAGES = {"edit-captions", "generate-pairs", "export-dataset", "train", "evaluate"}

Manifest = dict[str, Any]

needs_crds = pytest.mark.skipif(not CRDS.is_dir(), reason=f"KubeRay's CRDs are not in {CRDS}: set KUBERAY_CRDS")
needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl, which renders, is not installed")


def documents(text: str) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(text) if document]


@cache
def rendered(overlay: str) -> list[Manifest]:
    command = ["kubectl", "kustomize", str(KUBERAY / "overlays" / overlay)]
    return documents(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)


def of_kind(manifests: list[Manifest], *kinds: str) -> dict[str, Manifest]:
    return {manifest["metadata"]["name"]: manifest for manifest in manifests if manifest["kind"] in kinds}


def cluster_of(manifest: Manifest) -> dict[str, Any]:
    """The spec of a RayCluster, wherever the kind has it."""
    spec = manifest["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pools(manifest: Manifest) -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in cluster_of(manifest)["workerGroupSpecs"]}


def pod_templates(manifest: Manifest) -> list[dict[str, Any]]:
    cluster = cluster_of(manifest)
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def ray_manifests(overlay: str) -> dict[str, Manifest]:
    return of_kind(rendered(overlay), "RayCluster", "RayJob", "RayService")


def run_of(overlay: str) -> dict[str, str]:
    return of_kind(rendered(overlay), "ConfigMap")["run"]["data"]


# --- the CRDs


def strict(schema: Any) -> Any:
    """An openAPIV3Schema that refuses fields it does not know: a server would drop them without a word."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: value if key in ("default", "enum", "required") else strict(value) for key, value in schema.items()}
    open_ended = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not open_ended:
        result["additionalProperties"] = False
    return result


@cache
def validator(kind: str) -> jsonschema.Draft4Validator:
    crd = yaml.safe_load((CRDS / f"ray.io_{kind.lower()}s.yaml").read_text())
    (version,) = (version for version in crd["spec"]["versions"] if version["name"] == "v1")
    return jsonschema.Draft4Validator(strict(version["schema"]["openAPIV3Schema"]))


def problems(manifest: Manifest) -> list[str]:
    errors = validator(manifest["kind"]).iter_errors(manifest)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in errors]


@needs_crds
@pytest.mark.parametrize("file", sorted(KUBERAY.rglob("*.yaml")), ids=lambda file: str(file.relative_to(KUBERAY)))
def test_sources_are_what_the_crds_know(file):
    for manifest in documents(file.read_text()):
        if manifest["kind"] in ("RayCluster", "RayJob", "RayService"):
            # Clusters of jobs and of the service are filled in by kustomize.
            filled_in = "'(headGroupSpec|rayClusterConfig)' is a required property$"
            left = [problem for problem in problems(manifest) if not re.search(filled_in, problem)]
            assert left == []


@needs_crds
@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_is_applied_is_valid(overlay):
    manifests = ray_manifests(overlay)
    assert set(manifests) == {"ip2p", "edit", *STAGES}
    assert {name: problems(manifest) for name, manifest in manifests.items() if problems(manifest)} == {}


def misspell(part: dict[str, Any], key: str) -> None:
    part[key[:-1]] = part.pop(key)


BREAKAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "unknown field": lambda spec: spec.update(autoscaling=True),
    "misspelt field": lambda spec: misspell(spec, "enableInTreeAutoscaling"),
    "misspelt field of a pod": lambda spec: misspell(
        spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0], "securityContext"
    ),
    "wrong type": lambda spec: spec["workerGroupSpecs"][0].update(maxReplicas="two"),
    "a number for a string": lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
    "value not in the choice": lambda spec: spec["authOptions"].update(mode="password"),
    "required field left out": lambda spec: spec["workerGroupSpecs"][0].pop("groupName"),
    "quantity that is none": lambda spec: spec["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"][
        "requests"
    ].update(memory="much"),
}


@needs_crds
@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "RayService"])
@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_manifest_is_refused(kind, breakage):
    (source,) = documents((KUBERAY / "overlays" / "gpu" / "ray-cluster.yaml").read_text())
    spec = {
        "RayCluster": source["spec"],
        "RayJob": {"entrypoint": "true", "rayClusterSpec": source["spec"]},
        "RayService": {"rayClusterConfig": source["spec"]},
    }[kind]
    manifest = copy.deepcopy({"apiVersion": "ray.io/v1", "kind": kind, "metadata": {"name": "test"}, "spec": spec})
    assert problems(manifest) == []
    BREAKAGES[breakage](cluster_of(manifest))
    assert problems(manifest) != []


# --- kustomize


def resources(folder: Path) -> list[Manifest]:
    """All that a kustomization's `resources` hold, generated ConfigMaps among them."""
    content = yaml.safe_load((folder / "kustomization.yaml").read_text())
    found = [
        {"kind": "ConfigMap", "metadata": {"name": generated["name"]}}
        for generated in content.get("configMapGenerator", [])
    ]
    for name in content.get("resources", []):
        path = (folder / name).resolve()
        found += resources(path) if path.is_dir() else documents(path.read_text())
    return found


@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=lambda folder: str(folder.relative_to(KUBERAY)))
def test_kustomizations_name_what_is_there(folder):
    content = yaml.safe_load((folder / "kustomization.yaml").read_text())
    known = {"apiVersion", "kind", "namespace", "resources", "components", "images", "configMapGenerator", "patches"}
    assert set(content) <= known | {"replacements"}
    for component in content.get("components", []):
        assert yaml.safe_load((folder / component / "kustomization.yaml").read_text())["kind"] == "Component"
    found = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in resources(folder)}
    for patch in content.get("patches", []):
        (target,) = documents((folder / patch["path"]).read_text())
        assert (target["kind"], target["metadata"]["name"]) in found
    files = {path.name for path in folder.iterdir() if path.suffix == ".yaml" and path.name != "kustomization.yaml"}
    named = {*content.get("resources", []), *(patch["path"] for patch in content.get("patches", []))}
    assert files <= named, "a file that no kustomization names does nothing"


def replacements(overlay: str) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    for folder in (KUBERAY / "job-clusters", KUBERAY / "overlays" / overlay):
        content = yaml.safe_load((folder / "kustomization.yaml").read_text())
        for replacement in content.get("replacements", []):
            yield replacement["source"], replacement["targets"]


def at(manifest: Any, path: str) -> Any:
    """What lies at a path as kustomize writes it: `spec.workerGroupSpecs.[groupName=cpu]`."""
    for part in path.split("."):
        if match := re.fullmatch(r"\[(\w+)=(\w+)\]", part):
            (manifest,) = (item for item in manifest if item[match[1]] == match[2])
        else:
            manifest = manifest[part]
    return manifest


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_replacements_name_what_is_there(overlay):
    manifests = resources(KUBERAY / "overlays" / overlay)
    for source, targets in replacements(overlay):
        assert at(of_kind(manifests, source["kind"])[source["name"]], source["fieldPath"]) is not None
        for target in targets:
            select = target["select"]
            matching = [m for m in manifests if all(m["metadata"].get(k, m.get(k)) == v for k, v in select.items())]
            assert matching, f"nothing is {select}"


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_parts_can_be_applied_by_label(overlay):
    parts: dict[str, set[str]] = {}
    for manifest in rendered(overlay):
        parts.setdefault(manifest["metadata"]["labels"]["app.kubernetes.io/component"], set()).add(manifest["kind"])
        assert manifest["metadata"].get("namespace") == (None if manifest["kind"] == "Namespace" else "ip2p")
    assert parts.pop("platform").isdisjoint({"RayCluster", "RayJob", "RayService"})
    assert parts == {"cluster": {"RayCluster"}, "edit": {"RayService"}} | {stage: {"RayJob"} for stage in STAGES}


# --- security


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_can_not_become_root(overlay):
    for manifest in ray_manifests(overlay).values():
        for pod in pod_templates(manifest):
            assert pod["securityContext"]["runAsNonRoot"]
            assert pod["securityContext"]["runAsUser"] > 0
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        containers = [container for pod in pod_templates(manifest) for container in pod["containers"]]
        for container in (*containers, cluster_of(manifest)["autoscalerOptions"]):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_secrets_are_by_reference(overlay):
    assert of_kind(rendered(overlay), "Secret") == {}
    for manifest in ray_manifests(overlay).values():
        cluster = cluster_of(manifest)
        assert cluster["authOptions"] == {"mode": "token", "secretName": "ray-token"}
        for pod in pod_templates(manifest):
            for variable in pod["containers"][0].get("env", []):
                secret = re.search("TOKEN|PASSWORD|SECRET|KEY", variable["name"])
                assert ("valueFrom" in variable) == bool(secret), variable["name"]
        if "gcsFaultToleranceOptions" in cluster:
            assert set(cluster["gcsFaultToleranceOptions"]["redisPassword"]) == {"valueFrom"}


@needs_kubectl
def test_the_head_survives_where_something_outlives_it():
    tolerant = {name for name, m in ray_manifests("gpu").items() if "gcsFaultToleranceOptions" in cluster_of(m)}
    assert tolerant == {"ip2p", "edit"}


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_is_closed_to_strangers(overlay):
    policy = of_kind(rendered(overlay), "NetworkPolicy")["ray"]["spec"]
    assert policy["podSelector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    among_themselves, *others = policy["ingress"]
    assert among_themselves == {"from": [{"podSelector": policy["podSelector"]}]}
    assert all(rule["from"] and rule["ports"] for rule in others)
    budgets = of_kind(rendered(overlay), "PodDisruptionBudget")
    assert all(isinstance(budget["spec"]["minAvailable"], int) for budget in budgets.values())


# --- what the jobs ask for


def amount(text: str) -> float:
    """A Kubernetes quantity: 500m, 8, 16Gi."""
    number, unit = re.fullmatch(r"([\d.]+)(m|Mi|Gi)?", text).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return float(number) * {None: 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30}[unit]


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_requests_are_within_limits(overlay):
    for manifest in ray_manifests(overlay).values():
        for pod in pod_templates(manifest):
            (container,) = pod["containers"]
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            assert {"cpu", "memory"} <= set(requests) <= set(limits)
            assert all(amount(requests[name]) <= amount(limits[name]) for name in requests)
            assert requests["memory"] == limits["memory"], "Ray sizes its object store by the limit"


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_heads_have_no_cpus_for_tasks_and_pools_shrink_to_nothing(overlay):
    for manifest in ray_manifests(overlay).values():
        cluster = cluster_of(manifest)
        assert cluster["rayVersion"] == pins("gpu")["ray"]
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert cluster["enableInTreeAutoscaling"]
        for name, pool in pools(manifest).items():
            assert pool["minReplicas"] == 0 < pool["maxReplicas"]
            assert pool["labels"] == {"pool": name}


def gpus(pool: dict[str, Any]) -> int:
    """Of all pods of a pool at its largest."""
    (container,) = pool["template"]["spec"]["containers"]
    return pool["maxReplicas"] * int(container["resources"]["limits"].get("nvidia.com/gpu", 0))


@needs_kubectl
def test_pools_have_the_gpus_that_jobs_ask_for():
    run = run_of("gpu")
    argv = ["--recipe", run["RECIPE"], *run["FLAGS"].split()]
    recipe, _, _ = load_settings("", argv=argv, needs=())
    asked = {
        "edit-captions": recipe.instructions.replicas,
        "generate-pairs": recipe.pairs.replicas,
        "export-dataset": 0,
        "train": max(recipe.train.workers, recipe.train.encode_replicas),
        "evaluate": recipe.evaluate.replicas,
    }
    manifests = ray_manifests("gpu")
    for job, wanted in asked.items():
        assert sum(map(gpus, pools(manifests[job]).values())) >= wanted, job
        assert (wanted == 0) == (set(pools(manifests[job])) == {"cpu"}), f"{job} has pools that it does not use"
    (container,) = pools(manifests["train"])["training"]["template"]["spec"]["containers"]
    assert amount(container["resources"]["requests"]["cpu"]) >= recipe.train.workers, "a CPU beside each GPU"


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_jobs_run_the_stages(overlay):
    for name, job in of_kind(rendered(overlay), "RayJob").items():
        module = re.fullmatch(
            r"python -m jobs\.(\w+) --recipe \$RECIPE --workspace \$WORKSPACE \$FLAGS", job["spec"]["entrypoint"]
        )
        assert module, job["spec"]["entrypoint"]
        assert module[1] == name.replace("-", "_")
        assert (REPOSITORY / "jobs" / f"{module[1]}.py").is_file()
        assert job["spec"]["submissionMode"] == "HTTPMode", "the variables are the head's"
        assert {"configMapRef": {"name": "run"}} in pod_templates(job)[0]["containers"][0]["envFrom"]
        # An attempt makes a new cluster, so the job must own its cluster.
        assert job["spec"]["backoffLimit"] > 0
        assert "clusterSelector" not in job["spec"]
    assert (REPOSITORY / run_of(overlay)["RECIPE"]).is_file()


# --- the service


def constant(file: Path, name: str) -> Any:
    """A module's constant, read without importing the module."""
    (value,) = (
        node.value
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.Assign) and [getattr(target, "id", None) for target in node.targets] == [name]
    )
    return ast.literal_eval(value)


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_service_is_what_serve_accepts(overlay):
    from ray.serve.schema import ServeDeploySchema

    service = of_kind(rendered(overlay), "RayService")["edit"]
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == "serve.app:build"
    run = run_of(overlay)
    keys = "/etc/ip2p/keys/keys.yaml"  # a mounted secret
    assert application.args == {"recipe": run["RECIPE"], "workspace": run["WORKSPACE"], "keys": keys}
    (deployment,) = application.deployments
    classes = {node.name for node in ast.parse((REPOSITORY / "serve/app.py").read_text()).body if hasattr(node, "name")}  # pyright: ignore
    assert {deployment.name, "build"} <= classes
    asked = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["deployments"][0]
    most = asked.get("autoscaling_config", {}).get("max_replicas", 1) * asked["ray_actor_options"].get("num_gpus", 0)
    assert sum(map(gpus, pools(service).values())) >= most


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_upgrade_lets_edits_end(overlay):
    longest = constant(REPOSITORY / "serve" / "app.py", "LONGEST_EDIT")
    service = of_kind(rendered(overlay), "RayService")["edit"]
    assert service["spec"]["upgradeStrategy"] == {"type": "NewCluster"}
    assert service["spec"]["rayClusterDeletionDelaySeconds"] > longest
    for name, pool in pools(service).items():
        if name == "diffusion" or overlay == "miniature":
            assert pool["template"]["spec"]["terminationGracePeriodSeconds"] > longest


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_keys_of_the_endpoint_are_files_where_it_runs_alone(overlay):
    """An environment variable would be read only once, and every pod would have it."""
    (cluster,) = yaml.safe_load_all((KUBERAY / "overlays" / overlay / "ray-cluster.yaml").read_text())
    pods = {"head": cluster["spec"]["headGroupSpec"]}
    pods |= {group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]}
    serving = {"head", "diffusion" if "diffusion" in pods else "cpu"}
    for name, group in pods.items():
        (container,) = group["template"]["spec"]["containers"]
        assert all("serve-keys" not in str(source) for source in container.get("envFrom", []))
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert ("serve-keys" in mounts) == (name in serving), name
    service = yaml.safe_load((KUBERAY / "overlays" / overlay / "serve.yaml").read_text())
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert application["args"]["keys"] == "/etc/ip2p/keys/keys.yaml"
