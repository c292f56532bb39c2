import math

import pytest

from ip2p.pairs.filter import best, tally, verdict
from ip2p.recipe import Thresholds

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
    assert verdict(GOOD | change, Thresholds(image_max=0.95)) == expected


def test_best_by_direction():
    assert best({5: 0.3, 2: 0.9, 7: 0.3, 1: 0.1}, 3) == [2, 5, 7]
    assert best({1: 0.5}, 4) == [1]


def test_tally():
    assert tally(["b", "a", "c", "a", "b", "a"]) == "a: 3, b: 2, c: 1"
