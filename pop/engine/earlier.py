"""Tokens of earlier prompts, among which a later prompt selects too.

A prompt selects the tokens that its end attends to. A later prompt about the same text needs others of them. So the
cache keeps the state of each token that has skipped layers, as it entered the selecting layer. A later prompt selects
among these tokens as well, and runs the selected ones from that layer on. Their new K and V replace the old ones.

Only text is selected again, and with sliding windows only until their slots are used a second time.
Shape letters: pop/models/layers.py; N is the number of earlier tokens.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pop.engine.attention import AttentionMetadata
from pop.engine.cache import KVCache
from pop.engine.chunks import ALL_KEYS, Prompts, Tokens, attention_metadata, held_by_slot
from pop.engine.selection import received_by_all
from pop.models.images import TEXT
from pop.system.memory import to_device


class Earlier(NamedTuple):
    """The last N tokens of each row of a cache, in order. All tensors are on the CPU."""

    slots: Tensor  # [B, N]
    others: Tensor  # [B, N] bool, which of them have skipped layers from the selecting layer on
    is_attended: Tensor  # [B, N] bool, which count in the softmax: all of a row, if it has others

    @classmethod
    def of(cls, cache: KVCache, selecting_layer: int) -> Earlier:
        """Waits for the device, unless the cache is empty."""
        N = min(int(cache.lengths.max()), cache.ring)
        positions = cache.lengths[:, None] - N + torch.arange(N)
        is_held = (positions >= 0) & (cache.lengths <= cache.ring)[:, None]
        slots = positions.clamp(0, cache.ring)
        if N == 0:
            return cls(slots, is_held, is_held)
        others = is_held & (cache.skipped.cpu().gather(1, slots) == selecting_layer)
        return cls(slots, others, is_held & others.any(1, keepdim=True))

    def received(self, cache: KVCache, selecting_layer: int) -> partial:
        """As `received` of selection.py, for these tokens and a prompt."""
        slots, is_attended = to_device([self.slots, self.is_attended], cache.device)
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        return partial(received_by_all, cache.keys[selecting_layer][rows, slots], is_attended)


def in_front(tokens: Tensor, is_chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Those of tokens [B, N] that are chosen [B, N], in order, as [B, W]; and which of these are valid, [B, W].

    A row with fewer ends with other tokens, which are not valid. W is at least 2, unless N is 1, since compiled code
    takes one token for a decode step.
    """
    counts = is_chosen.sum(1)
    columns = is_chosen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : max(2, int(counts.max()))]
    return tokens.gather(1, columns), torch.arange(columns.shape[1]) < counts[:, None]


def attention_of(module, cache: KVCache, positions: Tensor, valid: Tensor) -> dict[int | None, AttentionMetadata]:
    """How text tokens at positions [B, W] of a cache attend to it, by the layers' window. Some are valid [B, W]."""
    tokens = Tokens(None, positions, valid, rotary=positions, last_attended=None)
    attention = attention_metadata(module, cache, tokens, cache.lengths)
    for window, metadata in attention.items():  # for consecutive tokens, which these are not
        (held,) = to_device([held_by_slot(cache.lengths, 0, cache.slots(window)).to(torch.int32)], cache.device)
        attention[window] = metadata._replace(held=held, key_slots=None, band=torch.tensor(ALL_KEYS))
    return attention


def remember(cache: KVCache, skipped: Tensor, prompts: Prompts, entering: Tensor, selected: Tensor, layer: int) -> None:
    """Keep the states of prompts for later ones, and note in `skipped` which tokens those may select.

    Args:
        cache: Of B rows.
        skipped: What cache.skipped becomes once the logits of the prompts exist.
        prompts: T tokens a row.
        entering: [B, T + 1, D], entered the selecting layer.
        selected: [B, T] bool, on the device.
        layer: The selecting layer.
    """
    if prompts.images is not TEXT or cache.rope_offsets.any():
        return
    B, T = prompts.full_depth.shape
    slots = (cache.lengths[:, None] + torch.arange(T)).clamp(max=cache.ring)  # padding is at full depth
    slots, full_depth = to_device([slots, prompts.full_depth], cache.device)
    rows = torch.arange(B, device=cache.device)[:, None]
    cache.entered[rows, slots] = entering[:, :T]
    skipped[rows, slots] = torch.where(full_depth | selected, -1, layer).to(skipped.dtype)
