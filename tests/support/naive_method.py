"""The method as the paper states it: token by token, each token through its own layers. Slow, and without a cache."""

import torch
import torch.nn.functional as F

from pop.models.layers import masked_attention


@torch.no_grad()
def token_by_token(module, tokens, plans):
    """Run tokens one after the other. Each token has a plan and skips its layers.

    Refit projections take the state that entered the group of pruned layers at this token. With two taps they also take
    the state at the token before it, whether or not that token was pruned.

    Args:
        module: a PrunableModel.
        tokens: [T] ids.
        plans: a plan for each token. A plan without layers stands for full depth.

    Returns:
        logits [T, V], and K and V [2, L, T, K, E].
    """
    kv = [[] for _ in module.layers]  # a list of (k, v), one a token, for each layer
    entered = [[] for _ in module.layers]  # a list of h, one a token, for each layer
    logits = []
    for position, plan in enumerate(plans):
        h = module.embed(tokens[None, position : position + 1])
        rope = module.rope(torch.tensor([[position]]))
        for index, layer in enumerate(module.layers):
            entered[index].append(h)
            q, k, v = layer.queries_keys_values(h, rope[layer.window])
            if index in plan.layers and plan.projections is not None:
                start = index
                while start - 1 in plan.layers and start > module.deepstack_layers:
                    start -= 1
                eps = module.config.norm_eps
                taps = [x / (x.square().mean(-1, keepdim=True) + eps).sqrt() for x in reversed(entered[start])]
                x = torch.cat(taps[: plan.projections.taps], dim=-1)  # position 0 is never pruned
                number = plan.layers.index(index)
                weight, bias = plan.projections.weight[number], plan.projections.bias[number]
                own, group = (0, 0), sum(other - 1 not in plan.layers for other in plan.layers[: number + 1]) - 1
                if plan.projections.shared is not None:
                    x, own = plan.projections.shared[group] @ x[0, 0], layer.projected(entered[start][-1])
                k, v = layer.placed(*(own[i] + F.linear(x, weight[i], bias[i]) for i in (0, 1)), rope[layer.window])
                updates = [] if plan.projections.update is None else plan.projections.update
                if index + 1 not in plan.layers and group < len(updates):
                    h = h + F.linear(x, updates[group])
            kv[index].append((k, v))
            if index not in plan.layers:
                keys, values = (torch.cat(x, dim=1) for x in zip(*kv[index], strict=True))
                window = module.config.windows[index] or position + 1
                keys, values = keys[:, -window:], values[:, -window:]
                everything = torch.ones(1, 1, keys.shape[1], dtype=torch.bool)
                h = h + layer.attention_update(masked_attention(q, keys, values, everything, layer.scale))
                h = h + layer.mlp_update(h)
        logits.append(module.head(h[0, 0]))
    kept = [[torch.cat(x, dim=1)[0] for x in zip(*pairs, strict=True)] for pairs in kv]  # [L][2] of [T, K, E]
    return torch.stack(logits), torch.stack([torch.stack(pair) for pair in kept], dim=1)


@torch.no_grad()
def attention_received(module, tokens, index, begin=0):
    """The attention that tokens `begin` and later receive from the last 8, at a layer of the plain model, over heads.

    A list of numbers. The last 8 are among these tokens, and earlier ones do not count in the softmax.
    """
    states, ropes = [], module.rope(torch.arange(len(tokens))[None])

    def step(_, layer, h, rope, attend):
        states.append(h)
        return layer(h, rope, attend)

    module.through_layers(tokens[None], step=step)
    layer = module.layers[index]
    q, k, _ = layer.queries_keys_values(states[index], ropes[layer.window])
    received = torch.zeros(len(tokens) - begin)
    for query in range(max(begin, len(tokens) - 8), len(tokens)):
        for head in range(q.shape[2]):
            keys = k[0, begin : query + 1, head * k.shape[2] // q.shape[2]]
            received[: len(keys)] += (keys @ q[0, query, head] * layer.scale).softmax(0)
    return received
