import random

import pytest

from ip2p.pairs.adaptive import expected_acceptance, next_round
from ip2p.recipe import Adaptive, Pairs

ADAPTIVE = Pairs(candidates=100, max_pairs=4, adaptive=Adaptive(round=3, give_up_below=0.1))


def draw(settings: Pairs, rate: float, rng: random.Random) -> tuple[int, int]:
    """(drawn, accepted) of a caption pair of which a share `rate` is accepted."""
    drawn = accepted = 0
    while count := next_round(settings, drawn, accepted):
        drawn += count
        accepted += sum(rng.random() < rate for _ in range(count))
    return drawn, accepted


def test_a_fixed_number_is_one_round():
    assert next_round(Pairs(candidates=100), 0, 0) == 100
    assert next_round(Pairs(candidates=100), 100, 0) == 0


@pytest.mark.parametrize(
    ("drawn", "accepted", "wanted"),
    [
        (0, 0, 3),
        (3, 2, 2),  # no more than can be kept
        (5, 4, 0),  # enough
        (99, 20, 0),
        (6, 0, 3),  # 1 / 8 may be expected still
        (9, 0, 0),  # 1 / 11: given up
        (19, 1, 0),  # 2 / 21
        (98, 3, 0),
    ],
)
def test_rounds_end_with_enough_or_without_hope(drawn: int, accepted: int, wanted: int):
    assert next_round(ADAPTIVE, drawn, accepted) == wanted


def test_never_more_than_candidates():
    patient = ADAPTIVE.model_copy(update={"candidates": 10, "adaptive": Adaptive(round=4, give_up_below=0)})
    assert draw(patient, 0.0, random.Random(0)) == (10, 0)


def test_what_it_saves():
    rng = random.Random(0)
    for rate, at_most in ((1.0, 4), (0.5, 9), (0.25, 15), (0.0, 9)):
        spent = [draw(ADAPTIVE, rate, rng)[0] for _ in range(500)]
        assert sum(spent) / 500 <= at_most
    assert expected_acceptance(0, 0) == 0.5
