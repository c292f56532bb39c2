"""Thresholds of the CLIP filter for one CLIP model, from generated pairs of which the truth is known.

Thresholds belong to a CLIP model: the paper's 0.75 and 0.2 are ViT-L/14's. Here they are those with the most right
pairs among the accepted ones (precision) that still accept a given share of all right pairs (recall).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from ip2p.evaluate.metrics import Estimate, by_case, estimate
from ip2p.pairs.filter import ACCEPTED, verdict
from ip2p.recipe import Thresholds
from ip2p.records import digest

STEP = 0.05  # of the thresholds tried: finer ones would fit the sample
NOTHING = Thresholds(image=-2, image_max=2, direction=-2, agreement=-2)


@dataclass(frozen=True)
class Quality:
    """What thresholds do to candidates: the rate of right ones among the accepted, and what is accepted."""

    precision: Estimate
    accepted: float  # share of all candidates
    recall: float  # share of the right candidates


@dataclass(frozen=True)
class Calibration:
    thresholds: Thresholds
    unfiltered: Quality
    present: Quality  # the recipe's thresholds
    chosen: Quality  # thresholds chosen on one half of the captions, measured on the other, both ways


def calibrate(candidates: Sequence[dict], present: Thresholds, min_recall: float) -> Calibration:
    """Choose thresholds for `candidates`: rows with caption_id, the clip_sim_* and `success`.

    Raises ValueError when none or all of them are right: then there is nothing to tell apart.
    """
    right = sum(row["success"] for row in candidates)
    if right in (0, len(candidates)):
        raise ValueError(f"{right} of {len(candidates)} candidates are right: thresholds need both kinds")
    halves: list[list[dict]] = [[], []]
    for row in candidates:
        halves[digest("calibrate", row["caption_id"]) % 2].append(row)
    marked = mark(halves[1], choose(halves[0], min_recall)) + mark(halves[0], choose(halves[1], min_recall))
    return Calibration(
        thresholds=choose(candidates, min_recall),
        unfiltered=quality(mark(candidates, NOTHING)),
        present=quality(mark(candidates, present)),
        chosen=quality(marked),
    )


def mark(candidates: Sequence[dict], thresholds: Thresholds) -> list[dict]:
    """The candidates with `accepted`."""
    return [row | {"accepted": verdict(row, thresholds) == ACCEPTED} for row in candidates]


def quality(marked: Sequence[dict]) -> Quality:
    accepted = [row for row in marked if row["accepted"]]
    (precision,) = estimate(*by_case(accepted, "success", [True], lambda row: row["accepted"]))
    right = sum(row["success"] for row in marked)
    return Quality(precision, len(accepted) / len(marked), sum(row["success"] for row in accepted) / right)


def choose(candidates: Sequence[dict], min_recall: float) -> Thresholds:
    """The thresholds of greatest precision with at least `min_recall`; of equals the one that accepts most."""
    success = np.array([row["success"] for row in candidates])
    scores = {name: np.array([row[f"clip_sim_{name}"] for row in candidates]) for name in ("image", "dir", "0", "1")}
    agreement = np.minimum(scores["0"], scores["1"])
    best, found = (-1.0, -1.0), NOTHING
    for image, direction, agree in product(*(_levels(s) for s in (scores["image"], scores["dir"], agreement))):
        accepted = (scores["image"] >= image) & (scores["dir"] >= direction) & (agreement >= agree)
        kept = int((success & accepted).sum())
        if kept and kept >= min_recall * success.sum() and (kept / accepted.sum(), kept) > best:
            best = (kept / accepted.sum(), kept)
            found = Thresholds(image=image, direction=direction, agreement=agree)
    return found


def _levels(scores: np.ndarray) -> list[float]:
    """Thresholds to try, multiples of STEP: from one that lets everything pass to the median."""
    low, middle = np.floor(scores.min() / STEP), np.floor(np.median(scores) / STEP)
    return [round(float(k * STEP), 2) for k in np.arange(low, middle + 1)]
