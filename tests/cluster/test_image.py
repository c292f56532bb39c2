"""cluster/Dockerfile and requirements/ by what can be read of them; building needs Docker."""

import importlib
import importlib.util
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from ip2p.recipe import REPOSITORY
from serve import proxy

DOCKERFILE = REPOSITORY / "cluster" / "Dockerfile"
REQUIREMENTS = REPOSITORY / "requirements"
# vLLM and Ray depend on these; what the tests use of them comes with the runtime.
ALSO_RUNTIME = {"openai", "jsonschema"}


@dataclass
class Stage:
    name: str
    base: str
    body: list[tuple[str, str]] = field(default_factory=list)  # (instruction, arguments)


def stages() -> dict[str, Stage]:
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.M)
    found: dict[str, Stage] = {}
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if not line.strip():
            continue
        name, arguments = line.split(maxsplit=1)
        assert name.isupper(), line
        if name == "FROM":
            base, as_, stage = arguments.split()
            assert as_ == "AS"
            found[stage] = Stage(stage, base)
        else:
            list(found.values())[-1].body.append((name, arguments))
    return found


def final_stages() -> list[Stage]:
    """Those that are no other's base and that nothing is copied from: what can be built to be run."""
    used = {stage.base for stage in stages().values()}
    used |= {
        name for stage in stages().values() for _, text in stage.body for name in re.findall(r"--from=(\S+)", text)
    }
    return [stage for stage in stages().values() if stage.name not in used]


def instructions(stage: Stage) -> list[tuple[str, str]]:
    """Of a stage and all that it is built on, in order."""
    base = stages().get(stage.base)
    return [*(instructions(base) if base else []), *stage.body]


def pins(name: str) -> dict[str, str]:
    """The exact version of each package that requirements/<name>.txt installs."""
    return dict(re.findall(r"^([a-z0-9.-]+)==([^\s;]+)", (REQUIREMENTS / f"{name}.txt").read_text(), re.M))


def named_in(name: str) -> set[str]:
    """The packages that requirements/<name>.in and the files that it includes name."""
    text = (REQUIREMENTS / f"{name}.in").read_text()
    included = (named_in(other) for other in re.findall(r"^-r (\w+)\.in$", text, re.M))
    names = re.findall(r"^\w[\w-]*", text, re.M)
    return {name.lower().replace("_", "-") for name in names}.union(*included)


@pytest.mark.parametrize("name", ["cpu", "gpu", "test", "uv"])
def test_every_package_is_pinned_with_hashes_and_without_an_index(name):
    text = (REQUIREMENTS / f"{name}.txt").read_text()
    packages = re.sub(r"^ *#.*\n", "", text, flags=re.M).replace("\\\n", "").splitlines()
    assert len(packages) == len(pins(name)) > 0
    for package in packages:
        assert re.fullmatch(r"[^=\s]+==[^;]+(; [^-]+)?( +--hash=sha256:[0-9a-f]{64})+", package), package
    assert named_in(name) <= set(pins(name))


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_the_image_has_no_test_packages(kind):
    tools = {"pytest", "playwright", "moto", "hypothesis", "ruff", "pyright", "uv"}
    assert tools | ALSO_RUNTIME <= named_in("test")
    assert named_in("test") & set(pins(kind)) == ALSO_RUNTIME
    assert named_in("test").isdisjoint(named_in(kind))


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_developers_have_the_versions_of_the_image(kind):
    image, tests = pins(kind), pins("test")
    shared = set(image) & set(tests)
    assert {"boto3", "openai"} <= shared
    assert {name: image[name] for name in shared} == {name: tests[name] for name in shared}


def test_there_is_an_image_for_cpus_and_one_for_gpus():
    assert [stage.name for stage in final_stages()] == ["cpu", "gpu"]


