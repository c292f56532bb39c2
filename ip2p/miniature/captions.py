"""Captions of miniature scenes, drawn by the grammar."""

import random
from collections.abc import Iterator

from ip2p.errors import UserError
from ip2p.miniature.edits import EDIT_KINDS, PLACED_KINDS
from ip2p.miniature.triplets import draw_triplet
from ip2p.recipe import GrammarCaptions
from ip2p.records import digest


def grammar_captions(captions: GrammarCaptions, seed: int) -> Iterator[str]:
    """Yield distinct captions; every kind of edit is possible in an equal part of them.

    Many leave places or background unsaid. Scenes that are held out for evaluation are not drawn. Raises `UserError`
    when a kind needs places that no caption may say.
    """
    kinds = captions.kinds or EDIT_KINDS
    if not captions.say_places and (placed := [kind for kind in kinds if kind in PLACED_KINDS]):
        raise UserError(f"captions.say_places: false, but {', '.join(placed)} of captions.kinds needs to know places")
    seen: set[str] = set()
    attempt = 0
    while len(seen) < captions.count:
        kind = kinds[len(seen) % len(kinds)]
        drawn = draw_triplet(random.Random(digest("grammar", seed, attempt)), kind, held_out=False)
        attempt += 1
        if drawn.caption not in seen and (captions.say_places or "places" in drawn.unsaid):
            seen.add(drawn.caption)
            yield drawn.caption
