import json
import shutil
import time
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch

from ip2p import images
from ip2p.errors import DeviceError
from ip2p.pairs.candidates import draw_candidate
from ip2p.pairs.generate import PairGenerator
from ip2p.recipe import Adaptive, EarlyLook, LocalBlend, ModelRef, Quality, Recipe, Sharing, Thresholds
from ip2p.records import INSTRUCTIONS, PAIRS

ROWS = [
    ("a", "red dog", "make it blue", "blue dog", "ok", "", "colour", 1),
    ("b", "a tree", "", "", "rejected", "not json", "", 2),
    ("c", "a hat on a cat", "remove the hat", "a cat", "ok", "", "remove", 1),
    ("d", "one", "two", "one, two", "ok", "", "add", 1),
]


def batch(rows) -> pa.Table:
    """As Ray Data hands it over."""
    return pa.Table.from_pylist([dict(zip(INSTRUCTIONS.names, row)) for row in rows], schema=INSTRUCTIONS)


def run(generator: PairGenerator, rows: pa.Table) -> pa.Table:
    """All tables that the generator yields, as one."""
    return pa.concat_tables(generator(rows))


@pytest.fixture(scope="module")
def generator(smallest) -> PairGenerator:
    return PairGenerator(smallest)


def with_pairs(generator: PairGenerator, **changes) -> PairGenerator:
    """The same models with other settings."""
    other = object.__new__(PairGenerator)
    other.__dict__ = dict(generator.__dict__)
    other.settings = generator.settings.model_copy(update=changes)
    other.batch_size = other.settings.batch_size
    return other


@pytest.fixture(scope="module")
def table(generator):
    return run(generator, batch(ROWS))


def test_one_row_in_one_row_out(table, generator, smallest: Recipe):
    assert table.schema.equals(PAIRS)
    rows = table.to_pylist()
    assert [tuple(row[name] for name in INSTRUCTIONS.names) for row in rows] == ROWS
    nothing = {"candidates": [], "pairs": [], "rejects": [], "unet_samples": 0, "seconds": 0.0}
    assert rows[1] == dict(zip(INSTRUCTIONS.names, ROWS[1])) | nothing
    for row in (rows[0], rows[2], rows[3]):
        drawn = [draw_candidate(smallest.pairs, smallest.seed, row["caption_id"], k) for k in range(3)]
        assert [candidate["seed"] for candidate in row["candidates"]] == [candidate.seed for candidate in drawn]
        assert [c["guidance_scale"] for c in row["candidates"]] == [candidate.guidance_scale for candidate in drawn]
        assert sorted(c["verdict"] for c in row["candidates"]) == ["accepted", "accepted", "surplus"]
        assert [candidate["sharing"] for candidate in row["candidates"]] == ["refine"] * 3
        assert row["unet_samples"] == 3 * 2 * 2 * 2  # candidates, images, conditionings, steps
        assert row["seconds"] > 0


def test_the_best_pairs_are_kept_with_their_images(table):
    for row in (table.to_pylist()[i] for i in (0, 2, 3)):
        by_direction = sorted(row["candidates"], key=lambda candidate: -candidate["clip_sim_dir"])
        kept = [{**pair} for pair in row["pairs"]]
        for pair in kept:
            before, after = (images.decode(pair.pop(key)) for key in ("original_image", "edited_image"))
            assert pair.pop("mask") is None
            assert before.shape == after.shape == (64, 64, 3)
            assert (before != after).any()
        assert kept == by_direction[:2]


def test_a_row_does_not_depend_on_its_neighbours(table, generator):
    [alone] = run(with_pairs(generator, batch_size=1), batch(ROWS[2:3])).to_pylist()
    together = table.to_pylist()[2]
    for a, b in zip(alone["candidates"], together["candidates"]):
        assert a.pop("verdict") == b.pop("verdict")
        assert a == pytest.approx(b, abs=5e-3)  # a pixel may be rounded the other way
    for a, b in zip(alone["pairs"], together["pairs"]):
        difference = images.decode(a["edited_image"]).astype(int) - images.decode(b["edited_image"])
        assert np.abs(difference).max() <= 1


