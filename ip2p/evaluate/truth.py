"""What is edited in an evaluation, and what the oracle says of the results.

In the miniature world a test case is drawn with its answer: a held-out scene, an instruction in a wording that training
never saw, and the rendering of both scenes. Elsewhere it is a held-out pair of the workspace's own dataset.
"""

import random

import numpy as np
import pyarrow as pa

from ip2p import images
from ip2p.errors import UserError
from ip2p.evaluate.sweep import TEST
from ip2p.miniature.edits import EDIT_KINDS
from ip2p.miniature.oracle import Judgement, judge_images
from ip2p.miniature.render import render
from ip2p.miniature.triplets import draw_triplet
from ip2p.recipe import ChosenImage, Recipe
from ip2p.records import caption_id, digest
from ip2p.workspace import Workspace

# The kinds that even a young editor can do come first: the first test images are shown at all scales.
KINDS = sorted(EDIT_KINDS, key=lambda kind: kind not in ("background", "look", "recolour"))


def test_set(recipe: Recipe, workspace: Workspace) -> pa.Table:
    """The fixed test cases of a recipe, columns TEST: `evaluate.images` of them, or all that a small dataset has.

    Raises `UserError` when the workspace has no held-out pairs.
    """
    return rendered_cases(recipe) if recipe.truth == "oracle" else dataset_cases(recipe, workspace)


def rendered_cases(recipe: Recipe) -> pa.Table:
    """Held-out scenes with an edit of each kind in turn, in unseen wordings; the images are rendered.

    As in the pairs, captions may leave the background or the places unsaid. Raises `UserError` for an unknown kind.
    """
    kinds = recipe.evaluate.kinds or KINDS
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(f"evaluate.kinds: {unknown[0]!r} is no kind of edit; choose of {', '.join(KINDS)}")
    rng = random.Random(digest("test", recipe.seed))
    cases: dict[str, dict] = {}
    while len(cases) < recipe.evaluate.images:
        kind = kinds[len(cases) % len(kinds)]
        drawn = draw_triplet(rng, kind, unseen=True, held_out=True)
        cases[caption_id(drawn.caption)] = {
            "caption_id": caption_id(drawn.caption),
            "edit_kind": kind,
            "instruction": drawn.instruction,
            "original_prompt": drawn.caption,
            "edited_prompt": drawn.edited_caption,
            "original_image": images.encode(render(drawn.scene)),
            "edited_image": images.encode(render(drawn.edited_scene)),
        }
    return pa.Table.from_pylist(list(cases.values()), schema=TEST)


def dataset_cases(recipe: Recipe, workspace: Workspace) -> pa.Table:
    """The best pair (by direction) of each held-out caption: the test split, or without one the validation split."""
    splits = [
        workspace.read_table("dataset", name) for name in ("test", "validation") if workspace.exists("dataset", name)
    ]
    table = next((split for split in splits if split.num_rows), None)  # an exported split may be empty
    if table is None:
        raise UserError(
            "no held-out pairs to evaluate on: set dataset.validation_fraction or dataset.test_fraction above 0 and "
            f"export the dataset of {workspace.location} again"
        )
    table = table.sort_by([("caption_id", "ascending"), ("clip_sim_dir", "descending")])
    ids = table["caption_id"].to_numpy(zero_copy_only=False)
    _, first = np.unique(ids, return_index=True)
    chosen = sorted(first, key=lambda n: digest("test", recipe.seed, ids[n]))[: recipe.evaluate.images]
    cases = [
        {**row, "edit_kind": None, "instruction": row["edit_prompt"]}
        | {key: row[key]["bytes"] for key in ("original_image", "edited_image")}
        for row in table.take(chosen).to_pylist()
    ]
    return pa.Table.from_pylist([{name: case[name] for name in TEST.names} for case in cases], schema=TEST)


def chosen_case(chosen: ChosenImage) -> pa.Table:
    """The image and instruction of `evaluate.chosen` as a table of TEST, without captions and ground truth.

    Raises `UserError` when the image is not there or can't be read.
    """
    file, key = Workspace(chosen.image), f"evaluate.chosen.image: {chosen.image!r}"
    if not file.fs.get_file_info(file.root).is_file:
        raise UserError(f"{key} is no file")
    with file.fs.open_input_file(file.root) as stream:
        data = stream.read()
    try:
        images.decode(data)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    name = f"{digest('chosen', data.hex(), chosen.instruction):016x}"
    case = {"caption_id": name, "instruction": chosen.instruction, "original_image": data}
    return pa.Table.from_pylist([case], schema=TEST)


NOTHING_RIGHT = Judgement(carried_out=False, preserved=False, valid=False, preserved_fraction=0.0, kept={})


def judge(sources: list[np.ndarray], instructions: list[str], results: list[np.ndarray]) -> list[Judgement]:
    """The oracle on edited images, all uint8 (32, 32, 3); where an instruction makes no sense, nothing is right."""
    judged = judge_images(np.stack(sources), instructions, np.stack(results))
    return [NOTHING_RIGHT if isinstance(judgement, str) else judgement for judgement in judged]
