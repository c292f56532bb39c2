import pyarrow as pa

from ip2p.pairs.funnel import COLUMNS, funnel, show
from ip2p.records import PAIRS


def row(status, reason="", instruction="make it red", verdicts=()):
    candidates = [{"verdict": verdict} for verdict in verdicts]
    return {
        "status": status,
        "reason": reason,
        "edit_prompt": instruction,
        "candidates": candidates,
        "unet_samples": 10 * len(candidates),
        "seconds": 1.5 * len(candidates),
    }


def test_every_caption_and_candidate_is_counted_once():
    rows = [
        row("ok", verdicts=["accepted", "surplus", "image < 0.7", "direction < 0.2"]),
        row("ok", verdicts=["accepted", "accepted", "image < 0.7"]),
        row("rejected", "image < 0.7: 1", verdicts=["image < 0.7"]),
        row("rejected", "not json", instruction=""),
        row("failed", "engine died", instruction=""),
        row("failed", "ValueError: no"),
    ]
    table = pa.Table.from_pylist(rows, schema=PAIRS).select(COLUMNS)
    counts = funnel([*table.slice(0, 2).to_batches(), *table.slice(2).to_batches()])
    assert counts == {
        "captions": 6,
        "instructions": 4,
        "candidates": 8,
        "accepted": 4,
        "pairs": 3,
        "captions_with_pairs": 2,
        "failed": 1,
        "unet_samples": 80,
        "device_seconds": 12.0,
        "unet_samples_per_pair": 26.7,
        "device_seconds_per_pair": 4.0,
        "no_instruction": {"not json": 1, "engine died": 1},
        "not_accepted": {"image < 0.7": 3, "direction < 0.2": 1},
        "failures": {"ValueError: no": 1},
    }
    assert "3  pairs, of 2 captions" in show(counts)
    assert "each pair cost 26.7 UNet samples, 4.00 device-seconds" in show(counts)
    nothing = funnel([])
    assert (nothing["captions"], nothing["unet_samples_per_pair"]) == (0, None)
    assert "cost" not in show(nothing)


def test_a_rejection_with_a_text_but_no_candidate_came_without_an_instruction():
    table = pa.Table.from_pylist([row("rejected", "no change")], schema=PAIRS).select(COLUMNS)
    counts = funnel(table.to_batches())
    assert (counts["instructions"], counts["no_instruction"]) == (0, {"no change": 1})