def test_nothing_accepted_is_rejected_with_counts(generator):
    strict = with_pairs(generator, thresholds=Thresholds(image=-1, direction=1, agreement=-1))
    [row] = run(strict, batch(ROWS[:1])).to_pylist()
    assert (row["status"], row["reason"], row["pairs"]) == ("rejected", "direction < 1: 3", [])
    assert len(row["candidates"]) == 3


def test_adaptive_draws_the_first_of_the_same_candidates_until_there_are_enough(table, generator):
    """Everything is accepted here: two pairs of two candidates, not of three."""
    adaptive = with_pairs(generator, adaptive=Adaptive(round=1))
    rows = run(adaptive, batch(ROWS)).to_pylist()
    for row, fixed in zip(rows, table.to_pylist()):
        assert [c["seed"] for c in row["candidates"]] == [c["seed"] for c in fixed["candidates"]][:2]
        assert row["unet_samples"] == 8 * len(row["candidates"])
        assert len(row["pairs"]) == len(row["candidates"])
    [alone] = run(with_pairs(adaptive, batch_size=1), batch(ROWS[2:3])).to_pylist()
    assert [c["seed"] for c in alone["candidates"]] == [c["seed"] for c in rows[2]["candidates"]]


@pytest.mark.parametrize(
    ("config", "changes", "calls"),
    [
        ({"prediction_type": "v_prediction"}, {"steps": 3, "solver": "ddim"}, 2 * 3),
        # Distilled models: few steps, trailing timesteps, and no guidance, which costs half.
        ({"timestep_spacing": "trailing"}, {"steps": 4, "solver": "euler", "guidance_scale": (1.0, 1.0)}, 4),
    ],
)
def test_other_kinds_of_model_run_by_the_recipe_alone(smallest: Recipe, tiny_sd, tmp_path, config, changes, calls):
    shutil.copytree(tiny_sd, tmp_path / "sd")
    file = tmp_path / "sd" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    models = smallest.models.model_copy(update={"text_to_image": ModelRef(path=str(tmp_path / "sd"))})
    pairs = smallest.pairs.model_copy(update=changes)
    other = PairGenerator(smallest.model_copy(update={"models": models, "pairs": pairs}))
    [row] = run(other, batch(ROWS[:1])).to_pylist()
    assert row["status"] == "ok"
    assert row["unet_samples"] == 3 * 2 * calls  # candidates, images


def test_an_early_look_ends_hopeless_candidates_part_way(table, generator):
    """Quality rises with direction; at a level between those seen part-way some are dropped, after one step of two."""
    measure = Quality(intercept=0, image=0, direction=5, agreement_before=0, agreement_after=0, at_least=0)
    everything = with_pairs(generator, quality=measure, early_look=EarlyLook(at=0.5, drop_below=0))
    whole = run(everything, batch(ROWS)).to_pylist()
    assert [row["unet_samples"] for row in whole] == [row["unet_samples"] for row in table.to_pylist()]

    nothing = with_pairs(generator, quality=measure, early_look=EarlyLook(at=0.5, drop_below=1))
    [row] = run(nothing, batch(ROWS[:1])).to_pylist()
    assert (row["status"], row["reason"]) == ("rejected", "early quality < 1: 3")
    assert row["unet_samples"] == 3 * 2 * 2 * 1  # candidates, images, conditionings, steps
    early = sorted(candidate["quality"] for candidate in row["candidates"])
    # What was dropped calls for more, as what was judged does.
    rounds = with_pairs(nothing, adaptive=Adaptive(round=1, give_up_below=0))
    in_rounds = run(rounds, batch(ROWS[:1])).to_pylist()
    assert in_rounds[0]["reason"] == "early quality < 1: 3"

    level = (early[0] + early[1]) / 2
    some = with_pairs(everything, early_look=EarlyLook(at=0.5, drop_below=level))
    rows = run(some, batch(ROWS)).to_pylist()
    assert Counter(c["verdict"] for c in rows[0]["candidates"]) == {"accepted": 2, f"early quality < {level:g}": 1}
    assert rows[0]["unet_samples"] == (2 + 1 + 2) * 2 * 2
    for candidate, finished in zip(rows[0]["candidates"], whole[0]["candidates"]):
        assert (candidate["quality"] == pytest.approx(finished["quality"], abs=5e-3)) == (
            candidate["verdict"] == "accepted"
        )
    [alone] = run(with_pairs(some, batch_size=1), batch(ROWS[2:3])).to_pylist()
    assert [c["verdict"] for c in alone["candidates"]] == [c["verdict"] for c in rows[2]["candidates"]]


