"""The architecture, held: who imports whom, and the few doors to the outside."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from ip2p.recipe import REPOSITORY

# A part may import those of lower layers, and of its own layer where `PEERS` says so.
LAYERS = {
    "recipe": 0,
    "records": 0,
    "images": 0,
    "workspace": 0,
    "models": 1,
    "clip_similarity": 1,
    "diffusion": 1,
    "cli": 1,
    "captions": 2,
    "pairs": 2,
    "train": 2,
    "edit": 2,
    "miniature": 3,
    "evaluate": 4,
    "plan": 5,
}
PEERS = {("clip_similarity", "models"), ("diffusion", "models"), ("recipe", "records"), ("workspace", "records")}
# The miniature world is known to those who judge by it and to the jobs: the pipeline knows models and recipes only.
STRANGERS_TO_THE_MINIATURE = {part for part, layer in LAYERS.items() if layer <= 2} - {"miniature"}
FILES = sorted(
    path
    for package in ("ip2p", "jobs", "serve")
    for path in (REPOSITORY / package).rglob("*.py")
    if path.stat().st_size
)


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
        assert top not in ("ray", "vllm", "jobs", "serve", "tests", "benchmarks"), f"the library imports {name}"
        other = rest.split(".")[0]
        if top != "ip2p" or other == me:
            continue
        assert other in LAYERS, f"import {name} from its module: packages re-export nothing"
        allowed = LAYERS[other] < LAYERS[me] or (me, other) in PEERS
        assert allowed, f"{me} (layer {LAYERS[me]}) must not import {other} (layer {LAYERS[other]})"
        assert other != "miniature" or me not in STRANGERS_TO_THE_MINIATURE, f"{me} knows the miniature world"


def test_jobs_and_service_are_not_libraries_of_each_other():
    assert not [(path, name) for path in files_of("jobs") for name in imports(path) if name.startswith("serve.")]
    assert not [(path, name) for path in files_of("serve") for name in imports(path) if name.startswith("jobs.")]


def test_models_are_loaded_in_one_place():
    found = [
        f"{path.relative_to(REPOSITORY)}:{line} {thing}.{method}"
        for path in FILES
        if path.name != "models.py" and "miniature" not in str(path)  # who makes weights has them half made, too
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
