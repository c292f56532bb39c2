"""cluster/Dockerfile by what can be read of it; building it needs Docker."""

import re
from dataclasses import dataclass, field

import pytest
import yaml

from ip2p.recipe import REPOSITORY

DOCKERFILE = REPOSITORY / "cluster" / "Dockerfile"


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
    assert re.search(rf"uv pip sync --python \S+ /requirements/{kind}\.txt$", commands[0])
    assert ("COPY", f"--from=build-{kind} /opt/venv /opt/venv") in stages()[kind].body
    # Nothing else installs packages but uv itself, by its pin.
    installs = [
        text for stage in stages().values() for name, text in stage.body if name == "RUN" and "pip install" in text
    ]
    assert len(installs) == 1
    assert "grep '^uv==' /requirements/cpu.txt" in installs[0]
    uv = [re.search("^uv==.*$", (REPOSITORY / f"requirements/{k}.txt").read_text(), re.M)[0] for k in ("cpu", "gpu")]  # pyright: ignore
    assert uv[0] == uv[1]


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
