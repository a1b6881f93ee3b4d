"""Tokens of earlier prompts, among which a later prompt selects too.

A prompt selects the tokens that its end attends to. A later prompt about the same text needs others of them. So the
cache keeps the state of each token that has skipped layers, as it entered the selecting layer. A later prompt selects
among these tokens as well, and runs the selected ones from that layer on. Their new K and V replace the old ones.

A token can be selected again only if its rotary position equals its index. After an image in Qwen3-VL, it does not. If
a layer has a sliding window, no token can, because the keys that it attends to may be gone.
Shape letters: pop/models/layers.py; N is the number of earlier tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pop.engine.attention import by_row
from pop.engine.cache import KVCache
from pop.engine.selection import received
from pop.system.memory import to_device


class Earlier(NamedTuple):
    """The last N tokens of each row of a cache, in order. All tensors are on the CPU. N is 0 if there are no others."""

    slots: Tensor  # [B, N]
    others: Tensor  # [B, N] bool, which of them may be selected, as they skipped layers from the selecting layer on
    # [B, N] bool, which count in the softmax: all of a row, if it has others. A row without them scores its prompt
    # alone, as it would by itself. N may be above 0 for another row.
    is_attended: Tensor

    @classmethod
    def of(cls, cache: KVCache, selecting_layer: int, is_last_part: bool) -> Earlier:
        """The tokens for a call that has the last part of its prompts, and none for another, which selects none.

        Waits for the device, unless there are surely none.
        """
        N = int(cache.lengths.max()) if is_last_part and cache.has_states else 0
        positions = cache.lengths[:, None] - N + torch.arange(N)
        slots = positions.clamp(min=0)  # the states are only kept without windows, where position p is in slot p
        others = positions >= 0
        if N:
            others &= cache.skipped.cpu().gather(1, slots) == selecting_layer
        if not others.any():
            return cls(slots[:, :0], others[:, :0], others[:, :0])
        return cls(slots, others, (positions >= 0) & others.any(1, keepdim=True))

    def received(self, cache: KVCache, selecting_layer: int) -> Callable:
        """As `received` of selection.py, for these tokens and a prompt."""
        slots, is_attended = to_device([self.slots, self.is_attended], cache.device)
        k = cache.keys[selecting_layer][by_row(slots)]
        return lambda *inputs: received(*inputs, k, is_attended)


def remember(cache: KVCache, entering: Tensor, rotary: Tensor, skips: Tensor, layer: int) -> Tensor:
    """Keep the states of prompts for later ones. Returns what cache.skipped becomes once their logits exist.

    Args:
        cache: Of B rows.
        entering: [B, T, D], entered the selecting layer.
        rotary: The rotary positions, [B, T], or [3, B, T] by axis. On the CPU.
        skips: Which of the T tokens are not at full depth, [B, T] bool on the device. False for padding.
        layer: The selecting layer.
    """
    B, T, _ = entering.shape
    positions = cache.lengths[:, None] + torch.arange(T)
    is_text = (rotary == positions).view(-1, B, T).all(0)
    slots = positions.clamp(max=cache.max_seq_len)
    cache.hold_states()
    slots, is_text = to_device([slots, is_text], cache.device)
    places = by_row(slots)
    cache.entered[places] = entering
    skipped = cache.skipped.clone()
    skipped[places] = torch.where(skips & is_text, layer, -1).to(skipped.dtype)
    return skipped
