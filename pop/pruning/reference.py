"""Prefill-only pruning in one page: the method itself, naive and without a cache. Start reading here.

A transformer layer does two things for a token: it updates the token's residual stream h, and it offers K and V
for later tokens to attend. Prefill-only pruning (He et al., Findings of ACL 2026) drops the first for most of the
prompt and keeps the second:

- a *pruned* token skips the layers of the plan: its h passes through unchanged, but each skipped layer's K and V
  are still computed from that h ("independent KV projections");
- a *full-depth* token runs every layer. These are the last prompt token, whose logits predict the first new token
  ("boundary handling"), and every generated token.

So each token has one residual stream, and the method is one `torch.where`. The engine (pop/engine/forward.py) computes the
same numbers without the wasted work, with a cache, in chunks and in ragged batches; the property tests hold it to
this page.
"""

from __future__ import annotations

import torch

from pop.models.layers import Images, causal_attention
from pop.pruning.plan import PrunePlan


def full_depth_tokens(prompt_length: int, num_tokens: int, plan: PrunePlan) -> torch.Tensor:
    """Which of `num_tokens` tokens, the first `prompt_length` of them a prompt, run at full depth: [T] bool."""
    position = torch.arange(num_tokens)
    return (position < plan.full_depth_first) | (position >= prompt_length - plan.full_depth_last)


@torch.no_grad()
def forward(
    module, tokens: torch.Tensor, full_depth: torch.Tensor, plan: PrunePlan, images: Images | None = None
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Run tokens [T] through `module`, those not in full_depth [T] bool without the layers of the plan.

    images: of this one prompt; tokens behind it are text. What they add to h behind a layer is added to pruned tokens,
    too, and tokens of an image that attend each other do so pruned or not.
    Returns logits [T, V] at every position (at a pruned one they mean nothing) and each layer's k, v [T, K, E].
    """
    h = module.embed(tokens[None])  # [1, T, D]
    rotary, reach = torch.arange(len(tokens), device=tokens.device)[None], None  # [1, T]
    if images is not None:
        images = images.extended(len(tokens))
        h, rotary, reach = images.place(h), images.rotary(rotary), images.reach(rotary)
    ropes = module.rope(rotary)
    starts = [run[0] for _, run in plan.runs(len(module.layers), module.deepstack_layers)]
    cache = []
    for index, layer in enumerate(module.layers):
        skips = (index in plan.layers) & ~full_depth.to(h.device)  # [T]
        if index in starts:
            entering = h  # the run of pruned layers that begins here, if one does
        rope = ropes[layer.window]
        q, k, v = layer.queries_keys_values(h, rope)
        if plan.projections is not None and index in plan.layers:
            refit_k, refit_v = refit(layer, plan, index, entering, rope)
            k = torch.where(skips[:, None, None], refit_k, k)
            v = torch.where(skips[:, None, None], refit_v, v)
        updated = layer.update(h, causal_attention(q, k, v, layer.scale, layer.window, reach))
        h = torch.where(skips[:, None], h, updated)
        if images is not None:
            h = images.deepen(h, index)
        cache.append((k[0], v[0]))
    return module.head(h[0]), cache


def refit(layer, plan: PrunePlan, index: int, h: torch.Tensor, rope) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a pruned layer by a calibrated plan's projections: h [1, T, D] -> k, v [1, T, K, E].

    h is what entered the run of pruned layers that the layer belongs to; see pop/pruning/projections.py.
    """
    number = plan.layers.index(index)
    x = layer.input_layernorm.normalise(h)
    if plan.projections.taps == 2:
        previous = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
        x = torch.cat((x, previous), dim=-1)
    weight, bias = plan.projections.weight[number], plan.projections.bias[number]  # K's and V's
    return layer.placed(x @ weight[0].T + bias[0], x @ weight[1].T + bias[1], rope)


def prefill(module, prompt: torch.Tensor, plan: PrunePlan, images: Images | None = None) -> torch.Tensor:
    """prompt [T] -> logits [V] of its boundary token."""
    logits, _ = forward(module, prompt, full_depth_tokens(len(prompt), len(prompt), plan), plan, images)
    return logits[-1]


def generate(module, prompt: torch.Tensor, plan: PrunePlan, count: int, images: Images | None = None) -> list[int]:
    """The greedy continuation of prompt [T] by `count` tokens; every step runs everything again."""
    tokens = prompt
    for _ in range(count):
        full_depth = full_depth_tokens(len(prompt), len(tokens), plan)
        logits, _ = forward(module, tokens, full_depth, plan, images)
        tokens = torch.cat((tokens, logits[-1].argmax()[None]))
    return tokens[len(prompt) :].tolist()