@pytest.mark.parametrize("stage", final_stages(), ids=lambda stage: stage.name)
def test_no_final_image_runs_as_root(stage):
    (user,) = (argument for name, argument in stage.body if name == "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "a number: Kubernetes can't tell whether a name is root"
    assert stage.body[-1][0] == "USER"
    pod = (REPOSITORY / "cluster/kuberay/overlays/gpu/ray-cluster.yaml").read_text()
    assert f"runAsUser: {user.split(':')[0]}" in pod


def test_bases_are_pinned():
    names = set(stages())
    outside = {stage.base for stage in stages().values()} - names
    assert outside
    for base in outside:
        assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*", base), f"{base}: name a version, to the patch"
    assert "latest" not in DOCKERFILE.read_text()
    minor = re.search(r'requires-python = ">=(\d+\.\d+)"', (REPOSITORY / "pyproject.toml").read_text())
    assert minor and f"python:{minor[1]}." in DOCKERFILE.read_text()


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_packages_are_the_pinned_ones(kind):
    commands = [text for name, text in stages()[f"build-{kind}"].body if name == "RUN"]
    assert len(commands) == 1
    assert re.search(rf"uv pip sync --require-hashes --python \S+ /requirements/{kind}\.txt$", commands[0])
    assert ("COPY", f"--from=build-{kind} /opt/venv /opt/venv") in stages()[kind].body
    # Nothing else installs packages but uv itself, by its pin.
    installs = [
        text for stage in stages().values() for name, text in stage.body if name == "RUN" and "pip install" in text
    ]
    assert len(installs) == 1
    assert "--require-hashes --requirement /requirements/uv.txt" in installs[0]
    assert pins("uv")["uv"] == pins("test")["uv"]


def test_vllm_starts_on_gpus_without_a_cuda_compiler():
    """FlashInfer's sampler is compiled by nvcc on first use, which vLLM's warm-up is."""
    (gpu,) = (stage for stage in final_stages() if stage.name == "gpu")
    environment = [argument for name, argument in instructions(gpu) if name == "ENV"]
    assert "VLLM_USE_FLASHINFER_SAMPLER=0" in " ".join(environment).split()
    # vLLM has many such variables. This one decides, by its name in the version that is pinned.
    vllm = importlib.util.find_spec("vllm")
    assert vllm and vllm.origin
    sampler = Path(vllm.origin).parent / "v1/sample/ops/topk_topp_sampler.py"
    assert "if not envs.VLLM_USE_FLASHINFER_SAMPLER:" in sampler.read_text()


def test_rays_proxies_have_our_middleware():
    found = re.search(rf"{proxy.VARIABLE}=(\S+)", DOCKERFILE.read_text())
    assert found and found[1] == proxy.IMPORT_PATH
    module, _, name = found[1].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("stage", final_stages(), ids=lambda stage: stage.name)
def test_kernels_can_be_compiled_at_run_time(stage):
    packages = " ".join(text for name, text in instructions(stage) if name == "RUN" and "apt-get install" in text)
    assert "g++" in packages.split()


def test_weights_and_secrets_are_not_baked_in():
    text = DOCKERFILE.read_text()
    assert not re.search(r"huggingface-cli|hf download|snapshot_download|from_pretrained|^ADD ", text, re.M)
    assert not re.search(r"^(ARG|ENV).*(TOKEN|PASSWORD|SECRET)", text, re.M)


def test_only_what_is_named_gets_into_the_image():
    lines = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    named = {line.removeprefix("!").rstrip("/") for line in lines if line.startswith("!")}
    assert {"ip2p", "jobs", "serve", "cluster", "recipes", "requirements"} <= named
    assert all((REPOSITORY / name).exists() for name in named)
    assert named.isdisjoint({".git", ".venv", "workspace", "runs"})


def test_manifests_name_these_images():
    tags = set()
    for kind, overlay in (("gpu", "gpu"), ("cpu", "miniature")):
        content = (REPOSITORY / "cluster/kuberay/overlays" / overlay / "kustomization.yaml").read_text()
        (image,) = yaml.safe_load(content)["images"]
        assert image["newTag"].endswith(f"-{kind}")
        tags.add(image["newTag"].removesuffix(f"-{kind}"))
        assert f"--target {kind} --tag ip2p:{image['newTag']}" in DOCKERFILE.read_text()
    version = re.search(r'^version = "(.+)"', (REPOSITORY / "pyproject.toml").read_text(), re.M)
    assert version and tags == {version[1]}
