import subprocess
import sys

import pyarrow as pa

from ip2p import records

PINNED_ID = "20a365b82f85f00b"
PINNED_SEED = 574313717261064749


def test_ids_and_seeds_are_the_same_in_every_process():
    code = "from ip2p.records import *; i = caption_id('a cat'); print(i, candidate_seed(0, i, 3), digest('a', 1))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    i = records.caption_id("a cat")
    assert outputs == {f"{i} {records.candidate_seed(0, i, 3)} {records.digest('a', 1)}\n"}


def test_ids_are_pinned():
    # A changed hash would orphan every checkpoint and workspace that exists.
    assert records.caption_id("a cat") == PINNED_ID
    assert records.candidate_seed(0, PINNED_ID, 3) == PINNED_SEED


def test_seeds_differ_by_run_caption_and_candidate_and_fit_a_generator():
    seeds = {
        records.candidate_seed(run, records.caption_id(caption), k)
        for run in range(3)
        for caption in ("a", "b", "c")
        for k in range(100)
    }
    assert len(seeds) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_parts_of_a_digest_are_kept_apart():
    assert records.digest("ab", "c") != records.digest("a", "bc")


def test_splits_have_their_sizes_and_only_grow():
    ids = [records.caption_id(str(i)) for i in range(5000)]
    splits = [records.split_of(i, 0.2, 0.1) for i in ids]
    assert abs(splits.count("test") / 5000 - 0.1) < 0.02
    assert abs(splits.count("validation") / 5000 - 0.2) < 0.02
    assert all(records.split_of(i, 0, 0) == "train" for i in ids)
    # A larger test split takes from the others and gives nothing back.
    assert all(records.split_of(i, 0.2, 0.3) == "test" for i, split in zip(ids, splits) if split == "test")


def test_rows_fit_the_schemas():
    score = dict.fromkeys(records.SCORES, 1) | {"verdict": "accepted", "sharing": "self"}
    row = {
        "caption_id": "x",
        "original_prompt": "a",
        "edit_prompt": "b",
        "edited_prompt": "c",
        "status": "ok",
        "reason": "",
        "candidates": [score, score],
        "pairs": [score | {"original_image": b"1", "edited_image": b"2"}],
        "rejects": [],
        "unet_samples": 3,
        "seconds": 0.5,
    }
    failed = row | {"status": "failed", "reason": "no pairs", "candidates": [], "pairs": []}
    table = pa.Table.from_pylist([row, failed], schema=records.PAIRS)
    assert table.to_pylist()[0]["pairs"][0]["edited_image"] == b"2"
    assert table.to_pylist()[1]["pairs"] == []
