"""Which captions are not worth the language model's time, and why."""

import html
import re
import unicodedata
from functools import cache
from itertools import pairwise

from py3langid.langid import MODEL_FILE, LanguageIdentifier

# Tags by name: "<3" is no markup, and neither is the <PERSON> that published caption sets put for names.
TAGS = (
    "a abbr article aside audio b big blockquote body br button center code dd div dl dt em embed font footer form h1 "
    "h2 h3 h4 h5 h6 head header hr html i iframe img input label li link main meta nav object ol option p param pre s "
    "script section select small source span strong strike style sub sup svg table tbody td textarea th thead title tr "
    "tt u ul video"
)
MARKUP = re.compile(rf"</?(?:{'|'.join(TAGS.split())})(?:\s[^<>]*)?/?>|<!--|<!doctype\b", re.IGNORECASE)
ENTITY = re.compile(r"&#?\w{1,31};")
# Besides characters of control: what reorders the text around it, and tags, which are invisible and can spell a text.
INVISIBLE = re.compile("[\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]")
FILE = r"\S*\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|heic|raw|psd|pdf|mp4|mov)"
CAMERA = r"(?:img|dsc[nf]?|pict|pxl|mvimg|screenshot|image|photo)[-_]?\d[\d_-]*(?:-\w+)?"
NAME_ONLY = re.compile(rf"(?:(?:https?://|www\.)\S+|{FILE}|{CAMERA})", re.IGNORECASE)
# Matched against the caption in small letters and plain characters (NFKC). Signs and posters say some of these words,
# too ("You are now entering Twin Peaks", "ignore the noise"), so each pattern wants what makes it an order to a model.
INJECTIONS = re.compile(
    "|".join(
        (
            r"\b(?:ignore|disregard|forget|override)\s+(?:(?:all|any|everything|what|is|of|the|your|my|these|those|said"
            r"|written|instructions?|text)\s+)*(?:above|previous|preceding|prior|earlier|foregoing)\b",
            r"\b(?:ignore|disregard|forget|override)\s+(?:\w+\s+){0,4}(?:instructions?|prompts?|guidelines)\b",
            r"\b(?:you\s+are|you're)\s+now\s+(?!entering|leaving|in\b|at\b|on\b|here\b|under\b|crossing|approaching)\w",
            r"\bsystem\s+prompt\b",
            r"\b(?:reveal|repeat|print|show)\s+(?:me\s+)?(?:your|the)\s+(?:\w+\s+)?(?:prompt|instructions)\b",
            r"\b(?:reply|respond|answer)\s+(?:only\s+)?with\b.{0,20}(?:\bjson\b|\bword\b|\btext\b|[\"{])",
            r"\bas\s+an\s+ai\s+(?:language\s+)?model\b",
            r"<\|[^|<>]{1,30}\|>|\[/?inst\]|<</?sys>>",  # role markers of chat formats
            r"#{2,}\s*(?:instructions?|system|response|input|user|assistant)\b",
            r"^\s*(?:system|assistant)\s*:",
        )
    ),
    re.MULTILINE,
)
LANGUAGE_IS_SURE = 0.6  # of 129 English captions, names and all, the likeliest other language reaches 0.56
ENGLISH_IS_OUT = 0.01
NEAR_ENGLISH = {"en", "pcm", "sco"}  # creoles and Scots, which short captions are taken for

PERMUTATIONS = 64
# A miss costs more than a candidate too many, which is compared in full.
MISSES_WEIGH = 0.9


