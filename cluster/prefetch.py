"""Put the recipe's weights on every node: hub ids at their pinned revisions into the cache (HF_HOME), before jobs ask.

    python -m cluster.prefetch --recipe recipes/sd15.yaml

One node first, then all others at once: those that share its cache find all there. Directories are checked only.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import ray
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ip2p.cli import load_settings
from ip2p.errors import UserError
from ip2p.recipe import LOCAL_CLIP, Recipe, locate
from runtime.connect import connect
from runtime.exit import exit_statuses

SMALL = ("*.json", "*.txt", "*.model", "*.jinja")
# In the order of preference, of a folder only those of the first kind that it has.
WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
# Other precisions, weights without their average, and formats that nothing here loads.
OTHERS = ("*.fp16.*", "*non_ema*", "*.ckpt", "*.msgpack", "*.h5", "*.onnx*", "*openvino*", "*flax*", "*consolidated*")


@dataclass(frozen=True)
class Model:
    """Where a recipe's model comes from: a directory, or a hub id at a revision."""

    key: str
    path: str
    revision: str | None

    @property
    def is_local(self) -> bool:
        return Path(self.path).is_absolute()


def models(recipe: Recipe) -> list[Model]:
    """All models that a recipe names. Raises `UserError` for one that is neither a directory nor a hub id."""
    refs = {"models.text_to_image": recipe.models.text_to_image, "models.llm": recipe.models.llm}
    refs |= {"models.vae": recipe.models.vae, "models.dino": recipe.models.dino, "train.base": recipe.train.base}
    refs["models.editor"] = recipe.models.editor
    found = [
        Model(key, locate(ref.path, f"{key}.path"), None if Path(ref.path).is_absolute() else ref.revision)
        for key, ref in refs.items()
        if ref is not None
    ]
    clip = recipe.models.clip
    if clip.name.startswith(LOCAL_CLIP):
        return [*found, Model("models.clip", locate(clip.name.removeprefix(LOCAL_CLIP), "models.clip.name"), None)]
    import open_clip  # slow, and not needed for a directory

    # open_clip names hub ids of its own, without revisions.
    repository = str(open_clip.get_pretrained_cfg(clip.name, clip.pretrained or "").get("hf_hub", "")).rstrip("/")
    return [*found, Model("models.clip", repository, None)] if repository else found


def missing(model: Model) -> str:
    """What this machine lacks of a model; "" when it is there."""
    if model.is_local:
        folder = Path(model.path)
    else:
        try:
            # Only small files: a repository has more than is fetched of it, and the hub's client misses the rest.
            here = {"revision": model.revision, "local_files_only": True, "allow_patterns": SMALL}
            folder = Path(snapshot_download(model.path, **here))
        except LocalEntryNotFoundError:
            return f"{model.path} is not in the cache"
    if not folder.is_dir():
        return f"{folder} is not there"
    files = [file for file in folder.rglob("*") if file.is_file()]  # a download that broke off leaves broken links
    if not any(fnmatch(file.name, pattern) for file in files for pattern in WEIGHTS):
        return f"{folder} has no weights"
    return ""


def chosen(files: Sequence[str]) -> list[str]:
    """Of a repository's files those that are loaded: of a pipeline its parts, of several formats the first."""
    kept = [name for name in files if not any(fnmatch(name, pattern) for pattern in OTHERS)]
    if "model_index.json" in files:  # beside its parts often lies all in one file
        kept = [name for name in kept if "/" in name or name == "model_index.json"]
    result = [name for name in kept if any(fnmatch(name, pattern) for pattern in SMALL)]
    for folder in {name.rpartition("/")[0] for name in kept}:
        inside = [name for name in kept if name.rpartition("/")[0] == folder]
        kinds = ([name for name in inside if fnmatch(name, pattern)] for pattern in WEIGHTS)
        result += next((of_kind for of_kind in kinds if of_kind), [])
    return sorted(result)


def fetch(model: Model) -> str:
    """Download to this machine's cache what is not there; returns where it lies. Raises `UserError`."""
    if model.is_local:
        if problem := missing(model):
            raise UserError(f"{model.key}: {problem}: put it on storage that all machines mount")
        return model.path
    try:
        files = HfApi().list_repo_files(model.path, revision=model.revision)
        return snapshot_download(model.path, revision=model.revision, allow_patterns=chosen(files))
    except (HTTPError, OSError) as error:
        raise UserError(
            f"{model.key}: {model.path} ({model.revision or 'newest'}): {error}; accept its licence on the hub, set "
            "HF_TOKEN, or give a directory as path"
        ) from error


def fetch_all(wanted: Sequence[Model]) -> list[str]:
    """A line for each model: where it lies now, or `error: ...`."""
    lines = []
    for model in wanted:
        try:
            lines.append(f"{model.key}: {fetch(model)}")
        except UserError as error:
            lines.append(f"error: {error}")
    return lines


def nodes() -> dict[str, dict[str, Any]]:
    """The cluster's machines by id, as Ray describes them; the head first."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    alive.sort(key=lambda node: "node:__internal_head__" not in node["Resources"])
    return {node["NodeID"]: node for node in alive}


def on_node(node_id: str, function: Callable[..., Any], *arguments: Any) -> ray.ObjectRef:
    """Run a function there; it asks for nothing, so that a busy node and a head without CPUs run it, too."""
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": there}
    return ray.remote(**options)(function).remote(*arguments)


def run(wanted: Sequence[Model]) -> bool:
    """Fetch on all nodes, and say what lies where; returns whether all is there."""
    first, *others = nodes()
    well = True
    for group in ([first], others):
        lines = {node: on_node(node, fetch_all, wanted) for node in group}
        for node, found in zip(lines, ray.get(list(lines.values()))):
            for line in found:
                print(f"{node[:8]} {line}")
                well = well and not line.startswith("error: ")
        if not well:
            break
    return well


def main(argv: list[str] | None = None) -> None:
    recipe, _, _ = load_settings(__doc__ or "", argv=argv, needs=())
    with exit_statuses():
        wanted = models(recipe)
        # open_clip's own can not be pinned.
        for model in wanted:
            if not model.is_local and model.revision is None and model.key != "models.clip":
                raise UserError(f"{model.key}: {model.path!r} has no revision: pin it, so that all nodes get the same")
        connect()
        sys.exit(0 if run(wanted) else 1)


if __name__ == "__main__":
    main()
