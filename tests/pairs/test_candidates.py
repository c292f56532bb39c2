import numpy as np
import pytest

from ip2p.pairs.candidates import draw_candidate, has_paid
from ip2p.recipe import Adaptive, Pairs

SETTINGS = Pairs(guidance_scale=(2.0, 4.0), shared_attention_fraction=(0.1, 0.9))


def test_a_candidate_is_the_same_whenever_it_is_drawn():
    drawn = [draw_candidate(SETTINGS, 0, "abc", k) for k in range(5)]
    assert drawn == [draw_candidate(SETTINGS, 0, "abc", k) for k in range(5)]
    assert len({candidate.seed for candidate in drawn}) == 5
    assert draw_candidate(SETTINGS, 1, "abc", 0) != drawn[0] != draw_candidate(SETTINGS, 0, "abd", 0)


def test_draws_fill_their_ranges_and_are_exact_in_float32():
    drawn = [draw_candidate(SETTINGS, 0, "abc", k) for k in range(2000)]
    for name, (low, high) in [("guidance_scale", (2, 4)), ("shared_attention_fraction", (0.1, 0.9))]:
        values = np.array([getattr(candidate, name) for candidate in drawn])
        assert low <= values.min() and values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.05 * (high - low)
        assert (values == values.astype(np.float32)).all()


def test_p_is_drawn_where_it_paid():
    adaptive = SETTINGS.model_copy(update={"adaptive": Adaptive()})
    tried = [(0.2, True), (0.3, True), (0.7, False)]
    drawn = [draw_candidate(adaptive, 0, "abc", k, tried) for k in range(500)]
    fractions = np.array([candidate.shared_attention_fraction for candidate in drawn])
    assert fractions.min() >= 0.1 and fractions.max() < 0.5  # half-way between .3 and .7
    assert fractions.mean() == pytest.approx(0.3, abs=0.03)
    # All else is what it would have been, and where there is no choice so is p.
    plain = [draw_candidate(SETTINGS, 0, "abc", k, tried) for k in range(500)]
    same = [(a.seed, a.guidance_scale) == (b.seed, b.guidance_scale) for a, b in zip(drawn, plain)]
    assert all(same)
    for nothing in ([], [(0.2, False)], [(0.2, True)]):
        assert draw_candidate(adaptive, 0, "abc", 7, nothing) == plain[7]
    unwilling = SETTINGS.model_copy(update={"adaptive": Adaptive(follow_fraction=False)})
    assert [draw_candidate(unwilling, 0, "abc", k, tried) for k in range(500)] == plain


def test_what_has_paid_is_what_the_nearest_did():
    assert has_paid(0.5, [(0.1, False), (0.45, True)])
    assert not has_paid(0.5, [(0.1, True), (0.45, False)])
