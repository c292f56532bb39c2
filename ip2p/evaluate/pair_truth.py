"""How many generated pairs are right, and what attention sharing and the CLIP filter each have to do with it.

The workspace keeps images of accepted pairs alone, so a sample of captions is drawn again here: every candidate twice
from one seed, with attention sharing and without (then the two images have only their noise in common).
"""

import copy

import pyarrow as pa

from ip2p.evaluate.truth import judge
from ip2p.images import decode
from ip2p.miniature.triplets import edit_kind
from ip2p.pairs.filter import ACCEPTED, SURPLUS, best, quality, verdict
from ip2p.pairs.generate import PairGenerator
from ip2p.recipe import Recipe, Sharing, Thresholds
from ip2p.records import INSTRUCTIONS, SCORES, digest
from ip2p.workspace import Workspace

JUDGED = pa.struct(
    {
        "shared": pa.bool_(),
        **SCORES,
        "carried_out": pa.bool_(),
        "preserved": pa.bool_(),
        "valid": pa.bool_(),
        "success": pa.bool_(),
        "original_image": pa.binary(),
        "edited_image": pa.binary(),
    }
)
PAIR_TRUTH = pa.schema(
    {
        "caption_id": pa.string(),
        "original_prompt": pa.string(),
        "edit_prompt": pa.string(),
        "edited_prompt": pa.string(),
        "edit_kind": pa.string(),
        "candidates": pa.list_(JUDGED),
    }
)

EVERYTHING = Thresholds(image=-2, image_max=2, direction=-2, agreement=-2)
NO_SHARING = Sharing(self_attention=0, cross_attention=0)


def sample_captions(recipe: Recipe, workspace: Workspace) -> pa.Table:
    """The rows of `instructions/` to judge, `evaluate.pair_captions` of those with an instruction, by a hash."""
    table = workspace.read_table("instructions")
    ids, status = table["caption_id"].to_pylist(), table["status"].to_pylist()
    order = sorted((n for n in range(len(ids)) if status[n] == "ok"), key=lambda n: digest("pair truth", ids[n]))
    return table.take(order[: recipe.evaluate.pair_captions]).select(INSTRUCTIONS.names)


class PairTruth:
    """Draws the first candidates of captions, with and without attention sharing, and has the oracle judge them all."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        count = recipe.evaluate.pair_candidates
        # All candidates are kept, with their images; the recipe's own filter gives the verdicts afterwards.
        everything = {"thresholds": EVERYTHING, "quality": None, "adaptive": None, "early_look": None}
        drawn = recipe.pairs.model_copy(update={"candidates": count, "max_pairs": count, **everything})
        self.shared = PairGenerator(recipe.model_copy(update={"pairs": drawn}))
        self.plain = copy.copy(self.shared)
        self.plain.settings = drawn.model_copy(update={"sharing": NO_SHARING})

    def __call__(self, batch: pa.Table) -> pa.Table:
        """INSTRUCTIONS -> PAIR_TRUTH, one row for each row."""
        rows = batch.to_pylist()
        shared, plain = list(self.shared.generate(rows)), list(self.plain.generate(rows))
        judged = [
            {**row, "edit_kind": edit_kind(row["original_prompt"], row["edit_prompt"])}
            | {"candidates": self._judge(row, without["pairs"], False) + self._judge(row, with_["pairs"], True)}
            for row, with_, without in zip(rows, shared, plain, strict=True)
        ]
        return pa.Table.from_pylist(judged, schema=PAIR_TRUTH)

    def _judge(self, row: dict, pairs: list[dict], shared: bool) -> list[dict]:
        """The pairs of a caption with the recipe's verdict and the truth. Those not finite are left out: no image."""
        if not pairs:
            return []
        weights = self.recipe.pairs.quality
        pairs = [pair | {"quality": weights and quality(pair, weights)} for pair in pairs]
        images = [(decode(pair["original_image"]), decode(pair["edited_image"])) for pair in pairs]
        before, after = (list(side) for side in zip(*images, strict=True))
        truths = judge(before, [row["edit_prompt"]] * len(images), after)
        verdicts = [verdict(pair, self.recipe.pairs) for pair in pairs]
        passed = {n: pairs[n] for n, found in enumerate(verdicts) if found == ACCEPTED}
        for n in passed.keys() - set(best(passed, self.recipe.pairs.max_pairs)):
            verdicts[n] = SURPLUS
        names = ("carried_out", "preserved", "valid", "success")
        return [
            {**pair, "shared": shared, "verdict": found} | {name: getattr(truth, name) for name in names}
            for pair, truth, found in zip(pairs, truths, verdicts, strict=True)
        ]
