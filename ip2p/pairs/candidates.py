"""What is drawn at random for a candidate: everything follows from its seed."""

from dataclasses import dataclass

import numpy as np
import torch

from ip2p.recipe import Pairs
from ip2p.records import candidate_seed


@dataclass(frozen=True)
class Candidate:
    """One attempt at a pair. `shared_attention_fraction` is the paper's p; both numbers are exact in float32."""

    seed: int
    shared_attention_fraction: float
    guidance_scale: float

    def generator(self) -> torch.Generator:
        """For the noise, on the CPU: the same on every device."""
        return torch.Generator().manual_seed(self.seed)


def draw_candidate(settings: Pairs, run_seed: int, caption_id: str, k: int) -> Candidate:
    """Candidate `k` of a caption: the same whenever, wherever and beside whatever it is drawn."""
    seed = candidate_seed(run_seed, caption_id, k)
    rng = np.random.default_rng(seed)
    fraction, guidance_scale = (
        float(np.float32(rng.uniform(low, high)))
        for low, high in (settings.shared_attention_fraction, settings.guidance_scale)
    )
    return Candidate(seed, fraction, guidance_scale)
