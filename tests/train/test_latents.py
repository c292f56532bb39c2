import pyarrow as pa
import pytest
import torch

from ip2p.train.encode import LATENTS
from ip2p.train.latents import LatentPairs, sample_indices


def test_an_epoch_shows_every_pair_once_over_all_ranks():
    seen = [
        sample_indices(count=30, seed=1, step=step, rank=rank, world_size=2, batch_size=6)
        for step in range(5)
        for rank in range(2)
    ]
    assert torch.cat(seen).sort().values.tolist() == list(range(30))


def test_the_samples_of_a_step_do_not_depend_on_the_number_of_ranks():
    alone = sample_indices(count=7, seed=1, step=11, rank=0, world_size=1, batch_size=6)
    shared = [sample_indices(count=7, seed=1, step=11, rank=rank, world_size=3, batch_size=6) for rank in range(3)]
    assert torch.equal(torch.cat(shared), alone)
    assert not torch.equal(alone, sample_indices(7, 2, 11, 0, 1, 6))


def test_views_and_tokens_stay_with_their_pair(pairs):
    indices = torch.tensor([1, 1, 2])
    batch = pairs.batch(indices, torch.tensor([0.0, 0.99, 0.99]))
    # Pair 0 has one view, pair 1 two, pair 2 one.
    for sample, view in enumerate([1, 2, 3]):
        assert torch.equal(batch.image_latents[sample], pairs.image_latents[view].float())
        assert torch.equal(batch.target_latents[sample], pairs.target_latents[view].float())
    assert torch.equal(batch.token_ids, pairs.token_ids[indices])


def test_failed_rows_are_left_out_and_none_at_all_is_refused():
    failed = {"pair_id": "a", "caption_id": "a", "split": "train", "status": "failed", "reason": "the image is empty"}
    with pytest.raises(ValueError, match="no train pair"):
        LatentPairs(pa.Table.from_pylist([failed], schema=LATENTS), "train")
