"""Which texts must not become pictures: a classifier of rude language, and words that name what is not to be shown."""

import re
from functools import cache

from ip2p.recipe import Unsafe

# Of what a picture shows, which the classifier does not know: "nude art" has 0.02 there, "hardcore porn scene" 0.12.
WORDS = (
    "naked nude nudity topless nsfw erotic erotica porn porno pornographic pornography hentai fetish bdsm sex "
    "sexual orgasm masturbating genitals penis vagina nipple cumshot blowjob gore gory dismembered decapitated "
    "beheaded mutilated corpse suicide lynching rape torture nazi swastika"
)


def unsafe(texts: list[str], settings: Unsafe) -> list[bool]:
    """Whether each text has one of `settings.words`, or the classifier (alt-profanity-check) gives it the score."""
    from profanity_check import predict_prob  # here: it brings scikit-learn, which few jobs need

    if not texts:
        return []
    named = _pattern(tuple(WORDS.split() if settings.words is None else settings.words))
    scores = predict_prob(texts)
    return [bool(named.search(text)) or score >= settings.score for text, score in zip(texts, scores, strict=True)]


@cache
def _pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    """Any of `words` as a whole word, in the plural too; without words it matches nothing."""
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})s?\b" if words else r"(?!)", re.IGNORECASE)
