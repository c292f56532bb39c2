"""Which candidates become pairs (InstructPix2Pix section 3.1.2): a verdict with a reason for each."""

from collections import Counter
from collections.abc import Iterable, Mapping

from ip2p.recipe import Thresholds

ACCEPTED = "accepted"
SURPLUS = "surplus"
NOT_FINITE = "not finite"


def verdict(scores: Mapping[str, float], thresholds: Thresholds) -> str:
    """`accepted`, or the first test that the candidate fails. A similarity that is not a number fails."""
    t = thresholds
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


def best(directions: Mapping[int, float], max_pairs: int) -> list[int]:
    """At most `max_pairs` of the accepted candidates k, best direction first; the earlier one of equals."""
    return sorted(directions, key=lambda k: (-directions[k], k))[:max_pairs]


def tally(verdicts: Iterable[str]) -> str:
    """`direction < 0.2: 5, image < 0.7: 3`, most frequent first: why no candidate was accepted."""
    counts = sorted(Counter(verdicts).items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name}: {count}" for name, count in counts)
