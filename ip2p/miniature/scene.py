"""The miniature world: one to three coloured shapes on a 2x2 grid, a background, and a global look.

A scene is exactly what a whole caption says: there is no hidden geometry. That makes text and pixels equivalent, so a
small model can learn the world in minutes and the oracle can check every image against the truth.
"""

import hashlib
import random
from dataclasses import asdict, dataclass
from typing import Any

RGB = tuple[float, float, float]

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS: dict[str, RGB] = {
    "red": (0.88, 0.07, 0.10),
    "green": (0.05, 0.58, 0.10),
    "blue": (0.08, 0.22, 0.95),
    "yellow": (1.00, 0.92, 0.05),
    "purple": (0.55, 0.08, 0.70),
    "orange": (1.00, 0.50, 0.00),
}
SIZES = ("small", "large")
PLACES = ("top left", "top right", "bottom left", "bottom right")
BACKGROUNDS: dict[str, RGB] = {
    "white": (1.00, 1.00, 1.00),
    "gray": (0.50, 0.50, 0.50),
    "pink": (1.00, 0.56, 0.73),
    "brown": (0.38, 0.18, 0.04),
    "teal": (0.15, 0.72, 0.72),
}
LOOKS = ("plain", "night", "fog")
MAX_THINGS = 3


def _check(name: str, value: str, allowed: tuple[str, ...] | dict[str, RGB]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


@dataclass(frozen=True)
class Thing:
    """One object, centred in the grid cell `place`. Raises ValueError on a word that the world does not have."""

    shape: str
    colour: str
    size: str
    place: str

    def __post_init__(self) -> None:
        _check("shape", self.shape, SHAPES)
        _check("colour", self.colour, COLOURS)
        _check("size", self.size, SIZES)
        _check("place", self.place, PLACES)


@dataclass(frozen=True)
class Scene:
    """One to three things at distinct places (kept in the order of PLACES), a background and a look.

    Raises ValueError on an unknown background or look, on 0 or more than 3 things, and on two things at one place.
    """

    things: tuple[Thing, ...]
    background: str
    look: str

    def __post_init__(self) -> None:
        _check("background", self.background, BACKGROUNDS)
        _check("look", self.look, LOOKS)
        places = [thing.place for thing in self.things]
        if not 1 <= len(places) <= MAX_THINGS:
            raise ValueError(f"a scene has 1 to {MAX_THINGS} things, got {len(places)}")
        if len(set(places)) < len(places):
            raise ValueError(f"two things share a place: {', '.join(places)}")
        object.__setattr__(self, "things", tuple(sorted(self.things, key=lambda thing: PLACES.index(thing.place))))

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and strings, ready for JSON."""
        return {"things": [asdict(thing) for thing in self.things], "background": self.background, "look": self.look}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Scene":
        """Invert `to_dict`; raises ValueError as the constructors do."""
        return cls(tuple(Thing(**thing) for thing in values["things"]), values["background"], values["look"])


def thing_at(scene: Scene, place: str) -> Thing | None:
    """Return the thing at `place`, or None when that cell is empty."""
    return next((thing for thing in scene.things if thing.place == place), None)


def free_places(scene: Scene) -> list[str]:
    """Return the empty places in the order of PLACES."""
    return [place for place in PLACES if thing_at(scene, place) is None]


def alike(scene: Scene) -> bool:
    """Whether all things have the same shape, colour and size, so that they can be counted."""
    return len({(thing.shape, thing.colour, thing.size) for thing in scene.things}) == 1


def attributes(scene: Scene) -> dict[str, str | bool]:
    """Return the scene as flat attributes, the unit in which accuracy and preservation are counted.

    Keys are "background", "look", "<place>.occupied" for all four places and "<place>.shape", ".colour" and ".size" for
    the occupied ones, so an empty cell counts once and not four times.
    """
    flat: dict[str, str | bool] = {"background": scene.background, "look": scene.look}
    for place in PLACES:
        thing = thing_at(scene, place)
        flat[f"{place}.occupied"] = thing is not None
        if thing:
            flat |= {f"{place}.shape": thing.shape, f"{place}.colour": thing.colour, f"{place}.size": thing.size}
    return flat


def held_out(scene: Scene) -> bool:
    """Whether the scene is kept out of training: about one in ten, by a hash of its content alone."""
    return hashlib.blake2b(repr(scene).encode(), digest_size=8).digest()[0] % 10 == 0


def draw_scene(rng: random.Random) -> Scene:
    """Draw a scene of 1, 2 or 3 things with probabilities .35, .45 and .2.

    One in ten has things all alike: by chance alone there would be too few to learn counting from.
    """
    (count,) = rng.choices((1, 2, 3), (0.35, 0.45, 0.2))
    return draw_scene_of(rng, count, all_alike=rng.random() < 0.1)


def draw_scene_of(rng: random.Random, count: int, all_alike: bool = False) -> Scene:
    """Draw a scene of `count` things (1 to 3), either drawn one by one or all alike."""

    def draw_kind() -> tuple[str, str, str]:
        return rng.choice(SHAPES), rng.choice(tuple(COLOURS)), rng.choice(SIZES)

    shared = draw_kind()
    things = tuple(Thing(*(shared if all_alike else draw_kind()), place) for place in rng.sample(PLACES, count))
    return Scene(things, rng.choice(tuple(BACKGROUNDS)), rng.choice(LOOKS))
