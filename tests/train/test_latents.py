import numpy as np
import pytest
import torch

from ip2p.train.encode import token_ids
from ip2p.train.latents import sample_indices, share
from tests.train.conftest import open_pairs, row


def test_an_epoch_shows_every_pair_once_over_all_ranks():
    seen = [sample_indices(30, 1, share(step, 6, rank, 2)) for step in range(5) for rank in range(2)]
    assert torch.cat(seen).sort().values.tolist() == list(range(30))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_samples_of_a_step_do_not_depend_on_the_number_of_ranks(ranks):
    alone = sample_indices(7, 1, share(11, 6, 0, 1))
    shared = [sample_indices(7, 1, share(11, 6, rank, ranks)) for rank in range(ranks)]
    assert torch.equal(torch.cat(shared).sort().values, alone.sort().values)
    assert not torch.equal(alone, sample_indices(7, 2, share(11, 6, 0, 1)))


def test_a_share_of_the_captions_with_all_their_pairs(base, tmp_path):
    latents = np.ones((1, 4, 8, 8), np.float16)
    ids = token_ids(base, "a").tolist()
    rows = [
        row(f"{caption}-{k}", ids, caption * latents, latents) | {"caption_id": str(caption)}
        for caption in range(20)
        for k in range(2)
    ]
    seen = {}
    for fraction, seed in ((0.1, 0), (0.5, 0), (0.5, 1), (0.001, 0)):
        pairs = open_pairs(rows, tmp_path / f"{fraction}-{seed}", fraction=fraction, seed=seed)
        assert pairs.count == 2 * max(1, 20 * fraction)
        seen[fraction, seed] = set(
            pairs.batch(torch.arange(pairs.count), torch.zeros(pairs.count)).image_latents[:, 0, 0, 0].tolist()
        )
        assert len(seen[fraction, seed]) == pairs.count / 2, "captions are whole"
    assert seen[0.001, 0] < seen[0.1, 0] < seen[0.5, 0] != seen[0.5, 1]


def test_views_and_tokens_stay_with_their_pair(pairs):
    indices = torch.tensor([1, 1, 2])
    batch = pairs.batch(indices, torch.tensor([0.0, 0.99, 0.99]))
    # Pair 0 has one view, pair 1 two, pair 2 one.
    for sample, view in enumerate([1, 2, 3]):
        assert torch.equal(batch.image_latents[sample], torch.tensor(pairs.image_latents[view]).float())
        assert torch.equal(batch.target_latents[sample], torch.tensor(pairs.target_latents[view]).float())
    assert torch.equal(batch.token_ids, pairs.token_ids[indices])


def test_a_sample_may_be_any_pair_of_its_caption(base, tmp_path):
    """Captions with 1, 2 and 3 pairs; the last one's pairs have two views."""
    rows = []
    for caption in range(3):
        for k in range(caption + 1):
            latents = np.full((2 if caption == 2 else 1, 4, 8, 8), 10 * caption + k, np.float16)
            latents[1:] += 0.5
            ids = token_ids(base, f"{caption} {k}").tolist()
            rows.append(row(f"{caption}-{k}", ids, latents, latents) | {"caption_id": str(caption)})
    pairs = open_pairs(rows[::-1], tmp_path / "pairs", one_per_caption=True)
    assert pairs.count == 3
    u = torch.linspace(0, 0.999, 60)
    for caption, expected in enumerate(([0.0], [10.0, 11.0], [20.0, 20.5, 21.0, 21.5, 22.0, 22.5])):
        batch = pairs.batch(torch.full((60,), caption), u)
        seen = batch.image_latents[:, 0, 0, 0]
        assert seen.unique().tolist() == expected
        assert seen.unique(return_counts=True)[1].float().std(unbiased=False) < 1, "all alike often"
        for k, ids in zip((seen - 10 * caption).long().tolist(), batch.token_ids, strict=True):
            assert torch.equal(ids, token_ids(base, f"{caption} {k}"))


def test_a_pair_that_is_there_twice_counts_once_and_others_are_left_out(base, tmp_path):
    latents = np.ones((1, 4, 8, 8), np.float16)
    rows = [row(name, token_ids(base, name).tolist(), k * latents, latents) for k, name in enumerate("abcab")]
    rows[2] |= {"status": "failed", "image_latents": None, "target_latents": None, "shape": None, "token_ids": None}
    rows += [rows[0] | {"pair_id": "d", "split": "validation"}]
    pairs = open_pairs(rows, tmp_path / "pairs")
    assert pairs.count == 2
    assert torch.equal(pairs.batch(torch.tensor([0, 1]), torch.zeros(2)).token_ids[0], token_ids(base, "a"))


def test_a_layout_that_was_killed_is_made_anew_and_a_whole_one_is_kept(base, tmp_path):
    rows = [row("a", token_ids(base, "a").tolist(), *np.ones((2, 1, 4, 8, 8), np.float16))]
    (tmp_path / "pairs" / "train.part").mkdir(parents=True)
    (tmp_path / "pairs" / "train.part" / "image_latents.npy").write_text("half")
    assert open_pairs(rows, tmp_path / "pairs").count == 1
    assert open_pairs([], tmp_path / "pairs").count == 1


def test_none_at_all_is_refused(tmp_path):
    failed = {"pair_id": "a", "caption_id": "a", "split": "train", "status": "failed", "reason": "the image is empty"}
    with pytest.raises(ValueError, match="no train pair"):
        open_pairs([failed], tmp_path / "pairs")
