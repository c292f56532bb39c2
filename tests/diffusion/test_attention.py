"""Prompt-to-Prompt against a plain reference that materialises the attention probabilities and carries them over."""

import pytest
import torch
from diffusers.models.attention_processor import Attention

from ip2p.diffusion.attention import (
    UNALIGNED,
    CrossLink,
    SharedRows,
    SharingProcessor,
    align_tokens,
    shared_rows,
)

EOS, PAD = 99, 0
HEADS, HEAD_DIM, TEXT = 2, 4, 6


def attention(cross: bool) -> Attention:
    torch.manual_seed(0)
    layer = Attention(8, TEXT if cross else None, heads=HEADS, dim_head=HEAD_DIM)
    layer.requires_grad_(False)
    return layer


def probabilities(query, key):
    """(N, HEADS * d), (L, HEADS * d) -> (HEADS, N, L)"""
    query, key = (x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(0, 1) for x in (query, key))
    return (query @ key.mT / HEAD_DIM**0.5).softmax(dim=-1)


def attend(layer, maps, value):
    """Maps (HEADS, N, L) over values (L, HEADS * d) -> (N, C)"""
    value = value.unflatten(-1, (HEADS, HEAD_DIM)).transpose(0, 1)
    return layer.to_out[0]((maps @ value).transpose(0, 1).flatten(1))


def test_self_attention_map_of_the_source_over_the_edited_values():
    layer, x = attention(cross=False), torch.randn(4, 10, 8)
    out = SharingProcessor()(layer, x, shared=shared_rows(4, [(3, 1)], [], tokens=5))
    q, k, v = layer.to_q(x), layer.to_k(x), layer.to_v(x)
    for row, source in enumerate([0, 1, 2, 1]):
        expected = attend(layer, probabilities(q[source], k[source]), v[row])
        torch.testing.assert_close(out[row], expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out[3], SharingProcessor()(layer, x)[3], atol=1e-3)


def test_cross_attention_map_of_aligned_tokens_over_the_edited_values():
    layer, x, text = attention(cross=True), torch.randn(3, 10, 8), torch.randn(3, 5, TEXT)
    alignment = torch.tensor([0, 2, UNALIGNED, 1, 4])
    out = SharingProcessor()(layer, x, text, shared=shared_rows(3, [(0, 1)], [CrossLink(2, 0, alignment)], tokens=5))
    q, k, v = layer.to_q(x), layer.to_k(text), layer.to_v(text)
    keys = torch.stack([k[2, j] if a == UNALIGNED else k[0, a] for j, a in enumerate(alignment.tolist())])
    torch.testing.assert_close(out[2], attend(layer, probabilities(q[0], keys), v[2]), atol=1e-5, rtol=1e-5)
    for row in (0, 1):
        expected = attend(layer, probabilities(q[row], k[row]), v[row])
        torch.testing.assert_close(out[row], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cross", [False, True])
def test_without_links_it_is_diffusers_attention(cross):
    layer, x = attention(cross), torch.randn(3, 10, 8)
    text = torch.randn(3, 5, TEXT) if cross else None
    torch.testing.assert_close(SharingProcessor()(layer, x, text, shared=SharedRows()), layer(x, text))


def padded(*tokens: int, eos: bool = True, pad: int = PAD) -> list[int]:
    body = [1, *tokens, *([EOS] if eos else [])]
    return body + [pad] * (10 - len(body))


@pytest.mark.parametrize("pad", [PAD, EOS])
@pytest.mark.parametrize(
    ("source", "edited", "replaced", "refined"),
    [
        ((5, 6, 7), (5, 6, 7), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ((5, 6, 7), (5, 8, 7), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 1, -1, 3, 4, 5, 6, 7, 8, 9]),  # one word for another
        ((5, 6, 7), (5, 6, 8, 9, 7), None, [0, 1, 2, -1, -1, 3, 4, 7, 8, 9]),  # words added
        ((5, 6, 8, 9, 7), (5, 6, 7), None, [0, 1, 2, 5, 6, 7, 7, 7, 8, 9]),  # words removed
        ((5, 6, 7), (5, 8, 9, 7), None, [0, 1, -1, -1, 3, 4, 6, 7, 8, 9]),  # one word for two
    ],
)
def test_alignment(source, edited, replaced, refined, pad):
    texts = padded(*source, pad=pad), padded(*edited, pad=pad)
    assert align_tokens(*texts, EOS, "replace") == replaced
    assert align_tokens(*texts, EOS, "refine") == refined
    assert align_tokens(*texts, EOS, "self") == [UNALIGNED] * 10


def test_alignment_of_a_prompt_that_was_cut():
    cut = [1, 2, 3, 4, 5]
    for texts in ((cut, [1, 2, 3, EOS, PAD]), ([1, 2, 3, EOS, PAD], cut)):
        assert align_tokens(*texts, EOS, "refine") == [0, 1, 2, UNALIGNED, UNALIGNED]


def test_emphasis_multiplies_the_map_of_a_word():
    layer, x, text = attention(cross=True), torch.randn(2, 10, 8), torch.randn(2, 5, TEXT)
    emphasis = torch.tensor([1, 1, 3.0, 1, 1])
    links = [CrossLink(1, 0, torch.tensor([0, 1, UNALIGNED, 3, 4]), emphasis)]
    out = SharingProcessor()(layer, x, text, shared=shared_rows(2, [], links, tokens=5))
    q, k, v = layer.to_q(x), layer.to_k(text), layer.to_v(text)
    keys = torch.stack([k[1, 2] if j == 2 else k[0, j] for j in range(5)])
    maps = probabilities(q[0], keys) * emphasis
    torch.testing.assert_close(out[1], attend(layer, maps, v[1]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[0], attend(layer, probabilities(q[0], k[0]), v[0]), atol=1e-5, rtol=1e-5)
