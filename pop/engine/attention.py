"""Attention over a KV cache: where keys and values are written, and which of them each token attends.

`attend_cache` is the one place where the kind of attention is chosen. A backend may pass another function of the same
signature to `full_layer` (stages.py). Shape letters: pop/models/layers.py; N is the number of keys.
"""

from typing import NamedTuple

import torch

from pop.models.layers import Rope, causal_attention, masked_attention

QUERY_BLOCK = 256  # tokens; smaller blocks waste less on keys outside the window, larger ones have less overhead


class AttentionMetadata(NamedTuple):
    """How tokens [B, T] attend in all layers that have one sliding window.

    Example: a layer's cache is a ring of 6 slots, its window is 3, and the tokens are at positions 6 and 7.

        slots       [[0, 1]]                     position p is in slot p % 6
        key_slots   [[4, 5, 0, 1]]               positions 4 to 7 in order: all that the two tokens attend
        mask        [[[1, 1, 1, 0],              position 6 attends 4, 5, 6
                      [0, 1, 1, 1]]]             position 7 attends 5, 6, 7
        band        [2, 2, 0]                    key number 2 is the first token's own
    """

    rope: Rope  # the tokens' rotary tables
    slots: torch.Tensor  # [B, T] int64, where their own K and V go; the spare slot S takes tokens that are not kept
    mask: torch.Tensor | None = None  # [B, T, N] bool; None: the tokens fill an empty cache and are causal
    key_slots: torch.Tensor | None = None  # [B, N] int64, the slots of the keys; None: the first N, in order
    # [3] int64 on the CPU: which key is the first token's own, and how many keys before and after its own each attends
    band: torch.Tensor | None = None


def write(keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Write k and v [B, T, K, E] into slots [B, T] of keys and values [B, S + 1, K, E], in place."""
    rows = torch.arange(slots.shape[0], device=slots.device)[:, None]  # [B, 1]
    keys[rows, slots] = k.to(keys.dtype)
    values[rows, slots] = v.to(values.dtype)


def attend_cache(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, at: AttentionMetadata, scale: float
) -> torch.Tensor:
    """q [B, T, H, E] attends keys and values [B, S + 1, K, E], which hold its own tokens -> [B, T, H * E].

    Even fresh tokens are read back from the cache: padded positions of k and v may hold NaN, cache slots never do.
    """
    T, mask = q.shape[1], at.mask
    if at.key_slots is None:
        N = T if mask is None else mask.shape[-1]
        k, v = keys[:, :N], values[:, :N]  # [B, N, K, E]
    else:
        rows = torch.arange(len(at.key_slots), device=q.device)[:, None]  # [B, 1]
        k, v = keys[rows, at.key_slots], values[rows, at.key_slots]  # [B, N, K, E]
    if mask is None:
        return causal_attention(q, k, v, scale, None)
    if T == 1:
        return masked_attention(q, k, v, mask, scale)
    return attention_by_blocks(q, k, v, mask, at.band, scale)


@torch.library.custom_op("pop::attention_by_blocks", mutates_args=())
def attention_by_blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, band: torch.Tensor, scale: float
) -> torch.Tensor:
    """masked_attention for consecutive tokens, QUERY_BLOCK queries at a time over the keys of their band.

    So T tokens with a window cost T * (window + QUERY_BLOCK) products, whatever N is. It is a custom operator because
    the number of blocks depends on lengths.
    """
    B, T, H, E = q.shape
    own, before, after = band.tolist()
    out = q.new_empty(B, T, H * E)
    for begin in range(0, T, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, T)
        keys = slice(max(0, own + begin - before), own + end + after)
        out[:, begin:end] = masked_attention(q[:, begin:end], k[:, keys], v[:, keys], mask[:, begin:end, keys], scale)
    return out


@attention_by_blocks.register_fake
def _(q, k, v, mask, band, scale):
    return q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3])
