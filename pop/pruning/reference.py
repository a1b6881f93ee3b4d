"""Prefill-only pruning in one page: the method, naive and without a cache. Start reading here.

A transformer layer does two things for a token. It updates the token's residual stream h, and it offers K and V for
later tokens to attend. Prefill-only pruning (He et al., Findings of ACL 2026) drops the first for most of the prompt,
and keeps the second:

- A *pruned* token skips the layers of the plan. Its h passes through unchanged, but each skipped layer's K and V are
  still computed from that h ("independent KV projections"). A calibrated plan has its own matrices for these, and may
  approximate by another what skipped layers would have added to h.
- A *full-depth* token runs every layer. These are the last prompt token, whose logits predict the first new token
  ("boundary handling"), and every generated token. A plan may add others: by position, or by the attention they get.

Each token has one residual stream, so the method is one `torch.where`. The engine (pop/engine) computes the same
numbers without the wasted work, with a cache, in chunks and in ragged batches. The property tests hold it to this page.
"""

import dataclasses

import torch
import torch.nn.functional as F

from pop.models.images import TEXT, TextOnly
from pop.pruning.plan import POOLED, SELECTING, PrunePlan


def full_depth_tokens(
    prompt_length: int, num_tokens: int, plan: PrunePlan, scores: torch.Tensor | None = None
) -> torch.Tensor:
    """Which of `num_tokens` tokens run at full depth, [T] bool. The first `prompt_length` of them are the prompt.

    A plan that selects tokens needs the prompt's `attention_scores`. Then the result is [n, T], for each pruned layer.
    """
    position = torch.arange(num_tokens)
    full_depth = (position < plan.full_depth_first) | (position >= prompt_length - plan.full_depth_last)
    if count := plan.num_selected(int((~full_depth).sum())):
        selected = torch.zeros_like(full_depth)
        selected[scores.masked_fill(full_depth[:prompt_length], -1).topk(count).indices] = True
        full_depth = full_depth | selected & (torch.tensor(plan.layers) >= plan.selects_at)[:, None]
    return full_depth


@torch.no_grad()
def attention_scores(module, prompt: torch.Tensor, plan: PrunePlan, images: TextOnly = TEXT) -> torch.Tensor | None:
    """How much a prompt's last tokens attend each of its N tokens at the selecting layer: [N], or None.

    The softmax is over all tokens up to the query, even in a layer with a window. A token counts by its largest weight
    over queries and heads, since one head that looks the answer up is enough. These weights are averaged over a token
    and those before it. FastKV (Jo et al. 2025) averages over both sides, but what follows a place that is attended is
    what the answer needs next.
    """
    if not plan.full_depth_selected or not plan.layers:
        return None
    entering = []
    full_depth = full_depth_tokens(len(prompt), len(prompt), dataclasses.replace(plan, full_depth_selected=0.0))
    forward(module, prompt, full_depth, plan, images, entering)
    layer, h, rope = entering[plan.selects_at]
    q, k, _ = layer.queries_keys_values(h, rope)  # [1, N, H, E] and [1, N, K, E]
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)  # [1, N, H, E]
    products = layer.scale * torch.einsum("nhe,mhe->hnm", q[0].float(), k[0].float())  # [H, N, N]
    later = torch.ones_like(products, dtype=torch.bool).triu(1)
    received = products.masked_fill(later, -torch.inf).softmax(-1)[:, -SELECTING:].amax((0, 1))  # [N]
    return F.avg_pool1d(F.pad(received[None], (POOLED - 1, 0)), POOLED, stride=1)[0].cpu()


