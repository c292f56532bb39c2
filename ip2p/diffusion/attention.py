"""Attention sharing (Prompt-to-Prompt): an edited sample attends as its source does, over its own values.

The attention map of the source is softmax(q_src k_src^T / sqrt(d)), so handing the source's queries and keys to the
edited sample shares the map without ever materialising it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ip2p.recipe import SharingMode

UNALIGNED = -1


@dataclass(frozen=True)
class Rows:
    """Rows that take another's place: only rows `kept` (K,) are computed, and row r is the `place`[r]-th of them."""

    kept: Tensor
    place: Tensor  # (R,)


@dataclass(frozen=True)
class SharedRows:
    """Which rows of one UNet batch of R rows attend as others do. None: none of them.

    cross_keys: (R, L), for each token of each row the index into (R L) of the key it uses. emphasis: (R, L), factors on
    what the tokens contribute in cross-attention.
    """

    self_rows: Rows | None = None
    cross_rows: Rows | None = None
    cross_keys: Tensor | None = None
    emphasis: Tensor | None = None

    def to(self, device: torch.device | str) -> "SharedRows":
        def moved(rows: Rows | None) -> Rows | None:
            return rows and Rows(rows.kept.to(device), rows.place.to(device))

        keys = None if self.cross_keys is None else self.cross_keys.to(device)
        emphasis = None if self.emphasis is None else self.emphasis.to(device)
        return SharedRows(moved(self.self_rows), moved(self.cross_rows), keys, emphasis)


@dataclass(frozen=True)
class CrossLink:
    """Row `edited` takes the cross-attention of row `source`. alignment (L,) from `align_tokens`; emphasis (L,)."""

    edited: int
    source: int
    alignment: Tensor
    emphasis: Tensor | None = None


@dataclass(frozen=True)
class Watch:
    """Rows whose attention to some tokens is wanted: each cross-attention layer adds a map (W, N) to `maps`."""

    rows: Tensor  # (W,)
    tokens: Tensor  # (W, L) float: 1 for those
    maps: list[Tensor]

    def see(self, query: Tensor, key: Tensor, scale: float) -> None:
        """(R, heads, N, d), (R, heads, L, d): mean over heads of the attention to the tokens, together."""
        probabilities = (query[self.rows] @ key[self.rows].mT * scale).softmax(-1)
        self.maps.append((probabilities.float().mean(1) @ self.tokens[..., None])[..., 0])


def shared_rows(
    count: int, self_links: Sequence[tuple[int, int]], cross_links: Sequence[CrossLink], tokens: int
) -> SharedRows:
    """For `count` rows of `tokens` tokens, from links (edited row, source row) of self-attention and of cross."""
    if not cross_links:
        return SharedRows(_rows(count, self_links))
    keys = torch.arange(count * tokens).view(count, tokens)
    emphasis = torch.ones(count, tokens)
    for link in cross_links:
        theirs = link.source * tokens + link.alignment
        keys[link.edited] = torch.where(link.alignment == UNALIGNED, keys[link.edited], theirs)
        if link.emphasis is not None:
            emphasis[link.edited] = link.emphasis
    cross_rows = _rows(count, [(link.edited, link.source) for link in cross_links])
    return SharedRows(_rows(count, self_links), cross_rows, keys, None if (emphasis == 1).all() else emphasis)


def _rows(count: int, links: Sequence[tuple[int, int]]) -> Rows | None:
    if not links:
        return None
    source = torch.arange(count)
    for edited, origin in links:
        source[edited] = origin
    kept, place = torch.unique(source, return_inverse=True)
    return Rows(kept, place)


class SharingProcessor:
    """Attention processor of diffusers' UNet: plain attention, but for rows that share another row's queries and keys.

    It has no state: `unet(..., cross_attention_kwargs={"shared": SharedRows, "watch": Watch})` says which rows do, and
    of which rows maps are wanted.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        shared: SharedRows | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """attn: diffusers' Attention; hidden_states (R, N, C); encoder_hidden_states (R, L, D), if any -> (R, N, C)."""
        assert attn.group_norm is None and attn.spatial_norm is None and attention_mask is None
        shared = shared or SharedRows()
        if encoder_hidden_states is None:
            query = _project(attn.to_q, hidden_states, shared.self_rows)
            key = _project(attn.to_k, hidden_states, shared.self_rows)
            value = attn.to_v(hidden_states)
        else:
            query = _project(attn.to_q, hidden_states, shared.cross_rows)
            key, value = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
            if shared.cross_keys is not None:
                key = key.flatten(0, 1)[shared.cross_keys]
            if shared.emphasis is not None:  # a factor on a column of the map is a factor on its value
                value = value * shared.emphasis[..., None].to(value.dtype)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
        if watch is not None and encoder_hidden_states is not None:
            watch.see(query, key, attn.scale)
        attended = F.scaled_dot_product_attention(query, key, value)
        out = attn.to_out[0](attended.transpose(1, 2).flatten(2))  # to_out[1] is dropout
        return out / attn.rescale_output_factor


def _project(projection: torch.nn.Module, hidden_states: Tensor, rows: Rows | None) -> Tensor:
    if rows is None:
        return projection(hidden_states)
    return projection(hidden_states.index_select(0, rows.kept)).index_select(0, rows.place)


def align_tokens(source: Sequence[int], edited: Sequence[int], eos: int, mode: SharingMode) -> list[int] | None:
    """For each token of the edited prompt, the position of the source token that it corresponds to, or UNALIGNED.

    source, edited: padded token ids of one length. In all modes tokens in common correspond, and padding (all that
    follows the first `eos`) corresponds to padding; in `replace` so do tokens that stand in the place of others, and
    None is returned where there are more or fewer of them. In `self` nothing corresponds.
    """
    assert len(source) == len(edited), (len(source), len(edited))
    n, m = _content(source, eos), _content(edited, eos)
    alignment = [UNALIGNED] * len(edited)
    if mode == "self":
        return alignment
    for tag, i0, i1, j0, j1 in SequenceMatcher(None, source[:n], edited[:m], autojunk=False).get_opcodes():
        if mode == "replace" and i1 - i0 != j1 - j0:
            return None
        if tag == "equal" or mode == "replace":
            alignment[j0:j1] = range(i0, i1)
    if n < len(source):
        alignment[m:] = [max(j, n) for j in range(m, len(edited))]
    return alignment


def _content(tokens: Sequence[int], eos: int) -> int:
    """Number of tokens up to and with the first `eos`; all of them when a long prompt was cut before it."""
    return list(tokens).index(eos) + 1 if eos in tokens else len(tokens)