def test_adaptive_gives_a_hopeless_caption_up(generator):
    strict = Thresholds(image=-1, direction=1, agreement=-1)
    hopeless = with_pairs(generator, thresholds=strict, adaptive=Adaptive(round=1, give_up_below=0.4))
    [row] = run(hopeless, batch(ROWS[:1])).to_pylist()
    assert (row["status"], row["reason"]) == ("rejected", "direction < 1: 1")


def test_the_first_mode_that_applies_is_taken_and_recorded(generator):
    rows = batch([("a", "red dog", "paint it", "tan dog", "ok", ""), ROWS[2]])
    for modes, expected in ((["replace", "refine"], ["replace", "refine"]), (["self"], ["self", "self"])):
        table = run(with_pairs(generator, sharing=Sharing(modes=modes)), rows)
        assert [row["candidates"][0]["sharing"] for row in table.to_pylist()] == expected


def test_local_blend_writes_the_mask_of_what_may_differ(generator):
    sharing = Sharing(modes=["refine"], blend=LocalBlend(threshold=0.98, start=0))
    blending = with_pairs(generator, sharing=sharing, keep_rejects=1)
    [row] = run(blending, batch(ROWS[:1])).to_pylist()
    assert row["pairs"]
    for pair in row["pairs"]:
        mask = images.decode(pair["mask"])
        assert mask.shape == (64, 64, 3)
        assert set(np.unique(mask)) == {0, 255}
    ids = generator.model.tokenizer(["a dog", "a dog on ice"], padding="max_length", max_length=77).input_ids
    blend = with_pairs(generator, sharing=sharing)._sharing(*ids).blend
    assert not blend.source_tokens.any() and blend.edited_tokens.any(), "only the edited caption has words of its own"
    # Where no word differs there is nothing to blend by. The direction is 0 then, and nothing is accepted.
    strict = with_pairs(blending, thresholds=Thresholds(image=-1, image_max=2, direction=0.5, agreement=-1))
    [row] = run(strict, batch([("e", "a dog", "it", "a dog", "ok", "")])).to_pylist()
    assert row["reason"] == "direction < 0.5: 3"
    assert [reject["mask"] for reject in row["rejects"]] == [None, None]


def test_emphasis_changes_the_edited_image_alone(table, generator):
    loud = with_pairs(generator, sharing=Sharing(modes=["replace", "refine"], emphasis=4))
    row, plain = run(loud, batch(ROWS[:1])).to_pylist()[0], table.to_pylist()[0]
    by_seed = {pair["seed"]: pair for pair in plain["pairs"]}
    both = [(pair, by_seed[pair["seed"]]) for pair in row["pairs"] if pair["seed"] in by_seed]
    assert both
    for a, b in both:
        before, after = (
            np.abs(images.decode(a[key]).astype(int) - images.decode(b[key])).max()
            for key in ("original_image", "edited_image")
        )
        assert before <= 1 < after


def test_rejects_of_some_captions_are_kept_to_look_at(generator):
    strict = with_pairs(generator, thresholds=Thresholds(image=-1, direction=1, agreement=-1), keep_rejects=1)
    [row] = run(strict, batch(ROWS[:1])).to_pylist()
    assert row["pairs"] == []
    assert [{**reject, "original_image": 0, "edited_image": 0, "mask": 0} for reject in row["rejects"]] == [
        {**candidate, "original_image": 0, "edited_image": 0, "mask": 0} for candidate in row["candidates"][:2]
    ]
    assert images.decode(row["rejects"][0]["edited_image"]).shape == (64, 64, 3)
    [row] = run(with_pairs(strict, keep_rejects=0), batch(ROWS[:1])).to_pylist()
    assert row["rejects"] == []


