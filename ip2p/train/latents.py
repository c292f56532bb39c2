"""The encoded pairs on a worker's disk, mapped into memory, and which of them step n trains on.

Millions of pairs fit no memory; those that a step needs are read from the disk, and the workers of a machine share what
the system keeps of it.
"""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ip2p.errors import UserError
from ip2p.records import digest

INDEX = ["pair_id", "caption_id", "split", "status", "shape", "token_ids"]
LATENT_COLUMNS = ("image_latents", "target_latents")
ROWS_AT_ONCE = 256


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


def some_captions(caption_ids: Iterable[str], fraction: float, seed: int) -> set[str]:
    """A share of the captions, one at least; a smaller share of the same seed is a part of a larger one."""
    in_order = sorted(set(caption_ids), key=lambda id_: digest("fraction", seed, id_))
    return set(in_order[: max(1, round(fraction * len(in_order)))])


def write_local_cache(
    fs: pafs.FileSystem, paths: Sequence[str], split: str, folder: Path, fraction: float = 1.0, seed: int = 0
) -> None:
    """Write the `ok` rows of a split of `encode.LATENTS` files to a local `folder` that `LatentPairs` opens.

    Of all captions, or of a `fraction` of them, see `some_captions`.

    By caption and pair, because the order of files and blocks is not stable and the order of samples must be. A pair
    that is there twice counts once. Costs nothing when the folder is complete.

    Raises:
        ValueError: there is none.
    """
    if folder.exists():
        return
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # what a killed run left
    part.mkdir(parents=True)
    index = pa.concat_tables([pq.ParquetFile(fs.open_input_file(path)).read(columns=INDEX) for path in paths])
    index = index.filter((pc.field("split") == split) & (pc.field("status") == "ok"))
    index = index.sort_by([("caption_id", "ascending"), ("pair_id", "ascending")])
    ids = index["pair_id"].to_pylist()
    index = index.take(pa.array([n for n, id_ in enumerate(ids) if n == 0 or id_ != ids[n - 1]], pa.int64()))
    if fraction < 1:
        captions_kept = some_captions(index["caption_id"].to_pylist(), fraction, seed)
        index = index.filter(pc.field("caption_id").isin(sorted(captions_kept)))
    if not index.num_rows:
        raise UserError(f"no {split} pair: the dataset is empty or none of its images could be read")
    shapes = np.array(index["shape"].to_pylist())
    views, latent_shape = shapes[:, 0], tuple(shapes[0, 1:].tolist())
    assert (shapes[:, 1:] == latent_shape).all()
    first_view = dict(zip(index["pair_id"].to_pylist(), np.cumsum(views) - views, strict=True))
    for column in LATENT_COLUMNS:
        shape = (int(views.sum()), *latent_shape)
        latents = np.lib.format.open_memmap(part / f"{column}.npy", "w+", np.float16, shape)
        for id_, data in _values(fs, paths, split, column):
            if id_ in first_view:
                mine = np.frombuffer(data, np.float16).reshape(-1, *latent_shape)
                latents[first_view[id_] : first_view[id_] + len(mine)] = mine
        latents.flush()
    captions = [len(list(group)) for _, group in groupby(index["caption_id"].to_pylist())]
    token_ids = np.array(index["token_ids"].to_pylist(), np.int32)
    np.savez(part / "index.npz", views=views, pairs_of_captions=captions, token_ids=token_ids)
    part.rename(folder)


def _values(fs: pafs.FileSystem, paths: Sequence[str], split: str, column: str) -> Iterator[tuple[str, bytes]]:
    """(pair_id, value) of the `ok` rows of a split, a few rows in memory at a time."""
    for path in paths:
        columns = ["pair_id", "split", "status", column]
        for rows in pq.ParquetFile(fs.open_input_file(path)).iter_batches(ROWS_AT_ONCE, columns=columns):
            for row in rows.to_pylist():
                if row["split"] == split and row["status"] == "ok":
                    yield row["pair_id"], row[column]


class LatentPairs:
    """All pairs of a split; the pairs of a caption lie together, and so do the V views of a pair.

    `count` is how many samples make an epoch: the pairs, or the captions.
    """

    def __init__(self, folder: Path, one_per_caption: bool = False) -> None:
        """Open what `write_local_cache` wrote.

        Args:
            one_per_caption: a sample is any pair of a caption, not a certain pair.
        """
        with np.load(folder / "index.npz") as index:
            self.views = torch.from_numpy(index["views"])
            self.token_ids = torch.from_numpy(index["token_ids"]).long()
            pairs_of_captions = torch.from_numpy(index["pairs_of_captions"])
        self.pairs_of = pairs_of_captions if one_per_caption else torch.ones_like(self.views)  # of a sample
        self.first_pair = self.pairs_of.cumsum(0) - self.pairs_of
        self.first_view = self.views.cumsum(0) - self.views
        self.count = len(self.pairs_of)
        self.image_latents, self.target_latents = (
            np.load(folder / f"{column}.npy", mmap_mode="r") for column in LATENT_COLUMNS
        )
        self.latent_shape: tuple[int, ...] = self.target_latents.shape[1:]  # (C, h, w)

    def batch(self, indices: Tensor, u: Tensor) -> Batch:
        """The samples `indices` (B,) of an epoch; `u` (B,) uniform in [0, 1) picks a pair of each and its view."""
        u = u * self.pairs_of[indices]
        pair = self.first_pair[indices] + u.long()
        at = (self.first_view[pair] + (u % 1 * self.views[pair]).long()).numpy()
        image_latents, target_latents = (
            torch.from_numpy(latents[at]).float() for latents in (self.image_latents, self.target_latents)
        )
        return Batch(image_latents, target_latents, self.token_ids[pair])


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(digest("epoch", seed, epoch))
    return torch.randperm(count, generator=generator)


def share(step: int, batch_size: int, rank: int, world_size: int) -> range:
    """The places in the endless row of samples that a rank takes at `step`: every `world_size`-th of the batch."""
    return range(step * batch_size + rank, (step + 1) * batch_size, world_size)


def sample_indices(count: int, seed: int, places: range) -> Tensor:
    """Which of `count` samples stand in `places` of the endless row, (B,).

    Every epoch is a permutation of all samples and epochs follow one another without a gap. So the samples of a step
    depend on the seed and the step alone, however many ranks share them, and no rank sees another's.
    """
    return torch.stack([_permutation(seed, p // count, count)[p % count] for p in places])
