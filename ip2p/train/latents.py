"""The encoded pairs in memory, and which of them step n trains on."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from ip2p.records import digest


@dataclass(frozen=True)
class Batch:
    """Conditionings and target of B samples."""

    image_latents: Tensor  # (B, C, h, w) not scaled
    target_latents: Tensor  # (B, C, h, w) scaled
    token_ids: Tensor  # (B, L)

    def to(self, device: str) -> "Batch":
        return Batch(self.image_latents.to(device), self.target_latents.to(device), self.token_ids.to(device))

    def __getitem__(self, rows: slice) -> "Batch":
        return Batch(self.image_latents[rows], self.target_latents[rows], self.token_ids[rows])


class LatentPairs:
    """All pairs of a split; the pairs of a caption lie together, and so do the V views of a pair.

    `count` is how many samples make an epoch: the pairs, or the captions.
    """

    def __init__(self, table: pa.Table, split: str, one_per_caption: bool = False) -> None:
        """Take the `ok` rows of a split from a table of `encode.LATENTS`.

        Args:
            one_per_caption: a sample is any pair of a caption, not a certain pair.

        Raises:
            ValueError: there is none.
        """
        # By id, because the order of files and blocks is not stable and the order of samples must be.
        table = table.filter((pc.field("split") == split) & (pc.field("status") == "ok"))
        rows = table.sort_by([("caption_id", "ascending"), ("pair_id", "ascending")]).to_pylist()
        if not rows:
            raise ValueError(f"no {split} pair: the dataset is empty or none of its images could be read")
        views = torch.tensor([row["shape"][0] for row in rows])
        names = [row["caption_id" if one_per_caption else "pair_id"] for row in rows]
        self.pairs_of = torch.tensor([len(list(group)) for _, group in groupby(names)])  # of each sample of an epoch
        self.first_pair = self.pairs_of.cumsum(0) - self.pairs_of
        self.count = len(self.pairs_of)
        self.first_view = views.cumsum(0) - views
        self.views = views
        self.token_ids = torch.tensor([row["token_ids"] for row in rows])
        self.image_latents = torch.cat([_unpack(row, "image_latents") for row in rows])
        self.target_latents = torch.cat([_unpack(row, "target_latents") for row in rows])

    def batch(self, indices: Tensor, u: Tensor) -> Batch:
        """The samples `indices` (B,) of an epoch; `u` (B,) uniform in [0, 1) picks a pair of each and its view."""
        u = u * self.pairs_of[indices]
        pair = self.first_pair[indices] + u.long()
        at = self.first_view[pair] + (u % 1 * self.views[pair]).long()
        return Batch(self.image_latents[at].float(), self.target_latents[at].float(), self.token_ids[pair])


def _unpack(row: dict, column: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(row[column], np.float16).reshape(row["shape"]).copy())


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(digest("epoch", seed, epoch))
    return torch.randperm(count, generator=generator)


def sample_indices(count: int, seed: int, step: int, rank: int, world_size: int, batch_size: int) -> Tensor:
    """Which of `count` pairs this rank trains on at `step`: its share of the step's `batch_size`, (B / world_size,).

    Every epoch is a permutation of all pairs and epochs follow one another without a gap, so the samples of a step
    depend on the seed and the step alone, and no rank sees another's.
    """
    assert batch_size % world_size == 0
    share = batch_size // world_size
    start = step * batch_size + rank * share
    positions = range(start, start + share)
    return torch.stack([_permutation(seed, p // count, count)[p % count] for p in positions])
