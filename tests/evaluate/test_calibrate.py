import numpy as np
import pytest

from ip2p.evaluate.calibrate import NOTHING, calibrate, choose_quality, choose_thresholds, effect, mark
from ip2p.recipe import Pairs


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
    found = calibrate(candidates, NOTHING, 0.8)
    assert found.thresholds.direction == pytest.approx(0.4, abs=0.051)
    assert found.thresholds.image == pytest.approx(0.3, abs=0.051)
    assert found.thresholds.agreement <= 0.05
    assert found.by_thresholds.precision.mean > found.unfiltered.precision.mean + 0.2
    assert found.by_thresholds.recall > 0.7
    assert found.present == found.unfiltered
    assert found.unfiltered.recall == found.unfiltered.accepted == 1


def test_chance_is_not_sold_as_a_gain():
    rng = np.random.default_rng(1)
    candidates = [row | {"success": bool(rng.random() < 0.5)} for row in draw()]
    found = calibrate(candidates, Pairs(), 0.5)
    on_the_same = effect(mark(candidates, Pairs(thresholds=found.thresholds))).precision.mean
    assert on_the_same > found.unfiltered.precision.mean, "a choice always fits its own sample"
    for chosen in (found.by_thresholds, found.by_quality):
        assert chosen.precision.low < found.unfiltered.precision.mean < chosen.precision.high
    assert found.quality_auc == pytest.approx(0.5, abs=0.06)


def test_several_weak_signs_together_are_a_strong_one():
    rng = np.random.default_rng(2)
    rows = draw()
    for row in rows:
        logit = 8 * (row["clip_sim_dir"] + row["clip_sim_0"] + row["clip_sim_1"]) - 12
        row["success"] = bool(rng.random() < 1 / (1 + np.exp(-logit)))
    found = calibrate(rows, NOTHING, 0.5)
    assert found.quality_auc > found.direction_auc + 0.1
    assert found.by_quality.precision.mean > found.by_thresholds.precision.mean
    weights = found.quality
    assert weights.direction == pytest.approx(8, abs=2.5)
    assert weights.intercept == pytest.approx(-12, abs=3)
    assert weights.image == pytest.approx(0, abs=1.5)


def test_recall_is_kept():
    candidates = draw()
    for min_recall in (0.5, 0.9, 1.0):
        for chosen in (
            Pairs(thresholds=choose_thresholds(candidates, min_recall)),
            Pairs(quality=choose_quality(candidates, min_recall)),
        ):
            assert effect(mark(candidates, chosen)).recall >= min_recall


def test_without_right_and_wrong_there_is_nothing_to_choose():
    with pytest.raises(ValueError, match="600 of 600 candidates are right"):
        calibrate([row | {"success": True} for row in draw()], Pairs(), 0.5)
