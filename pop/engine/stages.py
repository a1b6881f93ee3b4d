"""The stages: what a layer computes in prefill and decode, and the output head.

Each stage but the head takes a layer as an argument, and those that write K and V also its slice of the cache, keys and
values [B, S + 1, K, E]. So one compiled graph serves all layers. (compile.py knows the layer by the name of its
parameter, `layer`.) Lengths enter as tensor shapes, never as Python ints.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from pop.engine.attention import AttentionMetadata, cache_attention, write
from pop.engine.selection import received
from pop.pruning.corrections import code, corrected_keys_values

Results = tuple[Tensor, ...]
Work = Callable[[], Results]  # a function for `replay`: a decode step (decode_step.py) or a pass (layer_pass.py)


def full_layer(layer, h, keys, values, metadata: AttentionMetadata):
    """A layer at full depth: h [B, T, D] -> [B, T, D]. Its K and V are written before anything is attended to."""
    attention = layer.cache_attention or cache_attention

    def attend(layer, q, k, v):
        write(keys, values, metadata.slots, k, v)
        return attention(q, keys, values, metadata, layer.scale)

    return layer(h, metadata.rope, attend)


def pruned_layer(layer, h, rope, slots, keys, values):
    """A pruned layer: only K and V, into slots [B, T], from the h [B, T, D] that enters the group of pruned layers."""
    write(keys, values, slots, *layer.keys_values(h, rope))


def corrected_layer(layer, h, z, weight, rope, slots, keys, values):
    """A pruned layer of a calibrated plan: its own K and V of h [B, T, D], corrected by products of z [B, T, R].

    weight is the layer's U [2 * K * E, R].
    """
    write(keys, values, slots, *corrected_keys_values(layer, h, z, weight, rope))


def head(module, h):
    """h [..., D] after the last layer -> logits [..., V]."""
    return module.head(h)


class Stages(NamedTuple):
    """The functions that a call uses: the plain ones, or replacements such as compiled ones.

    `replay(module, what, other)` returns a runner. `runner(work)` runs `work`. Each call must be given the same
    function, so the runner may record it, and repeat the record later. `what` says in words which function it is.
    `other` is a runner of which no function runs at the same time, so both may use the same memory.
    """

    full_layer: Callable[..., Tensor] = full_layer
    pruned_layer: Callable[..., None] = pruned_layer
    corrected_layer: Callable[..., None] = corrected_layer
    code: Callable[..., Tensor] = code
    received: Callable[..., Tensor] = received
    head: Callable[..., Tensor] = head
    replay: Callable[..., Callable[[Work], Results]] | None = None
    replayed_tokens: int = 0  # passes of at most so many tokens are replayed


EAGER = Stages()
