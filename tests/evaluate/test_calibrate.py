import numpy as np
import pytest

from ip2p.evaluate.calibrate import calibrate, choose, mark, quality
from ip2p.recipe import Thresholds


def draw(count: int = 600, seed: int = 0) -> list[dict]:
    """Candidates that are right when direction and image similarity are high, give or take; agreement says nothing."""
    rng = np.random.default_rng(seed)
    names = ("clip_sim_image", "clip_sim_dir", "clip_sim_0", "clip_sim_1")
    rows = [dict(zip(names, map(float, rng.uniform(0, 1, 4)), strict=True)) for _ in range(count)]
    for n, row in enumerate(rows):
        sure = row["clip_sim_dir"] > 0.4 and row["clip_sim_image"] > 0.3
        row |= {"caption_id": str(n // 6), "success": bool(rng.random() < (0.9 if sure else 0.1))}
    return rows


def test_the_thresholds_that_separate_are_found():
    candidates = draw()
    found = calibrate(candidates, Thresholds(image=-2, direction=-2, agreement=-2), 0.8)
    assert found.thresholds.direction == pytest.approx(0.4, abs=0.051)
    assert found.thresholds.image == pytest.approx(0.3, abs=0.051)
    assert found.thresholds.agreement <= 0.05
    assert found.chosen.precision.mean > found.unfiltered.precision.mean + 0.2
    assert found.chosen.recall > 0.7
    assert found.present == found.unfiltered
    assert found.unfiltered.recall == found.unfiltered.accepted == 1


def test_chance_is_not_sold_as_a_gain():
    rng = np.random.default_rng(1)
    candidates = [row | {"success": bool(rng.random() < 0.5)} for row in draw()]
    found = calibrate(candidates, Thresholds(), 0.5)
    on_the_same = quality(mark(candidates, found.thresholds)).precision.mean
    assert on_the_same > found.unfiltered.precision.mean, "a choice always fits its own sample"
    assert found.chosen.precision.low < found.unfiltered.precision.mean < found.chosen.precision.high


def test_recall_is_kept():
    for min_recall in (0.5, 0.9, 1.0):
        candidates = draw()
        assert quality(mark(candidates, choose(candidates, min_recall))).recall >= min_recall


def test_without_right_and_wrong_there_is_nothing_to_choose():
    with pytest.raises(ValueError, match="600 of 600 candidates are right"):
        calibrate([row | {"success": True} for row in draw()], Thresholds(), 0.5)
