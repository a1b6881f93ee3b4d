"""What a prefill costs, counted from shapes alone, and the speedup that pruning can reach at best.

A product of matrices [n, i] and [i, o] is n·i·o multiply-adds, and a multiply-add is two floating point
operations (FLOPs). Norms, rotations, activations and softmax are left out: they grow with D, not with D².
Shape letters are those of models/layers.py, I is the width inside the MLP; N tokens fill an empty cache.

    one token through a whole layer         q and o     2 · D·H·E
    (multiply-adds)                         k and v     2 · D·K·E
                                            MLP         3 · D·I         gate, up, down
    a token at position p attends           QK' and PV  2 · H·E · (p + 1), or 2 · H·E · window, if that is less
    the output head, on one row             D·V

In a kept layer all N tokens do all of this, and they attend N(N+1)/2 positions, the lower triangle, or in a layer with
a window a band of it, even if the engine computes products outside of it as well. In a
pruned layer only the W full-depth tokens do; the other N - W do k and v and nothing else, from one input (taps = 1)
or, by refit projections with two taps, from two:

    F(plan) = 2 · [ sum over kept layers    (N·(qo + kv + mlp) + attention of all N)
                  + sum over pruned layers  ((N - W)·taps·kv + W·(qo + kv + mlp) + attention of the W)
                  + D·V ]

F(none) / F(plan) is the speedup of a prefill whose time is all arithmetic, and all of it equally fast.
"""

from __future__ import annotations

from collections import Counter

from pop.plan import PrunePlan


def prefill_flops(config, num_tokens: int, plan: PrunePlan) -> int:
    """FLOPs of prefilling one prompt of `num_tokens` tokens, up to its boundary token's logits."""
    everyone = range(num_tokens)
    full_depth = [p for p in everyone if p < plan.full_depth_first or p >= num_tokens - plan.full_depth_last]
    taps = 1 if plan.projections is None else plan.projections.taps
    projected = taps * (num_tokens - len(full_depth))
    kinds = Counter((layer in plan.layers, window) for layer, window in enumerate(config.windows))
    layers = sum(
        count * _layer_flops(config, window, *((full_depth, projected) if pruned else (everyone, 0)))
        for (pruned, window), count in kinds.items()
    )
    return layers + 2 * config.hidden_size * config.vocab_size


def speedup_limit(config, num_tokens: int, plan: PrunePlan) -> float:
    """The speedup over a full prefill that the shapes allow: FLOPs at full depth over FLOPs of `plan`."""
    return prefill_flops(config, num_tokens, PrunePlan.none()) / prefill_flops(config, num_tokens, plan)


def _layer_flops(config, window: int | None, positions, projected: int) -> int:
    """FLOPs of one layer with this window: the tokens at `positions` run whole, K and V are `projected` times more."""
    D, E = config.hidden_size, config.head_dim
    H, K = config.num_heads, config.num_kv_heads
    projections = len(positions) * 2 * D * H * E + (len(positions) + projected) * 2 * D * K * E
    mlp = len(positions) * 3 * D * config.intermediate_size
    attention = sum(p + 1 if window is None else min(p + 1, window) for p in positions) * 2 * H * E
    return 2 * (projections + mlp + attention)
