"""Captions, instruction and edited caption together: drawn, and checked against one another."""

import random
from typing import NamedTuple

from ip2p.miniature.edits import EDIT_KINDS, PLACED_KINDS, Edit, apply_edit, draw_edit, draw_scene_for, outcome
from ip2p.miniature.instructions import parse_instruction, phrase
from ip2p.miniature.language import Description, describe, draw_unsaid, read_caption
from ip2p.miniature.scene import Scene, alike, attributes
from ip2p.miniature.scene import held_out as is_held_out


def _said(description: Description) -> dict[str, str | bool | int]:
    """What a description says, flat; things without places are counted by what they look like."""
    scene, unsaid = description.scene, description.unsaid
    flat: dict[str, str | bool | int] = {**attributes(scene)}
    if "background" in unsaid:
        del flat["background"]
    if "places" in unsaid:
        flat = {name: value for name, value in flat.items() if "." not in name}
        for thing in scene.things:
            name = f"number of {thing.size} {thing.colour} {thing.shape}"
            flat[name] = int(flat.get(name, 0)) + 1
    return flat


def consistent(caption: str, instruction: str, edited_caption: str) -> str | None:
    """Return None when the instruction turns what the caption says into exactly what the edited one says, or why not.

    What the caption leaves unsaid the edited one leaves unsaid too, unless it is what the edit sets.
    """
    try:
        before = read_caption(caption)
    except ValueError as error:
        return f"caption: {error}"
    try:
        edit = parse_instruction(instruction, before.scene, before.unsaid)
    except ValueError as error:
        return f"instruction: {error}"
    try:
        after = read_caption(edited_caption)
    except ValueError as error:
        return f"edited caption: {error}"
    unsaid = before.unsaid - {edit.kind}
    for what in sorted(unsaid ^ after.unsaid):
        return f"edited caption: {what} should be {'un' if what in unsaid else ''}said"
    expected, got = _said(Description(outcome(edit, before.scene), unsaid)), _said(after)
    differing = [name for name in sorted(expected | got) if expected.get(name) != got.get(name)]
    if differing:
        name = differing[0]
        return f"edited caption: {name} should be {expected.get(name)}, is {got.get(name)}"
    return None


def edit_kind(caption: str, instruction: str) -> str | None:
    """The kind of edit that an instruction about a captioned scene asks for; None when it makes no sense there."""
    try:
        described = read_caption(caption)
        return parse_instruction(instruction, described.scene, described.unsaid).kind
    except ValueError:
        return None


class Triplet(NamedTuple):
    """What a language model sees of an edit, and the truth behind it."""

    caption: str
    instruction: str
    edited_caption: str
    edit: Edit
    scene: Scene
    edited_scene: Scene
    unsaid: frozenset[str]  # by the caption


def draw_triplet(
    rng: random.Random, kind: str | None = None, unseen: bool = False, held_out: bool | None = None
) -> Triplet:
    """Draw an edit with both captions, kinds balanced unless one is given.

    `held_out`: None draws from all scenes; False only pairs with neither scene held out (training); True only pairs
    whose first scene is held out (testing). `unseen` takes the wordings that training never uses.
    """
    kind = kind or rng.choice(EDIT_KINDS)
    while True:
        scene = draw_scene_for(kind, rng)
        edit = draw_edit(scene, rng, kind)
        edited = apply_edit(edit, scene)
        if held_out is None or (is_held_out(scene) if held_out else not (is_held_out(scene) or is_held_out(edited))):
            break
    # People seldom say where things are; but three things with free places are more than the miniature can draw well.
    unsaid = draw_unsaid(rng, places=0.8, background=0.2)
    if kind in PLACED_KINDS or len(scene.things) > 2 or (alike(scene) and len(scene.things) > 1):
        unsaid -= {"places"}
    style = rng.getrandbits(32)
    return Triplet(
        describe(scene, style, unseen, unsaid),
        phrase(edit, scene, rng, unseen, unsaid),
        describe(edited, style, unseen, unsaid - {kind}),
        edit,
        scene,
        edited,
        unsaid,
    )