def test_a_batch_without_work_passes_through(generator):
    refused = ("y", "red dog", "", "", "rejected", "too long")
    [row] = run(generator, batch([refused])).to_pylist()
    assert (row["status"], row["reason"], row["candidates"], row["pairs"]) == ("rejected", "too long", [], [])


def test_a_row_that_raises_is_failed_and_leaves_its_neighbours_alone(table, generator):
    broken = ("x", None, "make it blue", "blue dog", "ok", "")
    rows = run(generator, batch([ROWS[0], broken])).to_pylist()
    assert rows[1]["status"] == "failed" and rows[1]["reason"].split(":")[0] in ("TypeError", "ValueError")
    assert rows[1]["candidates"] == [] and rows[1]["edit_prompt"] == "make it blue"
    expected = table.to_pylist()[0]
    assert (rows[0]["status"], len(rows[0]["pairs"])) == (expected["status"], len(expected["pairs"]))
    assert rows[0]["candidates"][0]["clip_sim_0"] == pytest.approx(expected["candidates"][0]["clip_sim_0"], abs=1e-4)


def test_out_of_memory_halves_the_batch_and_goes_on(table, generator, monkeypatch):
    other = with_pairs(generator, batch_size=4)
    sizes = []

    def forward(sample, *args, **kwargs):
        sizes.append(len(sample))
        if len(sample) > 8:  # two pairs, both prompts, with and without text
            raise torch.OutOfMemoryError("CUDA out of memory")
        return unet(sample, *args, **kwargs)

    unet = generator.model.unet.forward
    monkeypatch.setattr(generator.model.unet, "forward", forward)
    rows = run(other, batch(ROWS)).to_pylist()
    assert sizes[0] == 16 and max(sizes[1:]) == 8
    assert other.batch_size == 2
    assert [row["status"] for row in rows] == [row["status"] for row in table.to_pylist()]
    for row, expected in zip(rows, table.to_pylist()):
        for a, b in zip(row["candidates"], expected["candidates"]):
            assert a["clip_sim_dir"] == pytest.approx(b["clip_sim_dir"], abs=5e-3)


def test_when_no_row_can_be_done_it_is_not_their_fault(generator):
    other = with_pairs(generator)
    other.shape = (5, 8, 8)  # latents that this UNet doesn't take
    with pytest.raises(RuntimeError):
        run(other, batch(ROWS[2:]))


def test_latents_that_are_not_finite_get_a_verdict(generator, monkeypatch):
    text = generator.model.encode_text
    hurt = {"blue dog": torch.nan}

    def encode_text(prompts):
        return torch.stack([row * hurt.get(prompt, 1.0) for prompt, row in zip(prompts, text(prompts))])

    monkeypatch.setattr(generator.model, "encode_text", encode_text)
    rows = run(generator, batch([ROWS[0], ROWS[3]])).to_pylist()
    assert (rows[0]["status"], rows[0]["reason"]) == ("rejected", "not finite: 3")
    assert rows[1]["status"] == "ok"


def test_rows_leave_in_order_as_soon_as_they_are_done(generator, monkeypatch):
    """The first row is out when the engine has done little more than its samples."""
    one_by_one = with_pairs(generator, batch_size=1, steps=4)
    calls = []

    def forward(sample, *args, **kwargs):
        calls.append(len(sample))
        return unet(sample, *args, **kwargs)

    unet = generator.model.unet.forward
    monkeypatch.setattr(generator.model.unet, "forward", forward)
    seen = [(table["caption_id"].to_pylist(), sum(calls)) for table in one_by_one(batch(ROWS))]
    assert [ids for ids, _ in seen] == [["a"], ["b"], ["c"], ["d"]]
    whole = sum(calls)
    # A third for each of the three rows that the model is asked for.
    assert [samples / whole for _, samples in seen] == pytest.approx([1 / 3, 1 / 3, 2 / 3, 1])


