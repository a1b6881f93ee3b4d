"""Attention by its definition, and the method as the paper states it: token by token. Slow, and without a cache."""

import torch

from pop.models.layers import masked_attention
from pop.pruning import reference
from pop.pruning.plan import PrunePlan


def attention(q, k, v, mask, scale):
    """q [B, T, H, E] attends k and v [B, N, K, E] where mask [B, T, N] is true -> [B, T, H * E], all in float64."""
    G = q.shape[2] // k.shape[2]
    q, k, v = q.double(), *(x.double().repeat_interleave(G, dim=2) for x in (k, v))
    scores = torch.einsum("bthe,bnhe->bhtn", q, k) * scale
    weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhtn,bnhe->bthe", weights, v).flatten(2)


@torch.no_grad()
def token_by_token(module, tokens, plans, ends=None, again=None):
    """Run tokens one after the other. Each token has a plan and skips its layers.

    Corrections take the state that entered the group of pruned layers at this token, and that of the token before it,
    whether or not that token was pruned.

    Args:
        module: a PrunableModel.
        tokens: [T] ids.
        plans: a plan for each token. A plan without layers stands for full depth.
        ends: the layer from which on each token runs at full depth. None: no layer.
        again: by position, a layer and the positions of earlier tokens, in order. Before this token, these run at full
            depth from that layer on.

    Returns:
        logits [T, V], and K and V [2, L, T, K, E].
    """
    kv = [[None] * len(tokens) for _ in module.layers]  # a list of (k, v), one a token, for each layer
    entered = [[None] * len(tokens) for _ in module.layers]  # a list of h, one a token, for each layer
    logits = []
    ends = ends or [len(module.layers)] * len(plans)

    def run(position, plan, end, h, begin=0, is_again=False):
        rope = module.rope(torch.tensor([[position]]))
        for index, layer in list(enumerate(module.layers))[begin:]:
            if not is_again:  # codes keep the states of the first time
                entered[index][position] = h
            q, k, v = layer.queries_keys_values(h, rope[layer.window])
            is_pruned = index in plan.layers and index < end
            if is_pruned and plan.corrections is not None:
                start = index
                while start - 1 in plan.layers and start > module.deepstack_layers:
                    start -= 1
                eps = module.config.norm_eps
                states = entered[start][position], entered[start][position - 1]
                x, before = (x / (x.square().mean(-1, keepdim=True) + eps).sqrt() for x in states)
                number = plan.layers.index(index)
                group = sum(other - 1 not in plan.layers for other in plan.layers[: number + 1]) - 1
                z = plan.corrections.shared[group] @ torch.cat((x, before), dim=-1)[0, 0]  # position 0 is never pruned
                own = layer.projected(entered[start][position])
                weight = plan.corrections.weight[number]
                k, v = layer.finished_keys_values(own[0] + weight[0] @ z, own[1] + weight[1] @ z, rope[layer.window])
                updates = [] if plan.corrections.update is None else plan.corrections.update
                if index + 1 not in plan.layers and group < len(updates):
                    h = h + updates[group] @ z
            kv[index][position] = (k, v)
            if not is_pruned:
                keys, values = (torch.cat(x, dim=1) for x in zip(*kv[index][: position + 1], strict=True))
                window = module.config.windows[index] or position + 1
                keys, values = keys[:, -window:], values[:, -window:]
                everything = torch.ones(1, 1, keys.shape[1], dtype=torch.bool)
                h = h + layer.attention_update(masked_attention(q, keys, values, everything, layer.scale))
                h = h + layer.mlp_update(h)
        return module.head(h[0, 0])

    for position, (plan, end) in enumerate(zip(plans, ends, strict=True)):
        layer, earlier = (again or {}).get(position, (0, []))
        for one in earlier:
            run(one, PrunePlan.none(), 0, entered[layer][one], layer, is_again=True)
        logits.append(run(position, plan, end, module.embed(tokens[None, position : position + 1])))
    kept = [[torch.cat(x, dim=1)[0] for x in zip(*pairs, strict=True)] for pairs in kv]  # [L][2] of [T, K, E]
    return torch.stack(logits), torch.stack([torch.stack(pair) for pair in kept], dim=1)


def selection_scores(layer, h, rope, begin=0, asking=16):
    """What decides which of the tokens `begin` and later a plan selects, token by token: [N].

    A token receives the most attention that any of the last 16 tokens gives it in any head, but only of the last
    `asking`, if those are fewer. Its score is the average of what it and the two tokens before it receive, since
    `short_averages` in tests/conftest.py makes POOLED 3. Tokens before `begin` do not count in the softmax, and lower
    the first averages.

    Args:
        layer: the selecting layer, which h [1, T, D] enters with a rotation.
    """
    q, k, _ = layer.queries_keys_values(h, rope)
    received = torch.zeros(h.shape[1] - begin)
    for query in range(max(begin, h.shape[1] - min(16, asking)), h.shape[1]):
        for head in range(q.shape[2]):
            keys = k[0, begin : query + 1, head * k.shape[2] // q.shape[2]]
            weights = (keys @ q[0, query, head] * layer.scale).softmax(0)
            received[: len(keys)] = received[: len(keys)].maximum(weights)
    averages = [sum(received[max(0, i - 2) : i + 1]) / 3 for i in range(len(received))]
    return torch.stack(averages).detach()


def scores_at_selecting_layer(module, tokens, full_depth, plan, chosen=None, begin=0, asking=16):
    """`selection_scores` of the state that reference.run_layers gives, for tokens [T] at full depth by position."""
    h, _ = reference.run_layers(module, tokens, full_depth, plan, selected=chosen, stop=plan.selects_at)
    layer = module.layers[plan.selects_at]
    rope = module.rope(torch.arange(len(tokens))[None])[layer.window]
    return selection_scores(layer, h, rope, begin, asking=asking)
