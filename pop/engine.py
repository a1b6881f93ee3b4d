"""Pruned prefill and full-depth decode on a static KV cache.

    h, all prompt tokens     ──layer 0──layer 1── ... ──┬── K, V only of every pruned layer ──► cache
                                                        │
    full-depth rows, f                                  └──layer l──layer l+1── ... ──► logits

Read literally, the method runs the prompt without the pruned layers and then the boundary token as a decode step of
its own, so all weights are read twice. Here both happen in one pass (`fused boundary`): below the first pruned layer
the boundary token does what every token does. In a run of pruned layers, all tokens leave their K and V, computed
from the h that entered the run; then only the full-depth rows f go through the run's layers, overwriting their own
K and V in the cache and attending what is there.

The only state is the cache, and it counts tokens as held only once their logits are there. Nothing is checked here:
`pop.Model` does that. Shape letters: see models/layers.py.
"""

from __future__ import annotations

import torch

from pop.cache import KVCache
from pop.models.layers import causal_attention, masked_attention
from pop.plan import PrunePlan


@torch.no_grad()
def prefill(
    module, tokens: torch.Tensor, cache: KVCache, lengths: torch.Tensor, plan: PrunePlan, chunk_size: int
) -> torch.Tensor:
    """Append prompts to the cache and predict what follows each.

    tokens: [B, T] right-padded, lengths: [B] on the CPU, 1 <= lengths <= T. Chunks of `chunk_size` tokens run one
    after the other, which bounds the memory for activations. Returns logits [B, V] of each row's boundary token.
    """
    out = None  # [B, D], the boundary rows of h behind the last layer
    for begin in range(0, int(lengths.max()), chunk_size):
        h = _chunk(module, tokens[:, begin : begin + chunk_size], cache, lengths, plan, begin)
        index = lengths - 1 - begin  # [B] of each row's last token in this chunk
        reached = (index >= 0).to(h.device)  # by the chunk that holds it; what earlier chunks left is overwritten
        index = index.clamp(0, h.shape[1] - 1).to(h.device)
        rows = h[torch.arange(len(index), device=h.device), index]  # [B, D]
        out = rows if out is None else torch.where(reached[:, None], rows, out)
    logits = module.head(out)
    cache.lengths = cache.lengths + lengths
    return logits


@torch.no_grad()
def extend(module, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Append tokens [B, T] at full depth, as decode would one by one. Returns logits [B, T, V] at every position."""
    lengths = torch.full((tokens.shape[0],), tokens.shape[1])
    logits = module.head(_chunk(module, tokens, cache, lengths, PrunePlan.none(), 0))
    cache.lengths = cache.lengths + lengths
    return logits


@torch.no_grad()
def decode(module, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Append one token a row at full depth: tokens [B] -> logits [B, V] of what follows.

    A row that is full already may be stepped with the others: its token goes to the spare slot and its logits mean
    nothing.
    """
    filled = min(int(cache.lengths.max()) + 1, cache.max_seq_len)
    positions = cache.lengths[:, None].to(tokens.device)  # [B, 1]
    slots = positions.clamp(max=cache.max_seq_len)
    mask = _visible(positions, filled)  # [B, 1, filled]
    h = module.embed(tokens[:, None])  # [B, 1, D]
    rope = module.rope(positions)
    for index in range(len(module.layers)):
        h = _full_layer(module, index, h, rope, slots, cache, filled, mask)
    logits = module.head(h[:, 0])
    cache.lengths = cache.lengths + 1
    return logits


def _chunk(module, tokens, cache, lengths, plan, begin):
    """Tokens `begin` to `begin + C` of prompts of `lengths`, through all layers: [B, C] -> h [B, C, D].

    Only full-depth tokens carry a final state in h.
    """
    # Which token is where: all of this on the CPU, without waiting for the device.
    start, lengths = cache.lengths[:, None], lengths[:, None]  # [B, 1]
    index = torch.arange(begin, min(begin + tokens.shape[1], int(lengths.max())))  # [C] within the prompt
    tokens = tokens[:, : len(index)]
    positions = start + index  # [B, C] within the sequence
    padding = index >= lengths
    slots = positions.where(~padding, cache.max_seq_len)  # padding goes to the spare slot
    full_depth = (positions < plan.full_depth_first) | (index >= lengths - plan.full_depth_last)
    if (full_depth | padding).all():
        plan = PrunePlan.none()  # nothing is left to prune
    full_depth &= ~padding
    filled = int((start + lengths.clamp(max=begin + len(index))).max())
    fresh = begin == 0 and not start.any()  # the chunk attends itself alone and causally, without a mask

    # The full-depth rows of the chunk: W distinct tokens a row, the full-depth ones first, others as filling.
    W = int(full_depth.sum(1).max()) if plan.layers else 0
    row_index = (~full_depth).to(torch.uint8).argsort(dim=1, stable=True)[:, :W]  # [B, W]
    row_valid = full_depth.gather(1, row_index)  # [B, W]
    row_positions = positions.gather(1, row_index)
    row_slots = slots.gather(1, row_index).where(row_valid, cache.max_seq_len)

    device = tokens.device
    positions, slots = positions.to(device), slots.to(device)
    row_index, row_valid = row_index.to(device)[..., None], row_valid.to(device)[..., None]  # [B, W, 1]
    row_positions, row_slots = row_positions.to(device), row_slots.to(device)

    h = module.embed(tokens)  # [B, C, D]
    rope = module.rope(positions)
    row_rope = module.rope(row_positions)
    mask = None if fresh else _visible(positions, filled)
    row_mask = _visible(row_positions, filled)  # [B, W, filled]
    for pruned, run in plan.runs(len(module.layers)):
        if not pruned:
            for index in run:
                h = _full_layer(module, index, h, rope, slots, cache, filled, mask)
            continue
        for index in run:
            cache.write(index, slots, *module.layers[index].keys_values(h, rope))
        if W:
            before = h.gather(1, row_index.expand(-1, -1, h.shape[2]))  # [B, W, D]
            f = before
            for index in run:
                f = _full_layer(module, index, f, row_rope, row_slots, cache, filled, row_mask)
            h = h.scatter(1, row_index.expand_as(f), f.where(row_valid, before))
    return h


def _full_layer(module, index, h, rope, slots, cache, filled, mask):
    """One layer at full depth: h [B, T, D] -> [B, T, D]; its K and V go to `slots` before anything is attended."""
    layer = module.layers[index]
    q, k, v = layer.queries_keys_values(h, rope)
    cache.write(index, slots, k, v)
    k, v = cache.read(index, filled)
    attended = causal_attention(q, k, v, layer.scale) if mask is None else masked_attention(q, k, v, mask, layer.scale)
    return layer.update(h, attended)


def _visible(positions: torch.Tensor, filled: int) -> torch.Tensor:
    """Which of the first `filled` slots each token may attend, up to its own: [B, T] -> [B, T, filled] bool."""
    return torch.arange(filled, device=positions.device) <= positions[..., None]
