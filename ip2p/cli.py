"""The command line of every job: a recipe file, a workspace, and any key of the recipe as a dotted flag.

Flags win over the recipe file, and the file over the defaults; the environment sets nothing. What is wrong is told one
line per problem, naming key, value and what is allowed, and the process ends with status 2 before anything starts.
"""

import argparse
import difflib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, create_model
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliImplicitFlag,
    CliSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from ip2p.errors import UserError
from ip2p.recipe import LOCAL_CLIP, REPOSITORY, ClipRef, FileCaptions, HubCaptions, ModelRef, Recipe, locate
from ip2p.workspace import Workspace

OURS = {"recipe", "workspace"}
S = TypeVar("S", bound=BaseSettings)


class StageFlags(BaseModel):
    """The flags of a job that runs a stage."""

    overwrite: CliImplicitFlag[bool] = Field(
        False, description="start over: remove what the stage wrote, with all that was made from it"
    )


class RowStageFlags(StageFlags):
    """The flags of a job whose stage writes a row for every row."""

    retry_failed: CliImplicitFlag[bool] = Field(False, description="do the rows again whose status is failed")


class _Settings(Recipe, BaseSettings):
    model_config = SettingsConfigDict(
        extra="forbid",
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_parse_none_str="null",
        cli_use_class_docs_for_groups=True,
    )
    recipe: Path = Field(description="recipe file: YAML with the keys below")
    workspace: str | None = Field(None, description="folder of the run: a local path, s3://... or gs://...")

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], *_args: Any, **_kwargs: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (_RecipeFile(settings_cls),)


class _RecipeFile(InitSettingsSource):
    """The keys of the file that `--recipe` names, without what the flags replace as a whole."""

    def __init__(self, settings_cls: type[BaseSettings]):
        super().__init__(settings_cls, {})

    def __call__(self) -> dict[str, Any]:
        flags = self.current_state
        if "recipe" not in flags:
            raise UserError("--recipe: missing; name a recipe file, e.g. --recipe recipes/miniature.yaml")
        keys = read_yaml(flags["recipe"])
        captions, kind = keys.get("captions"), flags.get("captions", {}).get("kind")
        if isinstance(captions, dict) and kind and kind != captions.get("kind"):
            del keys["captions"]  # the keys of one kind of captions mean nothing to another
        return keys


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)


def load_settings(
    job_doc: str,
    extra: type[BaseModel] | None = None,
    argv: list[str] | None = None,
    needs: tuple[str, ...] = ("workspace",),
) -> tuple[Recipe, Workspace | None, Any]:
    """What a job was asked to do: the recipe, the workspace (None if none was given), and the job's own flags.

    `job_doc` is the job's docstring, shown by `--help`. `extra` is a model of the job's own flags (fields that are no
    keys of a recipe); an instance of it comes back, None without. `needs` are what the job can't do without and is
    checked before anything starts: "workspace", "captions", or models ("models.clip").

    Ends the process with status 2 and one line per problem on standard error when something is wrong.
    """
    own = set(extra.model_fields) if extra else set()
    assert not own & (set(Recipe.model_fields) | OURS), f"{extra} hides keys of the recipe"
    bases = (extra, _Settings) if extra else _Settings
    settings_class: type[BaseSettings] = create_model("Settings", __base__=bases)  # pyright: ignore
    try:
        flags = CliSettingsSource(settings_class, root_parser=_parser(job_doc))
        settings: Any = settings_class(  # pyright: ignore
            _cli_settings_source=flags(args=sys.argv[1:] if argv is None else argv)
        )
        values = {name: getattr(settings, name) for name in type(settings).model_fields}
        recipe = Recipe.model_construct(**{name: values[name] for name in Recipe.model_fields})
        problems = list(_missing(recipe, values["workspace"], needs))
        workspace = None if values["workspace"] is None else Workspace(values["workspace"])
    except ValidationError as error:
        problems = [_explain(settings_class, problem) for problem in error.errors(include_url=False)]
    except SettingsError as error:
        problems = [_explain_flags(settings_class, str(error))]
    except (UserError, OSError) as error:
        problems = [str(error)]
    if problems:
        sys.exit(_fail(problems))
    return recipe, workspace, extra.model_construct(**{name: values[name] for name in own}) if extra else None


def parse_flags(settings: type[S], argv: list[str] | None = None) -> S:
    """Return the flags of a command that takes no recipe. Raises `UserError`, one line for each wrong flag."""
    try:
        return CliApp.run(settings, cli_args=argv)
    except ValidationError as error:
        problems = [
            f"--{'.'.join(map(str, problem['loc']))}: {problem['msg']}, not {json.dumps(problem['input'], default=str)}"
            for problem in error.errors()
        ]
        raise UserError("\nerror: ".join(problems)) from error


