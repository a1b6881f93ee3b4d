"""Methods that keep the tokens to which the prompt's end attends most.

`fastkv` lets the deepest layers see a fifth of the prompt only, which makes prefill faster (Jo et al. 2025). The paper
does so with the deeper half of the layers. Its second part, which drops K and V of each layer's cache, is left out.
`snapkv` reads the prompt as the full model does, and then drops K and V, which makes decode cheaper (Li et al. 2024).

Both have FastKV's scores. SnapKV's authors score by 32 queries, and let each query head choose its own tokens. Here,
the query heads that share K and V choose together, and layers with a window are left as they are.

Shape letters: pop/models/layers.py; N is the length of a prompt.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

import pop
from pop.errors import InputError
from pop.pruning.cost import layer_flops, prefill_flops
from tools.evaluate.contender import Contender
from tools.evaluate.passes import WithGaps, embed, visible, write_and_attend

WINDOW = 8  # the last tokens of a prompt, whose queries give the scores. They are always kept
POOLED = 7  # scores are averages over so many neighbours


def scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """The attention that each token gets from the last ones: [K, N - WINDOW], summed over queries and query heads.

    It is averaged over POOLED neighbours.

    Args:
        q: [1, N, H, E].
        k: [1, N, K, E].
        scale: multiplies q k^T.
    """
    query = q[0, -WINDOW:].unflatten(1, (k.shape[2], -1))  # [WINDOW, K, G, E]
    products = scale * torch.einsum("qkge,tke->kgqt", query.float(), k[0].float())  # [K, G, WINDOW, N]
    later = torch.ones(WINDOW, WINDOW, dtype=torch.bool, device=q.device).triu(1)
    products[..., -WINDOW:].masked_fill_(later, -torch.inf)
    received = products.softmax(-1)[..., :-WINDOW].sum(2)  # [K, G, N - WINDOW]
    return F.avg_pool1d(received, POOLED, stride=1, padding=POOLED // 2).sum(1)


def kept(received: torch.Tensor, count: int) -> torch.Tensor:
    """Which of the N tokens to keep, for each row of scores [..., N - WINDOW]: the last ones, and those with most.

    count: how many tokens to keep, with the last ones.
    """
    most = received.topk(max(0, min(count - WINDOW, received.shape[-1])), dim=-1).indices
    is_kept = torch.zeros_like(received, dtype=torch.bool).scatter(-1, most, True)
    return F.pad(is_kept, (0, WINDOW), value=True)


@dataclasses.dataclass
class FastKV(WithGaps):
    """Layers before the plan's run all tokens. The last one without a window selects those for the plan's layers."""

    share: float = 1.0  # of the tokens, those that the plan's layers see

    @property
    def selecting(self) -> int:
        """The layer that selects."""
        layers = self.model.module.layers
        return max(index for index in range(self.plan.layers[0]) if layers[index].window is None)

    def flops(self, num_tokens: int) -> int:
        config = self.model.config
        selected = max(WINDOW, int(self.share * num_tokens + 1e-9))
        total = 2 * config.hidden_size * config.vocab_size  # the boundary token's logits
        total += 2 * WINDOW * num_tokens * config.num_heads * config.head_dim  # the scores
        for index in range(config.num_layers):
            runs = num_tokens if index < self.plan.layers[0] else selected
            total += layer_flops(config, index, torch.ones(runs, dtype=torch.bool))
        return total

    @torch.no_grad()
    def prefill(self, tokens: list[int], cache: pop.KVCache) -> torch.Tensor:
        module = self.model.module
        check_length(tokens)
        h, rope = embed(module, torch.tensor(tokens, device=self.model.device))
        slots = torch.arange(len(tokens), device=h.device)  # [N]
        rows = torch.ones_like(slots, dtype=torch.bool)  # the tokens that run the layer
        selected = rows
        first = self.plan.layers[0]
        cache.present = []
        for index, layer in enumerate(module.layers):
            if index == first:
                rows = selected
                h = h[:, rows]
            present = rows.expand(module.config.num_kv_heads, -1)
            tables = [table[:, rows] for table in rope[layer.window]]
            if index == self.selecting:
                q, k, _ = layer.queries_keys_values(h, tables)
                selected = kept(scores(q, k, layer.scale).sum(0), int(self.share * len(tokens) + 1e-9))
            mask = None if index < first else visible(slots[rows], present, layer.window)
            h = layer(h, tables, write_and_attend(cache, index, slots[None, rows], mask))
            cache.present.append(present)
        cache.lengths += len(tokens)
        return module.head(h[0, -1])


@dataclasses.dataclass
class SnapKV(WithGaps):
    """The full model's prefill, after which each K/V head keeps its own share of the prompt's tokens."""

    share: float = 1.0  # of the tokens, those that are kept

    def flops(self, num_tokens: int) -> int:
        return prefill_flops(self.model.config, num_tokens, self.plan)  # the full model's

    @torch.no_grad()
    def prefill(self, tokens: list[int], cache: pop.KVCache) -> torch.Tensor:
        module = self.model.module
        check_length(tokens)
        h, rope = embed(module, torch.tensor(tokens, device=self.model.device))
        slots = torch.arange(len(tokens), device=h.device)[None]  # [1, N]
        cache.present = []
        for index, layer in enumerate(module.layers):
            q, k, _ = layer.queries_keys_values(h, rope[layer.window])
            count = len(tokens) if layer.window else int(self.share * len(tokens) + 1e-9)
            cache.present.append(kept(scores(q, k, layer.scale), count))
            h = layer(h, rope[layer.window], write_and_attend(cache, index, slots))
        cache.lengths += len(tokens)
        return module.head(h[0, -1])


def check_length(tokens: list[int]) -> None:
    """Raise InputError if a prompt has no tokens but those that are always kept."""
    if len(tokens) <= WINDOW:
        raise InputError(f"fastkv and snapkv need a prompt of more than {WINDOW} tokens; give a longer one")


def fastkv(model: pop.Model, fraction: float, windows=None, share: float = 0.2) -> Contender:
    """The deepest floor(L * fraction) layers see a share of the tokens."""
    plan = pop.PrunePlan.deepest(model.config.num_layers, fraction)
    before = model.module.layers[: plan.layers[0] if plan.layers else 0]
    if len(before) == 0:
        raise InputError(f"fastkv's fraction is {fraction}; it must leave the first layers whole, and cut others")
    if all(layer.window for layer in before):
        raise InputError("fastkv needs a layer without a window before those that it cuts; give a smaller fraction")
    if not 0 < share <= 1:
        raise InputError(f"fastkv's share is {share}; it must be above 0, and at most 1")
    contender = FastKV("fastkv", model, plan, share=share)
    what = f"the deepest {len(plan.layers)} layers see {share:.0%} of the tokens"
    contender.method = f"FastKV's token propagation: {what}, which layer {contender.selecting} selects"
    return contender


def snapkv(model: pop.Model, fraction: float, windows=None) -> Contender:
    """`fraction` of the prompt's K and V is dropped in all layers without a window."""
    if not 0 <= fraction < 1:
        raise InputError(f"snapkv's fraction is {fraction}; it must be at least 0, and less than 1")
    method = f"SnapKV: {1 - fraction:.0%} of K and V kept, by the last {WINDOW} queries"
    return SnapKV("snapkv", model, pop.PrunePlan.none(), method, share=1 - fraction)
