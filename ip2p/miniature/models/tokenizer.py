"""The tokenizer of the miniature text encoders: CLIP's byte-level BPE, its merges learned on the world's own words.

Every word of the grammar is one token, so token positions are word positions (which makes Prompt-to-Prompt's alignment
easy to read); any other text still encodes, byte by byte.
"""

# diffusers, transformers and open_clip annotate less than they take and give.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTokenizer

CONTEXT_LENGTH = 48
_START, _END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(words: Iterable[str]) -> CLIPTokenizer:
    """Learn the merges of `words` (and of every single byte) and return a tokenizer of `CONTEXT_LENGTH` tokens.

    The end token has the highest id, because open_clip pools the text at `argmax(ids)`; it also pads, as in SD.
    """
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, initial_alphabet=bytes_, end_of_word_suffix="</w>", show_progress=False
    )
    # The alphabet holds bytes inside a word; given as one-letter words, they are learned as ends of a word too.
    learner.train_from_iterator([*sorted(words), *bytes_], trainer)
    learned = json.loads(learner.to_str())["model"]
    # By name: the order in which the library learns tokens of equal frequency differs from run to run.
    vocabulary = {token: index for index, token in enumerate([*sorted(learned["vocab"]), _START, _END])}
    merges = [tuple(pair) for pair in learned["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT_LENGTH)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids (B, CONTEXT_LENGTH), cut and padded as the pipelines do."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
