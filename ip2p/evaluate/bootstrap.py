"""Means with confidence intervals, by bootstrap over cases: the one source of every interval that is printed.

The unit that is resampled is the *case* (a caption or a test image), not the sample: candidates of one caption, and one
test image edited at several scales, are not independent. Resampling all conditions with the same cases makes every
difference a paired one.
"""

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 2000
AUC_RESAMPLES = 500  # each is a pass over all rows


@dataclass(frozen=True)
class Estimate:
    """A mean, its 95% interval and the number of samples behind it."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Trend:
    """How a mean moves along a swept scale."""

    means: list[Estimate]
    rise: Estimate  # last mean minus first, paired
    monotone: bool  # no step falls by more than its error, and the whole rises by more than its error


def bootstrap_means(sums: np.ndarray, counts: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Resampled means, (resamples, K), of K conditions measured on the same N cases.

    `sums` and `counts` are (N, K): the total and the number of samples of a case under a condition; a case without
    samples there has count 0. A resample in which a condition has no sample gives NaN.
    """
    weights = _draws(len(sums), resamples, seed)
    with np.errstate(invalid="ignore"):
        return (weights @ sums) / (weights @ counts)


@lru_cache(maxsize=64)
def _draws(cases: int, resamples: int, seed: int) -> np.ndarray:
    """How often each case is in each resample, (resamples, cases)."""
    drawn = np.random.default_rng(seed).integers(0, cases, (resamples, cases))
    return np.stack([np.bincount(draw, minlength=cases) for draw in drawn]).astype(float)


def estimate(sums: np.ndarray, counts: np.ndarray) -> list[Estimate]:
    """The mean of each of K conditions with its 95% percentile interval; arguments as in `bootstrap_means`."""
    low, high = _interval(bootstrap_means(sums, counts))
    with np.errstate(invalid="ignore"):
        means = sums.sum(0) / counts.sum(0)
    return [Estimate(float(m), float(a), float(b), int(n)) for m, a, b, n in zip(means, low, high, counts.sum(0))]


def difference(sums: np.ndarray, counts: np.ndarray, of: int, against: int) -> Estimate:
    """Mean of condition `of` minus mean of condition `against` on the same cases, with its paired interval."""
    resampled = bootstrap_means(sums, counts)
    low, high = _interval(resampled[:, of] - resampled[:, against])
    with np.errstate(invalid="ignore"):
        means = sums.sum(0) / counts.sum(0)
    return Estimate(float(means[of] - means[against]), float(low), float(high), int(counts[:, of].sum()))


def _interval(resampled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """2.5% and 97.5% percentiles along the resamples; NaN where no resample has a value."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        low, high = np.nanpercentile(resampled, (2.5, 97.5), axis=0)
    return low, high


# AUC = P(score of a right one > that of a wrong one) + P(equal) / 2 (Mann-Whitney)
def auc(rows: Sequence[dict], score: str, right: str, case: str = "caption_id") -> Estimate:
    """How well `score` tells right rows from wrong ones, 0 to 1, with its 95% interval; 0.5 is by chance.

    Rows without score or truth are left out; NaN when they are all right or all wrong.
    """
    rows = [row for row in rows if row[score] is not None and row[right] is not None]
    truth = np.array([row[right] for row in rows], bool)
    if truth.all() or not truth.any():
        return Estimate(float("nan"), float("nan"), float("nan"), len(rows))
    values, level = np.unique([row[score] for row in rows], return_inverse=True)
    ids = {case_id: n for n, case_id in enumerate(sorted({row[case] for row in rows}))}
    case_of = np.array([ids[row[case]] for row in rows])

    def area(weights: np.ndarray) -> float:
        good, bad = (np.bincount(level[side], weights[side], len(values)) for side in (truth, ~truth))
        below = np.cumsum(bad) - bad / 2
        with np.errstate(invalid="ignore"):
            return float((good @ below) / (good.sum() * bad.sum()))

    low, high = _interval(np.array([area(drawn[case_of]) for drawn in _draws(len(ids), AUC_RESAMPLES, 0)]))
    return Estimate(area(np.ones(len(rows))), float(low), float(high), len(rows))


def trend(sums: np.ndarray, counts: np.ndarray) -> Trend:
    """Whether the mean rises along the K conditions, which stand in the order of the swept scale."""
    points = sums.shape[1]
    steps = [difference(sums, counts, k + 1, k) for k in range(points - 1)]
    rise = difference(sums, counts, points - 1, 0)
    monotone = all(step.high >= 0 for step in steps) and rise.low > 0
    return Trend(estimate(sums, counts), rise, monotone)


def by_case(
    rows: Sequence[dict],
    value: str,
    conditions: Sequence[Hashable],
    condition_of: Callable[[dict], Hashable],
    case: str = "caption_id",
) -> tuple[np.ndarray, np.ndarray]:
    """(sums, counts), each (N cases, K conditions), of `rows[value]`; None and NaN are left out.

    `condition_of(row)` gives the row's condition; rows of a condition that is not in `conditions` are left out.
    """
    cases = {case_id: n for n, case_id in enumerate(sorted({row[case] for row in rows}))}
    column = {condition: k for k, condition in enumerate(conditions)}
    sums, counts = np.zeros((2, len(cases), len(conditions)))
    for row in rows:
        k = column.get(condition_of(row))
        if k is not None and row[value] is not None and not np.isnan(row[value]):
            sums[cases[row[case]], k] += row[value]
            counts[cases[row[case]], k] += 1
    return sums, counts
