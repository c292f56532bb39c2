"""The part of a recipe that is published on dataset and model cards.

It names no machine, bucket or account.
"""

import re
from typing import Any

import yaml
from pydantic import BaseModel

from ip2p.recipe import LOCAL_CLIP, Recipe

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
PLACES = {"path", "name", "dataset", "image", "triplets", "workspace"}  # keys that may hold a place


def published_recipe(recipe: Recipe, *sections: str) -> str:
    """Return the keys of some sections as YAML: those that decide what is made, with the names of places alone."""
    keys = {"name": recipe.name} | _published(recipe)
    return yaml.safe_dump({key: keys[key] for key in ("name", "seed", *sections) if key in keys}, sort_keys=False)


def public_name(place: str) -> str:
    """Return a hub id as it is, and of a path or an address the last part."""
    if HUB_ID.fullmatch(place):
        return place
    return re.split(r"[/\\]", place.removeprefix(LOCAL_CLIP).split("?")[0].rstrip("/\\"))[-1]


def _published(section: BaseModel) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value, extra = getattr(section, name), field.json_schema_extra
        if value is None or (isinstance(extra, dict) and extra["decides"] == "how"):
            continue
        if isinstance(value, BaseModel):
            found[name] = _published(value)
        else:
            dumped = section.model_dump(mode="json", include={name})[name]
            found[name] = public_name(dumped) if name in PLACES and isinstance(dumped, str) else dumped
    return found
