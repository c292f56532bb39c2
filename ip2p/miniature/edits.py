"""Twelve kinds of edit: drawn, and applied to scenes."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ip2p.miniature.language import ALL_SAID
from ip2p.miniature.scene import (
    BACKGROUNDS,
    COLOURS,
    LOOKS,
    MAX_THINGS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    alike,
    draw_scene,
    draw_scene_of,
    free_places,
    thing_at,
)

T = TypeVar("T")

EDIT_KINDS = (
    "recolour",
    "reshape",
    "resize",
    "replace",
    "add",
    "remove",
    "background",
    "look",
    "move",
    "swap",
    "isolate",
    "count",
)


@dataclass(frozen=True)
class Edit:
    """One edit. `kind` says which of the other fields are set, see `FIELDS`.

    `place` is where the thing in question is (for add: will be), `to` where it moves or with whom it swaps, `count` how
    many things there are afterwards. Raises ValueError when the fields do not fit the kind.
    """

    kind: str
    place: str | None = None
    to: str | None = None
    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    background: str | None = None
    look: str | None = None
    count: int | None = None

    def __post_init__(self) -> None:
        check_kind(self.kind)
        given = {name for name, value in vars(self).items() if name != "kind" and value is not None}
        if given != set(FIELDS[self.kind]):
            raise ValueError(f"{self.kind} takes {', '.join(FIELDS[self.kind])}, got {', '.join(sorted(given))}")
        if self.to and self.to == self.place:
            raise ValueError(f"{self.kind} needs two different places, got {self.to!r} twice")


FIELDS: dict[str, tuple[str, ...]] = {
    "recolour": ("place", "colour"),
    "reshape": ("place", "shape"),
    "resize": ("place", "size"),
    "replace": ("place", "shape", "colour"),
    "add": ("place", "shape", "colour", "size"),
    "remove": ("place",),
    "background": ("background",),
    "look": ("look",),
    "move": ("place", "to"),
    "swap": ("place", "to"),
    "isolate": ("place",),
    "count": ("count",),
}


def apply_edit(edit: Edit, scene: Scene) -> Scene:
    """Return the edited scene; raises ValueError with the reason when the edit is impossible or changes nothing."""
    edited = outcome(edit, scene)
    if edited == scene:
        raise ValueError(f"{edit} changes nothing in {scene}")
    return edited


def outcome(edit: Edit, scene: Scene) -> Scene:
    """`apply_edit`, but an edit that changes nothing returns the scene; raises ValueError when it is impossible."""
    if edit.background or edit.look:
        return replace(scene, background=edit.background or scene.background, look=edit.look or scene.look)
    if edit.count is not None:
        return replace(scene, things=_recount(scene, edit.count))
    if edit.kind == "add":
        new = Thing(str(edit.shape), str(edit.colour), str(edit.size), str(edit.place))
        return replace(scene, things=(*scene.things, new))
    thing = the_thing_at(scene, edit.place)
    others = tuple(other for other in scene.things if other != thing)
    if edit.kind == "isolate":
        return replace(scene, things=(thing,))
    if edit.kind == "remove":
        return replace(scene, things=others)
    if edit.kind == "move":
        return replace(scene, things=(*others, replace(thing, place=edit.to)))
    if edit.kind == "swap":
        partner = the_thing_at(scene, edit.to)
        rest = tuple(other for other in others if other != partner)
        return replace(scene, things=(*rest, replace(thing, place=edit.to), replace(partner, place=edit.place)))
    changes = {name: getattr(edit, name) for name in ("shape", "colour", "size") if getattr(edit, name)}
    return replace(scene, things=(*others, replace(thing, **changes)))


def the_thing_at(scene: Scene, place: str | None) -> Thing:
    """The thing there; raises ValueError where there is none."""
    thing = thing_at(scene, place) if place else None
    if thing is None:
        raise ValueError(f"there is nothing at {place!r} in {scene}")
    return thing


def _recount(scene: Scene, count: int) -> tuple[Thing, ...]:
    """New things take the first free places; the last ones go."""
    if not alike(scene):
        raise ValueError(f"things that differ cannot be counted: {scene}")
    kept = scene.things[:count]
    new = [replace(scene.things[0], place=place) for place in free_places(scene)[: max(0, count - len(scene.things))]]
    return (*kept, *new)


# Kinds that make no sense to one who does not know where things are.
PLACED_KINDS = ("add", "move", "swap", "count")


def possible_kinds(scene: Scene, unsaid: frozenset[str] = ALL_SAID) -> list[str]:
    """Return the kinds of edit that can change this scene, in the order of EDIT_KINDS, where `unsaid` is not known."""
    several = len(scene.things) > 1
    differ = len({(thing.shape, thing.colour, thing.size) for thing in scene.things}) > 1
    impossible = {
        "add": len(scene.things) == MAX_THINGS,
        "remove": not several,
        "swap": not differ,
        "isolate": not several,
        "count": not alike(scene),
    }
    if "places" in unsaid:
        impossible |= dict.fromkeys(PLACED_KINDS, True)
    return [kind for kind in EDIT_KINDS if not impossible.get(kind)]


def draw_edit(scene: Scene, rng: random.Random, kind: str | None = None) -> Edit:
    """Draw an edit that changes the scene, of `kind` or of a kind drawn evenly from the possible ones.

    Raises ValueError when the kind is unknown or impossible in this scene.
    """
    kind = kind or rng.choice(possible_kinds(scene))
    check_kind(kind)
    if kind not in possible_kinds(scene):
        raise ValueError(f"{kind} is impossible in {scene}")

    def another(values: Iterable[T], current: object = None) -> T:
        return rng.choice([value for value in values if value != current])

    here, free = [thing.place for thing in scene.things], free_places(scene)
    place = rng.choice(free if kind == "add" else here)
    thing = thing_at(scene, place)
    draws: dict[str, Callable[[], Any]] = {
        "place": lambda: place,
        "to": lambda: another(free if kind == "move" else here, place),
        "shape": lambda: another(SHAPES, thing and thing.shape),
        "colour": lambda: another(COLOURS, thing and thing.colour),
        "size": lambda: another(SIZES, thing and thing.size),
        "background": lambda: another(BACKGROUNDS, scene.background),
        "look": lambda: another(LOOKS, scene.look),
        "count": lambda: another(range(1, MAX_THINGS + 1), len(scene.things)),
    }
    edit = Edit(kind, **{name: draws[name]() for name in FIELDS[kind]})
    # Only a swap of two things that are alike changes nothing: then draw again.
    return edit if outcome(edit, scene) != scene else draw_edit(scene, rng, kind)


def check_kind(kind: str) -> None:
    """Raise ValueError for an unknown kind."""
    if kind not in EDIT_KINDS:
        raise ValueError(f"kind must be one of {', '.join(EDIT_KINDS)}, got {kind!r}")


def draw_scene_for(kind: str, rng: random.Random) -> Scene:
    """Draw a scene in which an edit of `kind` is possible; raises ValueError for an unknown kind."""
    check_kind(kind)
    if kind == "count":
        return draw_scene_of(rng, rng.randint(1, MAX_THINGS), all_alike=True)
    while kind not in possible_kinds(scene := draw_scene(rng)):
        pass
    return scene
