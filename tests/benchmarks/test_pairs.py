"""The peers that the engine is timed against do the same work."""

import copy
import time

import pytest
import torch

from benchmarks import pairs
from ip2p.pairs.generate import PairGenerator
from ip2p.recipe import Adaptive, Sharing

ROWS = [
    {
        "caption_id": name,
        "original_prompt": before,
        "edit_prompt": "edit it",
        "edited_prompt": after,
        "status": "ok",
        "reason": "",
    }
    for name, before, after in (("a", "red dog", "blue dog"), ("b", "a hat on a cat", "a cat"))
]


@pytest.mark.parametrize("steps", [1, 3])
def test_upstream_makes_the_same_candidates(smallest, steps):
    settings = smallest.pairs.model_copy(
        update={"solver": "euler_ancestral", "sharing": Sharing(modes=["self"]), "steps": steps}
    )
    ours = PairGenerator(smallest.model_copy(update={"pairs": settings}))
    theirs = copy.copy(ours)
    theirs.model = copy.copy(ours.model)
    theirs.model.unet = copy.deepcopy(ours.model.unet)
    theirs.model.unet.set_attn_processor(pairs.CopiedMaps())
    expected = [candidate for result in ours.generate(ROWS) for candidate in result["candidates"]]
    with torch.inference_mode():
        found = pairs.upstream(theirs, ROWS)
    assert len(found) == len(expected) == 6
    for a, b in zip(found, expected):
        # A pixel may be rounded the other way, and after a single step the two images hardly differ.
        for name, value in a.items():
            assert value == pytest.approx(b[name], abs=0.05 if name == "clip_sim_dir" else 5e-3)


def test_held_out_rows_are_the_same_every_time_and_all_different():
    rows = pairs.held_out_rows(40)
    assert rows == pairs.held_out_rows(40)
    assert len({row["caption_id"] for row in rows}) == 40
    assert not {row["caption_id"] for row in rows} & {row["caption_id"] for row in pairs.held_out_rows(40, seed=1)}


def test_both_protocols_draw_the_same_candidates(smallest):
    weights = dict.fromkeys(("intercept", "image", "direction", "agreement_before", "agreement_after"), 0.0)
    recipe = smallest.model_copy(update={"pairs": smallest.pairs.model_copy(update={"quality": None})})
    with pytest.raises(ValueError, match=r"jobs\.calibrate"):
        pairs.protocols(recipe)
    settings = smallest.pairs.model_validate(smallest.pairs.model_dump() | {"quality": weights | {"at_least": 0.5}})
    found = pairs.protocols(smallest.model_copy(update={"pairs": settings}))
    assert (found["fixed"].candidates, found["fixed"].adaptive, found["fixed"].quality) == (100, None, None)
    assert (found["adaptive"].candidates, found["adaptive"].adaptive) == (100, Adaptive())
    assert found["adaptive"].quality == settings.quality


def test_the_rate_leaves_out_what_each_process_needs_to_start():
    now = time.time()
    blocks = [(now + 5, 8), (now + 4, 8), (now + 6, 8), (now + 8, 8)]
    assert pairs.steady_rate(blocks, processes=2) == pytest.approx(16 / 3)
    with pytest.raises(ValueError, match="raise --timed_rows"):
        pairs.steady_rate(blocks, processes=4)