def test_rounds_of_earlier_rows_come_before_later_rows(generator):
    """An adaptive row that needs a second round does not wait for all the others."""
    adaptive = with_pairs(generator, batch_size=1, adaptive=Adaptive(round=1))
    results = adaptive.generate([dict(zip(INSTRUCTIONS.names, row)) for row in (ROWS[0], ROWS[2], ROWS[3])])
    started = []
    start = adaptive._start
    adaptive._start = lambda work, k, candidate: started.append((work.position, k)) or start(work, k, candidate)
    assert len(list(results)) == 3
    assert started == sorted(started)


def test_seconds_of_rows_add_up_and_leave_waiting_out(generator):
    started, waited = time.perf_counter(), 0.0
    seconds = []
    for table in generator(batch(ROWS)):
        seconds += table["seconds"].to_pylist()
        time.sleep(0.3)
        waited += 0.3
    assert sum(seconds) <= time.perf_counter() - started - waited + 0.01
    assert min(seconds[0], *seconds[2:]) > 0 and seconds[1] == 0


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: uncorrectable ECC error encountered\nCompile with TORCH_USE_CUDA_DSA"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    ],
)
def test_a_broken_device_is_no_rows_fault(generator, monkeypatch, error):
    """Not in a batch, and not with a row alone."""

    def forward(*args, **kwargs):
        raise error

    monkeypatch.setattr(generator.model.unet, "forward", forward)
    for rows in (ROWS, ROWS[:1]):
        with pytest.raises(DeviceError, match=str(error).splitlines()[0]):
            run(generator, batch(rows))


def test_a_device_that_is_broken_from_the_start(smallest, monkeypatch):
    def load(*_):
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")

    monkeypatch.setattr("ip2p.pairs.generate.load_clip", load)
    with pytest.raises(DeviceError, match="busy or unavailable"):
        PairGenerator(smallest)


def test_a_row_too_large_for_the_memory_is_failed(generator, monkeypatch):
    """It does not break the device: the process works on."""

    def forward(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA error: out of memory")

    monkeypatch.setattr(generator.model.unet, "forward", forward)
    [row] = run(with_pairs(generator, batch_size=1), batch(ROWS[:1])).to_pylist()
    assert (row["status"], row["reason"]) == ("failed", "OutOfMemoryError: CUDA error: out of memory")


def test_a_row_of_one_that_raises_otherwise_is_failed(generator, monkeypatch):
    def forward(*args, **kwargs):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(generator.model.unet, "forward", forward)
    [row] = run(generator, batch(ROWS[:1])).to_pylist()
    assert (row["status"], row["reason"]) == ("failed", "RuntimeError: shapes cannot be multiplied")


def test_rows_out_before_a_failure_stay_and_the_others_are_tried(generator):
    """The batch breaks after its first row; alone, the second fails and the third can be done."""

    class Failing(PairGenerator):
        def generate(self, rows):
            for n, row in enumerate(rows):
                if row["caption_id"] == "c" or (n and row["caption_id"] == "d"):
                    raise ValueError("bad luck")
                yield {"status": "rejected", "reason": "x", "unet_samples": len(rows)}

    failing = object.__new__(Failing)
    failing.__dict__ = dict(generator.__dict__)
    rows = run(failing, batch(ROWS)).to_pylist()
    assert [(row["caption_id"], row["status"], row["unet_samples"]) for row in rows] == [
        ("a", "rejected", 3), ("b", "rejected", 0), ("c", "failed", 0), ("d", "rejected", 1)
    ]  # fmt: skip


def test_image_size_must_fit_the_vae(smallest: Recipe):
    recipe = smallest.model_copy(update={"pairs": smallest.pairs.model_copy(update={"height": 60})})
    with pytest.raises(ValueError, match="60x64"):
        PairGenerator(recipe)