def read_recipe(path: str | Path) -> Recipe:
    """Load a recipe file. Raises `UserError` with one line for each problem."""
    try:
        return Recipe.model_validate(read_yaml(path))
    except ValidationError as error:
        problems = [_explain(Recipe, problem) for problem in error.errors(include_url=False)]
        raise UserError(f"--recipe {path}: {'; '.join(problems)}") from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, looked up in the current directory and then in the repository.

    Raises `UserError` when there is no such file, or it holds something else, or a key twice.
    """
    found = [folder / path for folder in (Path.cwd(), REPOSITORY) if (folder / path).is_file()]
    if not found:
        ours = ", ".join(f"recipes/{file.name}" for file in sorted((REPOSITORY / "recipes").glob("*.yaml")))
        raise UserError(f"--recipe {path}: no such file; the repository has {ours}")
    try:
        with found[0].open(encoding="utf-8") as file:
            content = yaml.load(file, _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--recipe {path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"--recipe {path}: a recipe is a mapping of keys to values, not {type(content).__name__}")
    return content


class _UniqueKeys(yaml.SafeLoader):
    """A mapping may not hold a key twice. Its own keys win over those that `<<` merges into it."""

    MERGE = "tag:yaml.org,2002:merge"

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [
            "<<" if key.tag == self.MERGE else self.construct_object(key, deep=True)  # pyright: ignore
            for key, _ in node.value
        ]
        if duplicates := [str(key) for key in keys if keys.count(key) > 1]:
            raise yaml.MarkedYAMLError(problem=f"duplicate key {duplicates[0]!r}", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def _parser(job_doc: str) -> argparse.ArgumentParser:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    command = f"python -m {spec.name}" if spec else "python -m jobs.<job>"
    return _Parser(
        usage=f"{command} --recipe FILE --workspace FOLDER [--section.key VALUE ...]",
        description=f"{job_doc.strip()}\n\nFlags win over the recipe file, the file over the defaults. For example:\n\n"
        f"  {command} --recipe recipes/miniature.yaml --workspace workspace --seed 1 --pairs.guidance_scale 2,4",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _missing(recipe: Recipe, workspace: str | None, needs: tuple[str, ...]) -> Iterator[str]:
    """One line for each thing in `needs` that is not there. Hub ids are not looked up."""
    for need in needs:
        try:
            if need == "workspace":
                if not workspace:
                    yield "--workspace: missing; name the folder of the run: a local path, s3://... or gs://..."
            elif need == "captions":
                if isinstance(recipe.captions, FileCaptions) and not Workspace(recipe.captions.path).exists():
                    yield f"captions.path: there is nothing at {recipe.captions.path!r}"
                elif isinstance(recipe.captions, HubCaptions):
                    locate(recipe.captions.path, "captions.path")
            else:
                ref = getattr(recipe.models, need.removeprefix("models."))
                if isinstance(ref, ModelRef):
                    locate(ref.path, f"{need}.path")
                elif isinstance(ref, ClipRef) and ref.name.startswith(LOCAL_CLIP):
                    locate(ref.name.removeprefix(LOCAL_CLIP), f"{need}.name")
        except UserError as error:
            yield str(error)


def _fail(problems: list[str]) -> int:
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    print("--help shows every key with its default.", file=sys.stderr)
    return 2


def _explain(model: type[BaseModel], problem: Any) -> str:
    """One line for one of pydantic's errors."""
    key = ".".join(_path(model, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        if kinds := list(_kinds_with(model, problem["loc"])):
            section, _, _ = key.rpartition(".")
            return (
                f"{key}: {section}.kind {problem['loc'][-2]} has no such key; {section}.kind {' or '.join(kinds)} has"
            )
        return f"{key}: there is no such key{_nearest(model, key)}"
    if problem["type"] == "missing":
        return f"{key}: missing"
    if problem["type"] == "value_error":  # ours, and they tell the value
        return f"{key}: {problem['ctx']['error']}"
    return f"{key}: {problem['msg']}, not {json.dumps(problem['input'], default=str)}"


def _kinds_with(model: type[BaseModel], location: tuple[str | int, ...]) -> Iterator[str]:
    """The other kinds of the section of an unknown key that have it, where the section is a choice of kinds."""
    models = [model]
    for part in location[:-2]:
        fields = [m.model_fields[str(part)] for m in models if str(part) in m.model_fields]
        models = [section for field in fields for section in _models(field.annotation)]
    if len(models) > 1:
        yield from (str(m.model_fields["kind"].default) for m in models if str(location[-1]) in m.model_fields)


def _explain_flags(model: type[BaseModel], message: str) -> str:
    unknown = message.removeprefix("unrecognized arguments: ").split()
    if unknown == message.split() or not unknown[0].startswith("--"):
        return message
    flag = unknown[0].split("=")[0]
    return f"{flag}: there is no such flag{_nearest(model, flag.removeprefix('--'), '--')}"


def _nearest(model: type[BaseModel], key: str, prefix: str = "") -> str:
    """What was probably meant: a like name in that section, that name in another one; or what there is."""
    keys = {".".join(path): path[-1] for path in _keys(model)}
    section, _, name = key.rpartition(".")
    inside = {other: last for other, last in keys.items() if other.rpartition(".")[0] == section}
    for candidates, cutoff in ((inside, 0.6), (keys, 0.9)):
        if near := difflib.get_close_matches(name, candidates.values(), n=1, cutoff=cutoff):
            return f"; did you mean {prefix}{next(other for other, last in candidates.items() if last == near[0])}?"
    return f"; there are {', '.join(prefix + other for other in inside)}" if section and inside else ""


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models in an annotation: one for a section, several for a choice of kinds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _keys(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    """Paths of all keys and sections."""
    for name, field in model.model_fields.items():
        yield (name,)
        for section in _models(field.annotation):
            yield from ((name, *path) for path in _keys(section))


def _path(model: type[BaseModel], location: tuple[str | int, ...]) -> Iterator[str]:
    """pydantic's error location without the kind's name that it puts behind a choice of kinds."""
    models: list[type[BaseModel]] = [model]
    skip = False
    for part in location:
        if skip:
            skip = False
            continue
        yield str(part)
        fields = [m.model_fields[str(part)] for m in models if str(part) in m.model_fields]
        models = [section for field in fields for section in _models(field.annotation)]
        skip = any(field.discriminator for field in fields)
