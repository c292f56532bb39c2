"""The architecture, held: who imports whom, and the few doors to the outside."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ip2p.recipe import REPOSITORY

# A part may import parts of lower layers, and those of its own layer that `PEERS` names.
LAYERS = {
    "errors": 0,
    "recipe": 1,
    "records": 1,
    "images": 1,
    "workspace": 1,
    "files": 1,
    "card": 2,
    "models": 2,
    "stage": 2,
    "clip_similarity": 2,
    "diffusion": 2,
    "cli": 2,
    "edit": 3,
    "captions": 4,
    "pairs": 4,
    "train": 4,
    "miniature": 5,
    "evaluate": 6,
    "report": 7,
    "cost": 7,
}
PEERS = {("clip_similarity", "models"), ("diffusion", "models"), ("recipe", "records"), ("workspace", "records")}
# Only what evaluates and what draws miniature scenes knows the miniature world. The pipeline knows models and recipes.
STRANGERS_TO_THE_MINIATURE = {part for part, layer in LAYERS.items() if layer <= 4}

# What the packages beside the library may import of one another.
PACKAGES = {
    "ip2p": {"ip2p"},
    "runtime": {"ip2p", "runtime"},
    "cluster": {"ip2p", "runtime", "cluster"},
    "jobs": {"ip2p", "runtime", "jobs"},
    "serve": {"ip2p", "runtime", "serve"},
    "benchmarks": {"ip2p", "runtime", "jobs", "serve", "benchmarks"},
}
FILES = sorted(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py") if path.stat().st_size)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, wherever in it."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} line {node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(path: Path) -> str:
    """`ip2p/pairs/filter.py` -> `pairs`; `ip2p/images.py` -> `images`."""
    return path.relative_to(REPOSITORY / "ip2p").parts[0].removesuffix(".py")


def calls(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line, object, method) of every `object.method(...)`."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node.lineno, ast.unparse(node.func.value), node.func.attr


def files_of(package: str) -> list[Path]:
    return [path for path in FILES if path.is_relative_to(REPOSITORY / package)]


def test_there_is_something_to_hold():
    assert {part(path) for path in files_of("ip2p")} - {"__init__"} <= set(LAYERS), "give the new part a layer"
    assert len(FILES) > 10


@pytest.mark.parametrize("path", files_of("ip2p"), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_the_library_imports_one_way(path):
    me = part(path)
    for name in imports(path):
        top, _, rest = name.partition(".")
        assert top not in ("ray", "vllm"), f"the library imports {name}"
        other = rest.split(".")[0]
        if top != "ip2p" or other == me:
            continue
        assert other in LAYERS, f"import {name} from its module: packages re-export nothing"
        allowed = LAYERS[other] < LAYERS[me] or (me, other) in PEERS
        assert allowed, f"{me} (layer {LAYERS[me]}) must not import {other} (layer {LAYERS[other]})"
        assert other != "miniature" or me not in STRANGERS_TO_THE_MINIATURE, f"{me} knows the miniature world"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_packages_import_one_way(path):
    package = path.relative_to(REPOSITORY).parts[0]
    others = {name.split(".")[0] for name in imports(path)} & (set(PACKAGES) | {"tests"})
    assert others <= PACKAGES[package], f"{package} must not import {', '.join(others - PACKAGES[package])}"


def test_every_package_is_held():
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert {Path(name).parts[0] for name in listed.stdout.split()} <= {*PACKAGES, "tests"}


def test_no_two_modules_import_one_another():
    """No circle, of any length, among the modules of all packages."""
    names = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path for path in FILES}
    arrows = {name: {to for to in targets(path, names) if to != name} for name, path in names.items()}
    for _ in names:
        done = {name for name, others in arrows.items() if not others}
        arrows = {name: others - done for name, others in arrows.items() if name not in done}
    assert not arrows, f"modules that import one another: {sorted(arrows)}"


def targets(path: Path, names: dict[str, Path]) -> Iterator[str]:
    """The modules of `names` that a file imports when it is loaded."""
    for name in imports(path):
        yield from ({name, name.rpartition(".")[0]} & set(names))


def test_models_are_loaded_in_one_place():
    found = [
        f"{path.relative_to(REPOSITORY)}:{line} {thing}.{method}"
        for path in FILES
        if path.name != "models.py" and "miniature" not in str(path)  # whoever makes weights also has them half made
        if "benchmarks" not in path.parts  # the peers load their models themselves
        for line, thing, method in calls(path)
        if method in ("from_pretrained", "create_model", "create_model_from_pretrained", "create_model_and_transforms")
    ]
    assert found == []


def test_images_from_outside_are_decoded_in_one_place():
    found = [
        f"{path.relative_to(REPOSITORY)}:{line} {thing}.{method}"
        for path in FILES
        if path != REPOSITORY / "ip2p" / "images.py"
        for line, thing, method in calls(path)
        if (thing, method) in (("Image", "open"), ("PIL.Image", "open"), ("imageio", "imread"), ("cv2", "imdecode"))
    ]
    assert found == []


def test_packages_re_export_nothing():
    for path in FILES:
        if path.name == "__init__.py":
            assert all(isinstance(node, ast.Expr) for node in parse(path).body), f"{path} has more than a docstring"