def refuse(caption: str, max_caption_words: int) -> str:
    """Return why `caption` is not worth the model's time; "" when it is fine.

    Every check has its own reason, so that reasons can be counted: empty caption, caption too long (in words), broken
    characters, control characters, html, link or file name, symbols instead of words, prompt injection, not english.
    An emoji beside words is fine, and so are names in any language: when in doubt, a caption is kept.
    """
    words = caption.split()
    if not words:
        return "empty caption"
    if len(words) > max_caption_words:
        return "caption too long"
    if "\ufffd" in caption:
        return "broken characters"
    if _has_controls(caption):
        return "control characters"
    plain = unicodedata.normalize("NFKC", caption)
    if INJECTIONS.search(_visible(plain).lower()):
        return "prompt injection"
    if MARKUP.search(caption) or any(html.unescape(entity) != entity for entity in ENTITY.findall(caption)):
        return "html"
    if all(NAME_ONLY.fullmatch(word.strip("()[],;")) for word in words):
        return "link or file name"
    if _is_symbols(plain):
        return "symbols instead of words"
    return "" if _may_be_english(plain) else "not english"


def _has_controls(text: str) -> bool:
    kinds = (unicodedata.category(character) for character in text if not character.isspace())
    return any(kind in ("Cc", "Cs", "Co") for kind in kinds) or bool(INVISIBLE.search(text))


def _visible(text: str) -> str:
    """Without joiners and zero-width spaces, which can hide a word from a pattern."""
    return "".join(character for character in text if unicodedata.category(character) != "Cf")


def _is_symbols(text: str) -> bool:
    """Whether less than half of what is seen are letters and digits, or there are no two letters in a row."""
    seen = [character for character in text if unicodedata.category(character)[0] not in "MCZ"]
    spelt = sum(character.isalnum() for character in seen)
    return 2 * spelt < len(seen) or not re.search(r"[^\W\d_]\w?[^\W\d_]", text)


def _may_be_english(text: str) -> bool:
    letters = [character for character in text if character.isalpha()]
    latin = sum(unicodedata.name(character, "").startswith("LATIN") for character in letters)
    if 2 * latin < len(letters):
        return False
    chances = dict(_identifier().rank(text))
    likeliest = max(chances, key=chances.__getitem__)
    sure = chances[likeliest] >= LANGUAGE_IS_SURE and chances["en"] < ENGLISH_IS_OUT
    return likeliest in NEAR_ENGLISH or not sure


@cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


class NearDuplicates:
    """Finds captions that are like an earlier one: Jaccard similarity of their pairs of words >= `threshold`.

    Case, punctuation and white space do not count; a caption of one word is compared by it. Candidates come from
    MinHash with locality-sensitive hashing (Broder 1997; Leskovec et al., Mining of Massive Datasets, 3.4) and are then
    compared in full: what is found is alike indeed, though one in many of those just above the threshold is missed.

    A million captions take about 1.8 GB and, on one core, a minute.
    """

    def __init__(self, threshold: float):
        from datasketch import MinHash, MinHashLSH  # here: it brings scipy, and only who reads the captions needs it

        self.threshold = threshold
        weights = (1 - MISSES_WEIGH, MISSES_WEIGH)
        # The index needs two bands, and has none above .95; what it proposes is compared with the true threshold.
        self.index = MinHashLSH(threshold=min(threshold, 0.95), num_perm=PERMUTATIONS, weights=weights)
        self.blank = MinHash(num_perm=PERMUTATIONS)  # copied, as drawing the permutations takes longer than using them

    def add(self, caption: str) -> str | None:
        """Return the earlier caption that `caption` is most like; or None, and remember `caption`."""
        shingles = word_pairs(caption)
        sketch = self.blank.copy()
        sketch.update_batch([shingle.encode() for shingle in shingles])
        found = [(jaccard(shingles, word_pairs(earlier)), earlier) for earlier in map(str, self.index.query(sketch))]
        likeness, earlier = max(found, default=(0.0, ""))
        if likeness >= self.threshold:
            return earlier
        self.index.insert(caption, sketch, check_duplication=False)
        return None


def word_pairs(caption: str) -> frozenset[str]:
    """Neighbouring words of `caption`; of a single word, that word."""
    words = re.findall(r"\w+", caption.casefold()) or [caption]
    return frozenset(" ".join(pair) for pair in pairwise(words)) or frozenset(words)


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Size of the intersection over that of the union of two sets, not both empty: 0 to 1."""
    return len(a & b) / len(a | b)
