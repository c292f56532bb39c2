"""The funnel of a run: how many captions, candidates and pairs there were, and why the others fell out."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ip2p.pairs.filter import ACCEPTED, SURPLUS

COLUMNS = ["status", "reason", "edit_prompt", "candidates", "unet_samples", "seconds"]
"""What `funnel` reads of PAIRS: not the images."""
REJECTED = "rejected: "  # what a count of candidates by reason begins with


def funnel(batches: Iterable[pa.RecordBatch]) -> dict[str, Any]:
    """Counts over rows of PAIRS.

    captions -> instructions (those that came with one) -> candidates -> accepted -> pairs (the best of each caption);
    captions_with_pairs, failed (captions), unet_samples, device_seconds, both also for each pair (None where there is
    none); `no_instruction`, `not_accepted` and `failures` are counts by reason, most frequent first.
    """
    counts: Counter[str] = Counter()
    verdicts: Counter[str] = Counter()
    no_instruction: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    seconds = 0.0
    for batch in batches:
        candidates = batch["candidates"]
        generated = pc.greater(pc.list_value_length(candidates), 0)  # pyright: ignore[reportAttributeAccessIssue]
        failed = pc.and_(  # pyright: ignore[reportAttributeAccessIssue]
            pc.equal(batch["status"], "failed"),  # pyright: ignore[reportAttributeAccessIssue]
            pc.not_equal(batch["edit_prompt"], ""),  # pyright: ignore[reportAttributeAccessIssue]
        )
        reached = pc.or_(generated, failed)  # pyright: ignore[reportAttributeAccessIssue]
        verdicts.update(_counts(pc.struct_field(pc.list_flatten(candidates), "verdict")))  # pyright: ignore
        no_instruction.update(_counts(batch["reason"].filter(pc.invert(reached))))  # pyright: ignore
        failures.update(_counts(batch["reason"].filter(failed)))
        counts["captions"] += batch.num_rows
        counts["instructions"] += pc.sum(reached).as_py() or 0  # pyright: ignore[reportAttributeAccessIssue]
        counts["captions_with_pairs"] += pc.sum(pc.equal(batch["status"], "ok")).as_py() or 0  # pyright: ignore
        counts["unet_samples"] += pc.sum(batch["unet_samples"]).as_py() or 0  # pyright: ignore
        seconds += pc.sum(batch["seconds"]).as_py() or 0.0  # pyright: ignore[reportAttributeAccessIssue]
    pairs = verdicts.pop(ACCEPTED, 0)
    accepted = pairs + verdicts.pop(SURPLUS, 0)
    return {
        "captions": counts["captions"],
        "instructions": counts["instructions"],
        "candidates": accepted + verdicts.total(),
        "accepted": accepted,
        "pairs": pairs,
        "captions_with_pairs": counts["captions_with_pairs"],
        "failed": failures.total(),
        "unet_samples": counts["unet_samples"],
        "device_seconds": round(seconds, 3),
        "unet_samples_per_pair": round(counts["unet_samples"] / pairs, 1) if pairs else None,
        "device_seconds_per_pair": round(seconds / pairs, 4) if pairs else None,
        "no_instruction": dict(no_instruction.most_common()),
        "not_accepted": dict(verdicts.most_common()),
        "failures": dict(failures.most_common()),
    }


def count(rows: pa.Table) -> dict[str, float]:
    """Count some rows of PAIRS, flat: counts of several tables can be added."""
    found = funnel(rows.select(COLUMNS).to_batches())
    names = ("captions", "candidates", "accepted", "pairs", "failed", "unet_samples")
    numbers = {name: found[name] for name in names}
    reasons = {REJECTED + reason: number for reason, number in found["not_accepted"].items()}
    return {**numbers, "device_seconds": found["device_seconds"], **reasons}


def show(counts: dict[str, Any]) -> str:
    """The funnel as lines of text."""
    lines = [
        (counts["captions"], "captions"),
        *((-n, reason) for reason, n in counts["no_instruction"].items()),
        (counts["instructions"], "with an instruction"),
        *((-n, reason) for reason, n in counts["failures"].items()),
        (counts["candidates"], "candidates"),
        *((-n, reason) for reason, n in counts["not_accepted"].items()),
        (counts["accepted"], "accepted"),
        (counts["pairs"] - counts["accepted"], "beyond the best of their caption"),
        (counts["pairs"], f"pairs, of {counts['captions_with_pairs']} captions"),
    ]
    shown = [f"{n:10d}  {'  ' * (n < 0)}{what}" for n, what in lines]
    if counts["pairs"]:
        cost = (
            f"{counts['unet_samples_per_pair']:,} UNet samples, {counts['device_seconds_per_pair']:.2f} device-seconds"
        )
        shown.append(f"each pair cost {cost}")
    return "\n".join(shown)


def _counts(values: pa.Array) -> dict[str, int]:
    return {item["values"]: item["counts"] for item in pc.value_counts(values).to_pylist()}  # pyright: ignore