@torch.no_grad()
def forward(
    module, tokens: torch.Tensor, full_depth: torch.Tensor, plan: PrunePlan, images: TextOnly = TEXT, entering=None
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Run one sequence, in which the tokens that are not at full depth skip the layers of the plan.

    Args:
        module: a PrunableModel.
        tokens: [T] ids.
        full_depth: [T] bool, or [n, T] for each pruned layer.
        plan: the layers to skip, and where their K and V come from.
        images: what images bring to the prompt. Tokens after the prompt are text.
        entering: a list that receives each layer, the h [1, T, D] that enters it, and its rotation.

    Returns:
        logits [T, V] at every position, meaningless at pruned tokens, and each layer's k and v [T, K, E].
    """
    starts = {group[0] for is_pruned, group in plan.groups(len(module.layers), module.deepstack_layers) if is_pruned}
    full_depth = full_depth.to(tokens.device).expand(len(plan.layers), -1)  # [n, T]
    entering, cache, entered = [] if entering is None else entering, [], None

    def step(index, layer, h, rope, attend):
        nonlocal entered
        entering.append((layer, h, rope))
        if index in starts:
            entered = h  # the group of pruned layers that begins here
        skips = ~full_depth[plan.layers.index(index)] if index in plan.layers else torch.zeros_like(tokens).bool()

        def attend_pruned(layer, q, k, v):
            if plan.projections is not None and index in plan.layers:
                refit_k, refit_v = refit(layer, plan, index, entered, rope)
                k = torch.where(skips[:, None, None], refit_k, k)
                v = torch.where(skips[:, None, None], refit_v, v)
            cache.append((k[0], v[0]))
            return attend(layer, q, k, v)

        passed = h if plan.projections is None else updated(layer, plan, index, h, entered)
        return torch.where(skips[:, None], passed, layer(h, rope, attend_pruned))  # the method

    h = module.through_layers(tokens[None], images.extended(len(tokens)), step)  # [1, T, D]
    return module.head(h[0]), cache


def refit(layer, plan: PrunePlan, index: int, h: torch.Tensor, rope) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a pruned layer by a calibrated plan's projections: h [1, T, D] -> k and v [1, T, K, E].

    h entered the group of pruned layers that the layer belongs to; see projections.py.
    """
    inputs, number = refit_inputs(layer, plan, index, h), plan.layers.index(index)
    weight, bias = plan.projections.weight[number], plan.projections.bias[number]  # K's and V's
    k, v = inputs @ weight[0].T + bias[0], inputs @ weight[1].T + bias[1]
    if plan.projections.shared is not None:
        own = layer.projected(h)
        k, v = own[0] + k, own[1] + v
    return layer.placed(k, v, rope)


def refit_inputs(layer, plan: PrunePlan, index: int, h: torch.Tensor) -> torch.Tensor:
    """What a calibrated plan's matrices multiply: h [1, T, D] -> [1, T, taps * D], or [1, T, R] with codes."""
    x, refit = layer.normalised(h), plan.projections
    if refit.taps == 2:
        previous = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
        x = torch.cat((x, previous), dim=-1)
    return x if refit.shared is None else x @ refit.shared[refit.group[plan.layers.index(index)]].T


def updated(layer, plan: PrunePlan, index: int, h: torch.Tensor, entered: torch.Tensor) -> torch.Tensor:
    """A pruned token's h [1, T, D] after a layer. After the last layer of a group, a calibrated plan may update it."""
    refit = plan.projections
    if index not in plan.layers or index + 1 in plan.layers or refit.update is None:
        return h
    group = refit.group[plan.layers.index(index)]
    return h if group >= len(refit.update) else h + refit_inputs(layer, plan, index, entered) @ refit.update[group].T


def prefill(module, prompt: torch.Tensor, plan: PrunePlan, images: TextOnly = TEXT) -> torch.Tensor:
    """prompt [T] -> logits [V] of its boundary token."""
    scores = attention_scores(module, prompt, plan, images)
    full_depth = full_depth_tokens(len(prompt), len(prompt), plan, scores)
    logits, _ = forward(module, prompt, full_depth, plan, images)
    return logits[-1]


def generate(module, prompt: torch.Tensor, plan: PrunePlan, count: int, images: TextOnly = TEXT) -> list[int]:
    """The greedy continuation of prompt [T] by `count` tokens. Every step runs everything again."""
    tokens, scores = prompt, attention_scores(module, prompt, plan, images)
    for _ in range(count):
        full_depth = full_depth_tokens(len(prompt), len(tokens), plan, scores)
        logits, _ = forward(module, tokens, full_depth, plan, images)
        tokens = torch.cat((tokens, logits[-1].argmax()[None]))
    return tokens[len(prompt) :].tolist()
