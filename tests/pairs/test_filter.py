import math

import pytest

from ip2p.pairs.filter import best, quality, tally, verdict
from ip2p.recipe import Pairs, Quality, Thresholds

GOOD = {"clip_sim_image": 0.8, "clip_sim_dir": 0.3, "clip_sim_0": 0.25, "clip_sim_1": 0.25}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "accepted"),
        ({"clip_sim_image": 0.7, "clip_sim_dir": 0.2, "clip_sim_0": 0.2, "clip_sim_1": 0.2}, "accepted"),
        ({"clip_sim_image": 0.69}, "image < 0.7"),
        ({"clip_sim_image": 0.96}, "image > 0.95"),
        ({"clip_sim_dir": 0.19}, "direction < 0.2"),
        ({"clip_sim_dir": math.nan}, "direction < 0.2"),
        ({"clip_sim_0": 0.1}, "agreement before < 0.2"),
        ({"clip_sim_1": 0.1}, "agreement after < 0.2"),
        ({"clip_sim_1": 0.1, "clip_sim_image": 0.1}, "image < 0.7"),
    ],
)
def test_verdict_names_the_first_test_that_fails(change, expected):
    assert verdict(GOOD | change, Pairs(thresholds=Thresholds(image_max=0.95))) == expected


def weights(at_least: float) -> Quality:
    return Quality(intercept=-2, image=1, direction=2, agreement_before=4, agreement_after=8, at_least=at_least)


def test_quality_is_logistic_in_the_similarities():
    assert quality(GOOD, weights(0)) == pytest.approx(1 / (1 + math.exp(-(-2 + 0.8 + 0.6 + 1 + 2))))
    assert quality(dict.fromkeys(GOOD, -10000.0), weights(0)) == 0
    assert math.isnan(quality(GOOD | {"clip_sim_0": math.nan}, weights(0)))


def test_quality_takes_the_place_of_the_thresholds():
    chance = quality(GOOD, weights(0))
    for at_least, expected in ((chance, "accepted"), (0.95, "quality < 0.95")):
        assert verdict(GOOD, Pairs(quality=weights(at_least))) == expected
    assert verdict(GOOD | {"clip_sim_dir": 0.1}, Pairs(quality=weights(0))) == "accepted"
    assert verdict(GOOD | {"clip_sim_dir": math.nan}, Pairs(quality=weights(0))) == "quality < 0"


def test_best_by_quality_or_else_by_direction():
    def scored(directions: dict[int, float], quality: float | None) -> dict[int, dict]:
        return {k: {"clip_sim_dir": value, "quality": quality and quality - value} for k, value in directions.items()}

    assert best(scored({5: 0.3, 2: 0.9, 7: 0.3, 1: 0.1}, None), 3) == [2, 5, 7]
    assert best(scored({5: 0.3, 2: 0.9, 7: 0.3, 1: 0.1}, 1.0), 3) == [1, 5, 7]
    assert best(scored({1: 0.5}, None), 4) == [1]


def test_tally():
    assert tally(["b", "a", "c", "a", "b", "a"]) == "a: 3, b: 2, c: 1"
