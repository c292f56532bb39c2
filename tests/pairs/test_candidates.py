import numpy as np

from ip2p.pairs.candidates import draw_candidate
from ip2p.recipe import Pairs

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
