import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from ip2p.evaluate.bootstrap import auc, bootstrap_means, by_case, difference, estimate, trend


def measured(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return values, np.ones_like(values)


def test_interval_covers_the_true_mean_about_95_times_of_100():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        (found,) = estimate(*measured(rng.normal(3, 1, (60, 1))))
        covered += found.low <= 3 <= found.high
    assert 180 <= covered <= 199


def test_interval_of_a_normal_mean_is_1_96_standard_errors_wide():
    values = np.random.default_rng(0).normal(0, 1, (400, 1))
    (found,) = estimate(*measured(values))
    assert found.mean == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)


def test_candidates_of_a_case_are_not_counted_as_independent():
    """100 copies of the same 20 answers say no more than the 20."""
    once = np.random.default_rng(0).integers(0, 2, (20, 1)).astype(float)
    (single,), (copied,) = estimate(once, np.ones_like(once)), estimate(100 * once, np.full_like(once, 100))
    assert (copied.low, copied.high) == (single.low, single.high)
    assert copied.count == 2000


def test_a_difference_is_paired():
    """Cases differ much more from one another than the two conditions do."""
    case = np.random.default_rng(0).normal(0, 10, (50, 1))
    sums, counts = measured(np.hstack([case, case + 0.5]))
    found = difference(sums, counts, 1, 0)
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_trend_rises_within_error():
    noise = np.random.default_rng(0).normal(0, 0.1, (60, 4))
    noise -= noise.mean(0)
    rising = trend(*measured(noise + np.array([0.1, 0.2, 0.3, 0.4])))
    assert rising.monotone
    assert rising.rise.mean == pytest.approx(0.3, abs=0.05)
    assert not trend(*measured(noise)).monotone, "nothing rises"
    assert not trend(*measured(noise + np.array([0.1, 0.5, 0.2, 0.6]))).monotone, (
        "one step falls by more than its error"
    )
    assert trend(*measured(noise + np.array([0.1, 0.3, 0.29, 0.6]))).monotone, "one step falls by less than its error"


def test_by_case_sums_and_leaves_out_what_is_missing():
    rows = [
        {"caption_id": "a", "s": 1, "v": 1.0},
        {"caption_id": "a", "s": 1, "v": 0.0},
        {"caption_id": "b", "s": 2, "v": 1.0},
        {"caption_id": "b", "s": 1, "v": None},
        {"caption_id": "b", "s": 1, "v": float("nan")},
        {"caption_id": "b", "s": 9, "v": 1.0},
    ]
    sums, counts = by_case(rows, "v", [1, 2], lambda row: row["s"])
    assert sums.tolist() == [[1, 0], [0, 1]]
    assert counts.tolist() == [[2, 0], [0, 1]]


def test_a_condition_without_samples_has_no_mean():
    counts = np.array([[1.0, 0.0]] * 5)
    full, empty = estimate(counts, counts)
    assert full.mean == 1
    assert np.isnan([empty.mean, empty.low, empty.high]).all()


def test_the_same_data_gives_the_same_intervals():
    values = measured(np.random.default_rng(0).normal(0, 1, (30, 2)))
    assert np.array_equal(bootstrap_means(*values), bootstrap_means(*values))


def test_auc_is_that_of_scikit_learn_and_its_interval_is_over_cases():
    rng = np.random.default_rng(0)
    rows = [
        {"caption_id": str(n // 4), "score": round(float(rng.normal(right)), 1), "right": bool(right)}
        for n, right in enumerate(rng.integers(0, 2, 200))
    ]
    found = auc(rows, "score", "right")
    assert found.mean == pytest.approx(roc_auc_score([r["right"] for r in rows], [r["score"] for r in rows]))
    assert found.low < found.mean < found.high and found.count == 200
    # A case three times over is no more evidence: three copies of every row change neither mean nor interval.
    often = auc(rows * 3, "score", "right")
    assert (often.mean, often.low, often.high) == pytest.approx((found.mean, found.low, found.high))
    assert np.isnan(auc([row | {"right": True} for row in rows], "score", "right").mean)
    unknown = [row | {"right": None} for row in rows]
    assert auc(rows + unknown, "score", "right").count == 200
