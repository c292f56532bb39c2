"""Which candidates become pairs (InstructPix2Pix section 3.1.2): a verdict with a reason for each."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ip2p.recipe import Pairs, Quality

ACCEPTED = "accepted"
SURPLUS = "surplus"
NOT_FINITE = "not finite"


def verdict(scores: Mapping[str, Any], settings: Pairs) -> str:
    """`accepted`, or the first test that the candidate fails. A similarity that is not a number fails."""
    if weights := settings.quality:
        return ACCEPTED if quality(scores, weights) >= weights.at_least else f"quality < {weights.at_least:g}"
    t = settings.thresholds
    if not scores["clip_sim_image"] >= t.image:
        return f"image < {t.image:g}"
    if not scores["clip_sim_image"] <= t.image_max:
        return f"image > {t.image_max:g}"
    if not scores["clip_sim_dir"] >= t.direction:
        return f"direction < {t.direction:g}"
    if not scores["clip_sim_0"] >= t.agreement:
        return f"agreement before < {t.agreement:g}"
    if not scores["clip_sim_1"] >= t.agreement:
        return f"agreement after < {t.agreement:g}"
    return ACCEPTED


# P(right | s) = 1 / (1 + exp(-(b + w . s)))   (logistic regression)
def quality(scores: Mapping[str, Any], weights: Quality) -> float:
    """Chance, in [0, 1], that a candidate with these similarities is right."""
    logit = (
        weights.intercept
        + weights.image * scores["clip_sim_image"]
        + weights.direction * scores["clip_sim_dir"]
        + weights.agreement_before * scores["clip_sim_0"]
        + weights.agreement_after * scores["clip_sim_1"]
    )
    return 0.5 * (1 + math.tanh(logit / 2))


def best(candidates: Mapping[int, Mapping[str, Any]], max_pairs: int) -> list[int]:
    """At most `max_pairs` of the accepted candidates k, the best first; the earlier one of equals.

    By quality, and where the recipe has none by direction, as upstream.
    """

    def rank(k: int) -> tuple[float, int]:
        scores = candidates[k]
        return -(scores["clip_sim_dir"] if scores["quality"] is None else scores["quality"]), k

    return sorted(candidates, key=rank)[:max_pairs]


def tally(verdicts: Iterable[str]) -> str:
    """`direction < 0.2: 5, image < 0.7: 3`, most frequent first: why no candidate was accepted."""
    counts = sorted(Counter(verdicts).items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name}: {count}" for name, count in counts)
