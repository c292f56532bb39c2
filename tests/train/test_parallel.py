"""Several ranks on this machine, by gloo, against one."""

import copy
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ip2p.recipe import Train
from ip2p.train.latents import LatentPairs
from ip2p.train.loop import train
from tests.train.test_loop import Recorder, fresh


def rank_of_several(rank, ranks, sd, pairs, recipe, state, rendezvous, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    record, looks = Recorder(), []
    validation = LatentPairs(pairs)
    state = copy.deepcopy(state)  # what is handed to processes is one memory, which each rank's Adam would write to
    train(
        fresh(sd),
        LatentPairs(pairs),
        recipe,
        seed=3,
        report=record,
        validation=validation,
        state=state,
        look=looks.append,
        rank=rank,
        world_size=ranks,
    )
    if rank == 0:
        states = {step: record.state(step) for step in record.states}
        torch.save({"metrics": record.metrics, "states": states, "looks": looks}, out)
    dist.destroy_process_group()


def by(ranks: int, sd: Path, pairs: Path, recipe: Train, state=None) -> dict:
    """What the first of so many ranks reports: {metrics, states, looks}."""
    with tempfile.TemporaryDirectory() as folder:
        rendezvous, out = Path(folder, "rendezvous"), Path(folder, "out.pt")
        arguments = (ranks, sd, pairs, recipe, state, rendezvous, out)
        mp.spawn(rank_of_several, arguments, nprocs=ranks)  # pyright: ignore[reportPrivateImportUsage]
        return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def short() -> Train:
    return Train(steps=4, batch_size=4, learning_rate=1e-3, checkpoint_every=2, resolution=64)


@pytest.fixture
def alone(tiny_sd, pairs, tmp_path, short) -> Recorder:
    record = Recorder()
    train(fresh(tiny_sd), pairs, short, seed=3, report=record, validation=pairs)
    return record


def assert_alike(found: dict, alone: Recorder, first: int = 0) -> None:
    for metrics, expected in zip(found["metrics"], alone.metrics[first:], strict=True):
        for name in ("step", "loss", "grad_norm", "validation_loss"):
            assert metrics[name] == pytest.approx(expected[name], rel=2e-3), name
    whole = alone.state(4)
    for key in ("unet", "ema"):
        ours, theirs = found["states"][4][key], whole[key]
        ours, theirs = (
            (ours["shadow_params"], theirs["shadow_params"]) if key == "ema" else (ours.values(), theirs.values())
        )
        for a, b in zip(ours, theirs, strict=True):
            assert a.shape == b.shape and torch.allclose(a, b, atol=5e-4)


@pytest.mark.slow
def test_ranks_that_change_on_the_way_are_as_one(tiny_sd, pairs, tmp_path, short, alone):
    """Three ranks, with two, one and one sample of a step; then one of them is lost; then one is alone."""
    folder = tmp_path / "pairs" / "train"
    three = by(3, tiny_sd, folder, short)
    assert_alike(three, alone)
    assert three["looks"] == [2, 4]
    assert_alike(by(2, tiny_sd, folder, short, three["states"][2]), alone, first=1)
    record = Recorder()
    train(fresh(tiny_sd), pairs, short, seed=3, report=record, validation=pairs, state=three["states"][2])
    assert_alike({"metrics": record.metrics, "states": {4: record.state(4)}}, alone, first=1)


@pytest.mark.parametrize("other", [{}, {"micro_batch": 1, "gradient_checkpointing": True}, {"lora_rank": 2}])
@pytest.mark.slow
def test_a_unet_in_parts_learns_what_a_whole_one_does(tiny_sd, pairs, tmp_path, short, other):
    """FSDP2 on two ranks; then one rank goes on with the whole of it, and two with parts from its checkpoint."""
    short = short.model_copy(update=other)
    alone = Recorder()
    train(fresh(tiny_sd), pairs, short, seed=3, report=alone, validation=pairs)
    folder = tmp_path / "pairs" / "train"
    sharded = short.model_copy(update={"parallel": "fsdp"})
    found = by(2, tiny_sd, folder, sharded)
    assert_alike(found, alone)
    if not other:
        assert_alike(by(2, tiny_sd, folder, sharded, alone.state(2)), alone, first=1)
        record = Recorder()
        train(fresh(tiny_sd), pairs, sharded, seed=3, report=record, validation=pairs, state=found["states"][2])
        assert_alike({"metrics": record.metrics, "states": {4: record.state(4)}}, alone, first=1)
