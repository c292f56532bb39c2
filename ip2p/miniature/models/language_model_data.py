"""What the miniature language model is trained on: triplets of the world, worded so that little has to be guessed."""

import random
import re
from functools import lru_cache
from itertools import combinations

from ip2p.miniature.edits import EDIT_KINDS
from ip2p.miniature.instructions import phrase
from ip2p.miniature.language import MEANINGS, article, split_words
from ip2p.miniature.scene import Scene
from ip2p.miniature.triplets import Triplet, draw_triplet

# Of the scenes, at least. What is wrong in the end are mostly twins, so there are more of them from a step on.
CONFUSABLE, LATE_CONFUSABLE, CONFUSABLE_AT = 0.5, 0.75, 30_000
BATCH_SIZE = 32
COPY_STEPS = 300
POOLED_STEPS = 4
# From this step on things are named in all the ways there are: an editor trained on the answers must know them all.
VARIED_AT, IN_FULL = 27_000, 0.3
COPIED_ATTRIBUTES = ("shape", "shapes", "colour", "size", "background")
Texts = tuple[str, str, str]  # caption, instruction, edited caption


def same_words(caption: str, instruction: str, edited_caption: str) -> str:
    """Return the instruction with its synonyms replaced by the captions' words: "paint the scarlet star azure" becomes
    "paint the red star blue" where the captions say red and blue.

    The meaning stays, all words stay as frequent as they were, and what could only be guessed can be copied.
    """
    said = {MEANINGS[word]: word for word in split_words(f"{edited_caption} {caption}") if word in MEANINGS}
    words = [
        said.get(MEANINGS[word], word) if MEANINGS.get(word, ("",))[0] in COPIED_ATTRIBUTES else word
        for word in instruction.split()
    ]
    return re.sub(r"\ban? (?=(\w+))", lambda match: f"{article(match[1])} ", " ".join(words))


def confusable(scene: Scene) -> bool:
    """Whether two things differ in one attribute at most: what an instruction says of one may mean the other."""
    looks = [(thing.shape, thing.colour, thing.size) for thing in scene.things]
    return any(sum(a != b for a, b in zip(*pair, strict=True)) <= 1 for pair in combinations(looks, 2))


def _draw_triplet(rng: random.Random, share: float) -> Triplet:
    """`share` of the scenes, at least, hold things that are easily confused."""
    kind, unseen, confuses = rng.choice(EDIT_KINDS), rng.random() < 0.2, rng.random() < share
    while True:
        triplet = draw_triplet(rng, kind, unseen=unseen, held_out=False)
        if confuses <= confusable(triplet.scene):
            return triplet


def draw_rows(seed: int, step: int, words: list[str]) -> list[Texts]:
    """Draw the batch of a step. Batches are cut from a pool sorted by length, so that little of them is padding."""
    group, part = divmod(step, POOLED_STEPS)
    rows = _draw_pool(seed, group, tuple(words))
    order = random.Random(f"order/{seed}/{group}").sample(range(POOLED_STEPS), POOLED_STEPS)
    return rows[order[part] * BATCH_SIZE :][:BATCH_SIZE]


@lru_cache(maxsize=1)
def _draw_pool(seed: int, group: int, words: tuple[str, ...]) -> list[Texts]:
    """Draw (caption, instruction, edited caption): triplets of the world, or random words with nothing edited."""
    rng = random.Random(f"{seed}/{group}")
    first_step = group * POOLED_STEPS
    copying = first_step < COPY_STEPS
    share = CONFUSABLE if first_step < CONFUSABLE_AT else LATE_CONFUSABLE
    rows: list[Texts] = []
    for _ in range(POOLED_STEPS * BATCH_SIZE):
        if copying:
            caption = " ".join(rng.choices(words, k=rng.randint(4, 24)))
            rows.append((caption, " ".join(rng.choices(words, k=rng.randint(1, 4))), caption))
        else:
            # Captions come in any wording, as people's do; what it writes itself is in the wordings of training.
            triplet = _draw_triplet(rng, share)
            # Which thing is meant is the hardest part: named in full, it can be copied and is seldom ambiguous.
            in_full = first_step < VARIED_AT or rng.random() < IN_FULL
            said = phrase(triplet.edit, triplet.scene, rng, unsaid=triplet.unsaid, in_full=in_full)
            instruction = same_words(triplet.caption, said, triplet.edited_caption)
            rows.append((triplet.caption, instruction, triplet.edited_caption))
    return sorted(rows, key=lambda row: sum(len(text.split()) for text in row))
