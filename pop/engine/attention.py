"""Attention over a KV cache: where keys and values are written, and which of them each token attends to.

`cache_attention` is the one place where the kind of attention is chosen: `decode_attention` for one token a row, and
`chunk_attention` for several. A backend replaces it.

Shape letters: pop/models/layers.py; N is the number of keys.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pop.models.layers import KeysValues, Rope, causal_attention, masked_attention

QUERY_BLOCK = 256  # tokens; smaller blocks waste less on keys outside the window, larger ones have less overhead
UNBOUNDED = 2**31  # tokens: more than any sequence has


class Band(NamedTuple):
    """Which keys consecutive tokens attend to, without a look at each token. Keys are numbered as they are read."""

    own: int  # the number of the first token's own key
    before: int  # how many keys before its own each token attends to at most
    after: int  # how many after its own
    is_exact: bool  # whether this band alone decides, without spans


class AttentionMetadata(NamedTuple):
    """How tokens [B, T] attend in all layers that have one sliding window.

    Example: a layer's cache is a ring of 6 slots, its window is 3, and the tokens are at positions 6 and 7.

        slots       [[0, 1]]             position p is in slot p % 6
        key_slots   [[4, 5, 0, 1]]       the keys are read in the order of their positions,
        held        [[4, 5, 6, 7]]       which are 4 to 7: all that the two tokens attend to
        spans       [[[4, 6], [5, 7]]]   position 6 attends to 4, 5 and 6, and position 7 to 5, 6 and 7
        band        [2, 2, 0, 1]         key number 2 is the first token's own

    One token a row needs no key_slots, held or band: see `decode_attention`.
    """

    rope: Rope  # the tokens' rotary tables
    slots: Tensor  # [B, T] int64, where their own K and V go; the spare slot S takes tokens that are not kept
    spans: Tensor  # [B, T, 2] int32, the first and the last position that each token attends to
    held: Tensor | None = None  # [B, N] int32, the keys' positions, negative for none
    key_slots: Tensor | None = None  # [B, N] int64, the slots of the keys; None: the first N, in order
    band: Tensor | None = None  # [4] int64 on the CPU: a Band


ByWindow = dict[int | None, AttentionMetadata]  # how tokens attend, by the layers' window


def by_row(index: Tensor) -> tuple[Tensor, Tensor]:
    """Where index [B, T] points in a table [B, ...]: table[by_row(index)] has table[b, index[b, t]] at [b, t]."""
    rows = torch.arange(len(index), device=index.device)
    return rows[:, None], index


def write(keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Write k and v [B, T, K, E] into slots [B, T] of keys and values [B, S + 1, K, E], in place."""
    places = by_row(slots)
    keys[places] = k.to(keys.dtype)
    values[places] = v.to(values.dtype)


def read(keys: Tensor, values: Tensor, metadata: AttentionMetadata) -> KeysValues:
    """The N keys and values at the positions `metadata.held`, each [B, N, K, E]."""
    if metadata.key_slots is None:
        N = metadata.held.shape[1]
        return keys[:, :N], values[:, :N]
    places = by_row(metadata.key_slots)
    return keys[places], values[places]


def span_mask(held: Tensor, spans: Tensor) -> Tensor:
    """Which of the keys at positions `held` [B, N] are in the spans [B, T, 2]: a mask [B, T, N]."""
    first, last = spans.unbind(-1)  # [B, T] each
    return (first[..., None] <= held[:, None]) & (held[:, None] <= last[..., None])


def empty_output(q: Tensor, *_) -> Tensor:
    """Memory for the result of attention: q [B, T, H, E] -> [B, T, H * E]."""
    B, T, H, E = q.shape
    return q.new_empty(B, T, H * E)


@torch.library.custom_op("pop::chunk_attention", mutates_args=())
def chunk_attention(q: Tensor, k: Tensor, v: Tensor, held: Tensor, spans: Tensor, band: Tensor, scale: float) -> Tensor:
    """Several tokens a row attend to the keys that `read` returns, one block of queries at a time.

    With a window, T consecutive tokens cost T * (window + QUERY_BLOCK) products, whatever N is. No mask has more than
    QUERY_BLOCK rows. This is a custom operator because the number of blocks depends on lengths.
    """
    T = q.shape[1]
    own, before, after, is_exact = Band(*band.tolist())
    if is_exact and own == 0 and before >= T - 1:  # the first tokens, which need no mask
        return causal_attention(q, k[:, :T], v[:, :T], scale, None)
    out = empty_output(q)
    for begin in range(0, T, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, T)
        queries = slice(begin, end)
        keys = slice(max(0, own + begin - before), own + end + after)  # those that the queries may attend to
        mask = span_mask(held[:, keys], spans[:, queries])
        out[:, queries] = masked_attention(q[:, queries], k[:, keys], v[:, keys], mask, scale)
    return out


chunk_attention.register_fake(empty_output)


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, spans: Tensor, scale: float) -> Tensor:
    """One token a row attends to slots of the cache: q [B, 1, H, E], keys and values [B, S + 1, K, E] -> [B, 1, H * E].

    The host knows no length. Slot s of a ring of S slots holds the latest position that is s modulo S and not after the
    last attended one: last - (last - s) % S. A negative number is an empty slot.
    """
    S = keys.shape[1] - 1
    last = spans[:, :, 1]  # [B, 1]
    held = last - (last - torch.arange(S, dtype=last.dtype, device=q.device)) % S  # [B, S]
    return masked_attention(q, keys[:, :S], values[:, :S], span_mask(held, spans), scale)


def cache_attention(q: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata, scale: float) -> Tensor:
    """q [B, T, H, E] attends to keys and values [B, S + 1, K, E], which hold its own tokens -> [B, T, H * E].

    Even fresh tokens are read back from the cache. Padding of k and v may be NaN. It goes to the spare slot, so a row
    reads only what its own tokens wrote.
    """
    if metadata.held is None:
        return decode_attention(q, keys, values, metadata.spans, scale)
    k, v = read(keys, values, metadata)
    return chunk_attention(q, k, v, metadata.held, metadata.spans, metadata.band, scale)
