"""Shared by contenders that read a prompt in their own way.

Shape letters: pop/models/layers.py; N is the length of the prompt.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import pop
from pop.engine.attention import write
from pop.models.layers import causal_attention
from tools.evaluate.contender import OneByOne


def embed(module: nn.Module, tokens: torch.Tensor):
    """tokens [T] -> h [1, T, D] and the rotary tables of their positions."""
    positions = torch.arange(len(tokens), device=tokens.device)[None]  # [1, T]
    return module.embed(tokens[None]), module.rope(positions)


def attend_prompt(layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention within the prompt, for `layer(h, rope, attend)`."""
    return causal_attention(q, k, v, layer.scale, layer.window)


class WithGaps(OneByOne):
    """Tokens after the prompt attend only to those prompt tokens that a layer's cache has.

    `prefill` sets `cache.present`: for each layer, which of the N prompt tokens each K/V head has, [K, N] bool.
    """

    @torch.no_grad()
    def extend(self, tokens: list[int], cache: pop.KVCache) -> torch.Tensor:
        module = self.model.module
        begin = int(cache.lengths[0])
        positions = torch.arange(begin, begin + len(tokens), device=self.model.device)[None]  # [1, T]
        h = module.embed(torch.tensor([tokens], device=self.model.device))
        rope = module.rope(positions)
        for index, layer in enumerate(module.layers):
            mask = visible(positions[0], cache.present[index], layer.window)
            h = layer(h, rope[layer.window], write_and_attend(cache, index, positions, mask))
        cache.lengths += len(tokens)
        return module.head(h[0])


def visible(positions: torch.Tensor, present: torch.Tensor, window: int | None) -> torch.Tensor:
    """Which slots tokens at increasing positions [T] attend to: [K, T, S], where slot S - 1 is the last token's own.

    Args:
        positions: of the tokens, each in the slot of its position.
        present: [K, N], which of the first N slots are filled. Those after them are.
        window: the layer's. None: it has none.
    """
    slots = torch.arange(int(positions[-1]) + 1, device=positions.device)  # [S]
    distance = positions[:, None] - slots  # [T, S]
    causal = (distance >= 0) & (distance < (window or len(slots)))
    filled = F.pad(present, (0, max(0, len(slots) - present.shape[1])), value=True)[:, : len(slots)]  # [K, S]
    return causal & filled[:, None]


def attend_where(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """q [1, T, H, E] attends to k and v [1, S, K, E] where mask [K, T, S] is true -> [1, T, H * E]."""
    mask = mask.repeat_interleave(q.shape[2] // k.shape[2], dim=0)[None]  # [1, H, T, S]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)


def write_and_attend(cache: pop.KVCache, index: int, slots: torch.Tensor, mask: torch.Tensor | None = None):
    """An `attend` for layer `index`, which also writes K and V into slots [1, T] of the cache.

    mask: [K, T, S], which of the first S slots each token attends to. None: the tokens attend to each other causally.
    """
    keys = cache.keys[index]
    values = cache.values[index]

    def attend(layer, q, k, v):
        write(keys, values, slots, k, v)
        if mask is None:
            return attend_prompt(layer, q, k, v)
        size = mask.shape[-1]
        return attend_where(q, keys[:, :size], values[:, :size], mask, layer.scale)

    return attend
