"""The CLIP filter for one CLIP model, from generated pairs of which the truth is known.

Thresholds belong to a CLIP model: the paper's 0.75 and 0.2 are ViT-L/14's. Here they are those with the most right
pairs among the accepted ones (precision) that still accept a given share of all right pairs (recall). Beside them, the
chance that a pair is right given all similarities together, by logistic regression, and a threshold on that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from ip2p.errors import UserError
from ip2p.evaluate.bootstrap import Estimate, by_case, estimate
from ip2p.pairs.filter import ACCEPTED, quality, verdict
from ip2p.recipe import Pairs, Quality, Thresholds
from ip2p.records import digest
from ip2p.workspace import Workspace

MIN_RECALL = 0.6  # share of the right candidates that a filter must accept, unless told otherwise
STEP = 0.05  # of the thresholds tried: finer ones would fit the sample
NOTHING = Pairs(thresholds=Thresholds(image=-2, image_max=2, direction=-2, agreement=-2))
SIMILARITIES = ("clip_sim_image", "clip_sim_dir", "clip_sim_0", "clip_sim_1")  # in the order of Quality's weights


@dataclass(frozen=True)
class Effect:
    """What a filter does to candidates: the rate of right ones among the accepted, and what is accepted."""

    precision: Estimate
    accepted: float  # share of all candidates
    recall: float  # share of the right candidates


@dataclass(frozen=True)
class Calibration:
    """What was chosen, and how filters do. Chosen ones are measured on the captions that they were not chosen on."""

    thresholds: Thresholds
    quality: Quality
    unfiltered: Effect
    present: Effect  # the recipe's filter
    by_thresholds: Effect
    by_quality: Effect
    direction_auc: float  # chance that of a right and a wrong candidate the right one has the higher direction
    quality_auc: float  # or the higher quality, on other captions


def calibrate(candidates: Sequence[dict], present: Pairs, min_recall: float) -> Calibration:
    """Choose a filter for `candidates`: rows with caption_id, the clip_sim_* and `success`.

    Raises ValueError when there are too few to choose by: none or all of them, or of half of the captions', are right.
    """
    right = sum(row["success"] for row in candidates)
    if right in (0, len(candidates)):
        raise UserError(f"{right} of {len(candidates)} candidates are right: a choice needs both kinds")
    halves: list[list[dict]] = [[], []]
    for row in candidates:
        halves[digest("calibrate", row["caption_id"]) % 2].append(row)

    if any(len({row["success"] for row in half}) < 2 for half in halves):
        raise UserError("one half of the captions has right candidates alone, or wrong ones: judge more captions")

    def on_others(choose: Callable[[Sequence[dict]], Pairs]) -> list[dict]:
        return mark(halves[1], choose(halves[0])) + mark(halves[0], choose(halves[1]))

    by_quality = on_others(lambda rows: Pairs(quality=choose_quality(rows, min_recall)))
    return Calibration(
        thresholds=choose_thresholds(candidates, min_recall),
        quality=choose_quality(candidates, min_recall),
        unfiltered=effect(mark(candidates, NOTHING)),
        present=effect(mark(candidates, present)),
        by_thresholds=effect(on_others(lambda rows: Pairs(thresholds=choose_thresholds(rows, min_recall)))),
        by_quality=effect(by_quality),
        direction_auc=_auc(candidates, "clip_sim_dir"),
        quality_auc=_auc(by_quality, "quality"),
    )


def judged_candidates(workspace: Workspace) -> list[dict]:
    """The candidates of evaluation/pair_truth.parquet that were made with attention sharing, with their caption ids."""
    return [
        candidate | {"caption_id": caption["caption_id"]}
        for caption in workspace.read_table("evaluation", "pair_truth.parquet").to_pylist()
        for candidate in caption["candidates"]
        if candidate["shared"]
    ]


def mark(candidates: Sequence[dict], settings: Pairs) -> list[dict]:
    """The candidates with `accepted` and, where the settings have one, their `quality`."""
    weights = settings.quality
    return [
        row | {"accepted": verdict(row, settings) == ACCEPTED, "quality": weights and quality(row, weights)}
        for row in candidates
    ]


def effect(marked: Sequence[dict]) -> Effect:
    accepted = [row for row in marked if row["accepted"]]
    (precision,) = estimate(*by_case(accepted, "success", [True], lambda row: row["accepted"]))
    right = sum(row["success"] for row in marked)
    return Effect(precision, len(accepted) / len(marked), sum(row["success"] for row in accepted) / right)


def choose_thresholds(candidates: Sequence[dict], min_recall: float) -> Thresholds:
    """The thresholds of greatest precision with at least `min_recall`; of equals the one that accepts most."""
    success = np.array([row["success"] for row in candidates])
    scores = {name: np.array([row[f"clip_sim_{name}"] for row in candidates]) for name in ("image", "dir", "0", "1")}
    agreement = np.minimum(scores["0"], scores["1"])
    best, found = (-1.0, -1.0), NOTHING.thresholds
    for image, direction, agree in product(*(_levels(s) for s in (scores["image"], scores["dir"], agreement))):
        accepted = (scores["image"] >= image) & (scores["dir"] >= direction) & (agreement >= agree)
        kept = int((success & accepted).sum())
        if kept and kept >= min_recall * success.sum() and (kept / accepted.sum(), kept) > best:
            best = (kept / accepted.sum(), kept)
            found = Thresholds(image=image, direction=direction, agreement=agree)
    return found


def choose_quality(candidates: Sequence[dict], min_recall: float) -> Quality:
    """Weights by logistic regression, and the highest threshold (a multiple of STEP) with at least `min_recall`."""
    similarities = np.array([[row[name] for name in SIMILARITIES] for row in candidates])
    success = np.array([row["success"] for row in candidates])
    # Cosines vary by tenths: weak regularisation (large C), or the weights stay near 0.
    model = LogisticRegression(C=100, max_iter=10_000).fit(similarities, success)
    image, direction, before, after = (round(float(weight), 3) for weight in model.coef_[0])
    chance = model.predict_proba(similarities)[:, 1]
    levels = [level for level in np.arange(0, 1, STEP) if success[chance >= level].sum() >= min_recall * success.sum()]
    return Quality(
        intercept=round(float(model.intercept_[0]), 3),
        image=image,
        direction=direction,
        agreement_before=before,
        agreement_after=after,
        at_least=round(float(levels[-1]), 2),
    )


def _auc(rows: Sequence[dict], score: str) -> float:
    return float(roc_auc_score([row["success"] for row in rows], [row[score] for row in rows]))


def _levels(scores: np.ndarray) -> list[float]:
    """Thresholds to try, multiples of STEP: from one that lets everything pass to the median."""
    low, middle = np.floor(scores.min() / STEP), np.floor(np.median(scores) / STEP)
    return [round(float(k * STEP), 2) for k in np.arange(low, middle + 1)]
