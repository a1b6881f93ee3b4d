"""The cost of a prefill, counted from shapes, and the largest speedup that pruning can reach.

A product of matrices [n, i] and [i, o] is n·i·o multiply-adds, and a multiply-add is two floating point operations
(FLOPs). Norms, rotations, activations and softmax are left out: they grow with D, not with D². Shape letters are those
of pop/models/layers.py. I is the width inside the MLP, and N tokens fill an empty cache.

    one token through a whole layer         q and o     2 · D·H·E
    (multiply-adds)                         k and v     2 · D·K·E
                                            MLP         3 · D·I         gate, up, down
                                            or experts  D·X + 3 · D·k·I (a token takes k of X experts)
    a token at position p attends to        QK' and PV  2 · H·E · (p + 1), or 2 · H·E · window if that is less
    the output head, on one row             D·V

In a kept layer all N tokens do all of this. They attend to N(N+1)/2 positions, the lower triangle. With a window they
attend to a band of it.

In a pruned layer only the W full-depth tokens do all of this. The other P = N - W tokens do k and v only.

A calibrated plan with codes of R numbers adds three products:

    codes of a group of pruned layers       2 · D·R     for all N tokens, from two states each
    the update of h after a group           D·R         for all N tokens, if kept layers follow
    k and v of a pruned layer               2 · K·E·R   for the P tokens

Tokens that the plan selects are counted as if they were evenly spread. After the selecting layer they belong to the W
tokens. To select them, the last Q tokens attend to all tokens at that layer once more. That layer's keys are projected
once more, too. This is not counted: it is 0.1 % of the whole, for SmolLM2 at 2,048 tokens.

    F(plan) = 2 · [ sum over kept layers    (N·(qo + kv + mlp) + attention of all N)
                  + sum over pruned layers  (P·(kv + corrections) + W·(qo + kv + mlp) + attention of the W)
                  + sum over their groups   (N·(codes + update))
                  + selection               (Q·D·H·E + Q·N·H·E)
                  + D·V ]

F(none) / F(plan) is the speedup of a prefill of text whose time is all arithmetic, at one rate. tools/bench/roofline.py
also counts the memory reads that bound short prompts on a GPU, and tools/bench/tower.py the vision tower, which no plan
makes cheaper.
"""

import torch
from torch import Tensor

from pop.pruning.plan import SELECTING, Group, PrunePlan


def speedup_limit(config, num_tokens: int, plan: PrunePlan, rank: int | None = None) -> float:
    """The speedup over a full prefill that the FLOPs allow: F(none) / F(plan). Arguments as in `prefill_flops`."""
    full = prefill_flops(config, num_tokens, PrunePlan.none())
    return full / prefill_flops(config, num_tokens, plan, rank)


def prefill_flops(config, num_tokens: int, plan: PrunePlan, rank: int | None = None) -> int:
    """FLOPs of the prefill of one prompt, up to its boundary token's logits.

    Args:
        config: The model's.
        num_tokens: N, the length of the prompt.
        plan: Which layers and tokens are pruned.
        rank: R, of corrections that the plan is to get. None: count the plan's own, if it has any.
    """
    if rank is None:
        rank = rank_of(plan)
    total = 2 * config.hidden_size * config.vocab_size + selection_flops(config, num_tokens, plan)
    for group in plan.groups(config.num_layers):
        full_depth = runs_group(plan, num_tokens, group)
        projected = 2 * int((~full_depth).sum()) * projected_weights(config, rank)
        for index in group.layers:
            total += layer_flops(config, index, full_depth) + projected
        if not full_depth.all():
            total += 2 * num_tokens * code_weights(config, group, rank)
    return total


# ---- Which tokens do what ----


def evenly_spread_tokens(plan: PrunePlan, num_tokens: int) -> Tensor:
    """The positions of selected tokens, as if they were evenly spread over the other tokens: int64."""
    position = torch.arange(num_tokens)
    others = position[~plan.at_full_depth(position, num_tokens)]
    count = plan.num_selected(len(others))
    middles = (2 * torch.arange(count) + 1) * len(others) // max(2 * count, 1)  # of `count` equal parts
    return others[middles]


def runs_group(plan: PrunePlan, num_tokens: int, group: Group) -> Tensor:
    """The tokens that run a group's layers whole, [N] bool. Of the others, the layers compute only K and V."""
    full_depth = plan.at_full_depth(torch.arange(num_tokens), num_tokens) | (not group.is_pruned)
    if group.is_pruned and group.layers[0] > plan.selects_at:
        full_depth[evenly_spread_tokens(plan, num_tokens)] = True
    return full_depth


# ---- What they cost ----


def layer_weights(config, num_tokens: int = 1) -> int:
    """The numbers in the matrices of a layer. Of its experts, if any, those that `num_tokens` tokens take at most."""
    D = config.hidden_size
    attention = 2 * D * (config.num_heads + config.num_kv_heads) * config.head_dim
    experts = getattr(config, "experts", None)
    if experts is None:
        return attention + 3 * D * config.intermediate_size
    taken = min(num_tokens * experts.per_token, experts.count)
    return attention + D * experts.count + taken * 3 * D * experts.width


def layer_flops(config, index: int, full_depth: Tensor) -> int:
    """FLOPs of a whole layer for the tokens in `full_depth` [N] bool."""
    num_tokens = len(full_depth)
    keys = torch.arange(1, num_tokens + 1).clamp(max=config.windows[index] or num_tokens)  # that each token attends to
    attention = 2 * int(keys[full_depth].sum()) * config.num_heads * config.head_dim
    return 2 * (int(full_depth.sum()) * layer_weights(config) + attention)


def rank_of(plan: PrunePlan) -> int:
    """The rank of a plan's corrections. 0 without any."""
    return 0 if plan.corrections is None else plan.corrections.rank


def projected_weights(config, rank: int) -> int:
    """The numbers in the matrices of k and v of one layer, and in corrections of a rank."""
    return 2 * config.num_kv_heads * config.head_dim * (config.hidden_size + rank)


def code_weights(config, group: Group, rank: int) -> int:
    """The numbers in the matrices of a group's codes, and of the update after it if kept layers follow."""
    matrices = 3 if group.layers.stop < config.num_layers else 2
    return matrices * config.hidden_size * rank


def selection_flops(config, num_tokens: int, plan: PrunePlan) -> int:
    """FLOPs of the attention by which the last tokens select others. 0 if the plan selects none."""
    queries = min(SELECTING, num_tokens) if len(evenly_spread_tokens(plan, num_tokens)) else 0
    return 2 * queries * config.num_heads * config.head_dim * (config.hidden_size + num_tokens)
