"""The columns of every dataset of a workspace, and stable ids and seeds.

One caption in, one row out, always: every stage writes exactly one row for every input row, with `status` and
`reason`. What fans out (candidates, pairs) is a list inside the row, so that a checkpoint by `caption_id` can neither
lose nor double anything.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

Status = Literal["ok", "rejected", "failed"]

# refusal: why the language model is not asked, and the reason of the row in instructions/; "" where it is.
CAPTIONS = pa.schema({"caption_id": pa.string(), "caption": pa.string(), "refusal": pa.string()})

INSTRUCTIONS = pa.schema(
    {
        "caption_id": pa.string(),
        "original_prompt": pa.string(),
        "edit_prompt": pa.string(),
        "edited_prompt": pa.string(),
        "status": pa.string(),
        "reason": pa.string(),
        "edit_type": pa.string(),  # as the model named it, or the miniature's grammar; "" where nobody can say
        "attempts": pa.int32(),  # how often the model was asked, each time with another seed
    }
)

SCORES = {
    "seed": pa.int64(),
    "shared_attention_fraction": pa.float32(),
    "guidance_scale": pa.float32(),
    "sharing": pa.string(),  # the mode, see recipe.Sharing
    "clip_sim_0": pa.float32(),
    "clip_sim_1": pa.float32(),
    "clip_sim_dir": pa.float32(),
    "clip_sim_image": pa.float32(),
    "quality": pa.float32(),  # null where the recipe has no `pairs.quality`
    "verdict": pa.string(),
}
CANDIDATE = pa.struct(SCORES)
# mask: white where the edited image may differ from the original; null without `pairs.sharing.blend`.
PAIR = pa.struct({**SCORES, "original_image": pa.binary(), "edited_image": pa.binary(), "mask": pa.binary()})

PAIRS = pa.schema(
    [
        *INSTRUCTIONS,
        pa.field("candidates", pa.list_(CANDIDATE)),
        pa.field("pairs", pa.list_(PAIR)),
        pa.field("rejects", pa.list_(PAIR)),  # of a few captions, to look at: `pairs.keep_rejects`
        pa.field("unet_samples", pa.int64()),
        pa.field("seconds", pa.float64()),
    ]
)

# The columns of timbrooks/instructpix2pix-clip-filtered first, our provenance beside them.
IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
DATASET = pa.schema(
    {
        "original_prompt": pa.string(),
        "original_image": IMAGE,
        "edit_prompt": pa.string(),
        "edited_prompt": pa.string(),
        "edited_image": IMAGE,
        "pair_id": pa.string(),
        "caption_id": pa.string(),
        "edit_type": pa.string(),
        "seed": pa.int64(),
        "shared_attention_fraction": pa.float32(),
        "guidance_scale": pa.float32(),
        "sharing": pa.string(),
        "clip_sim_0": pa.float32(),
        "clip_sim_1": pa.float32(),
        "clip_sim_dir": pa.float32(),
        "clip_sim_image": pa.float32(),
        "quality": pa.float32(),
        "mask": IMAGE,
    }
)

# What people thought of edits that were served: feedback/. Image ids are hashes of pixels.
FEEDBACK = pa.schema(
    {
        "edit_id": pa.string(),
        "source_id": pa.string(),
        "result_id": pa.string(),
        "instruction": pa.string(),
        "negative_prompt": pa.string(),
        "guidance_scale": pa.float32(),
        "image_guidance_scale": pa.float32(),
        "steps": pa.int32(),
        "seed": pa.int64(),
        "solver": pa.string(),
        "model": pa.string(),
        "client": pa.string(),  # name of the key that asked for the edit
        "choice": pa.string(),  # up or down
        "comment": pa.string(),
        "time": pa.timestamp("ms", tz="UTC"),
    }
)


@dataclass(frozen=True)
class Answer:
    """The answer of a language model: its text, or why there is none.

    Attributes:
        text: as the model wrote it.
        cut: whether the model was stopped before it had finished.
        error: why there is no text, "" where there is one.
    """

    text: str = ""
    cut: bool = False
    error: str = ""


def digest(*parts: str | int) -> int:
    """A stable 63-bit hash of `parts`: the same on every machine and in every process."""
    data = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


def caption_id(caption: str) -> str:
    """Content hash of a caption, 16 hex digits."""
    return f"{digest('caption', caption):016x}"


def candidate_seed(run_seed: int, caption_id: str, k: int) -> int:
    """Seed of candidate `k`: independent of batch neighbours, worker and order."""
    return digest("candidate", run_seed, caption_id, k)


def split_of(caption_id: str, validation_fraction: float, test_fraction: float) -> str:
    """`train`, `validation` or `test`, by caption id: all pairs of a caption fall on one side."""
    u = digest("split", caption_id) / 2**63
    if u < test_fraction:
        return "test"
    return "validation" if u < test_fraction + validation_fraction else "train"
