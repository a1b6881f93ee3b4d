"""Prefill-only pruning in one page: the method, naive and without a cache. Start reading the code here.

A transformer layer does two things for a token. It updates the token's residual stream h, and it offers a key K and a
value V for later tokens to attend to. Prefill-only pruning (He et al., Findings of ACL 2026) drops the first for most
of the prompt, and keeps the second:

- A *pruned* token skips the layers of the plan. Its h passes through them unchanged. Each skipped layer still computes
  K and V from that h ("independent KV projections"), so that later tokens can attend to it.
- A *full-depth* token runs every layer. The last prompt token does, because its logits predict the first new token
  ("boundary handling"). Every generated token does. A plan may add the first and further last tokens of the prompt.
- A *selected* token is one to which the prompt's last tokens attend most in one layer, the selecting layer. It skips
  the pruned layers before that layer, and runs those after it.

Each token has one residual stream, so the method is one `torch.where`. The engine (pop/engine) computes the same
numbers without the wasted work, with a cache, in chunks and in ragged batches. The property tests hold it to this page.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pop.models.images import TEXT, Images
from pop.models.layers import KeysValues
from pop.pruning.plan import POOLED, SELECTING, Group, PrunePlan  # 20 and 16 tokens

# Shapes: T tokens, of which N are the prompt's, D numbers in h, H heads of width E for queries, K for keys and values,
# V tokens in the vocabulary, and R numbers in a code. k and v are keys and values. Their names in text are K and V.
# KeysValues are those of one layer, each [T, K, E], or [1, T, K, E] while the layers run.
# `images` below is what images bring to a prompt (pop/models/images.py). TEXT: it has none. Then `last_attended` is
# None, `at` returns TEXT, and `rotary`, `place` and `add_deepstack` return what they get.


def full_depth_tokens(prompt_length: int, num_tokens: int, plan: PrunePlan) -> Tensor:
    """Which of `num_tokens` tokens run at full depth by their position, [T] bool. The prompt comes first.

    These are the prompt's last `full_depth_last` tokens and all that are generated after it. By its plan, they are also
    the first `full_depth_first` tokens, and all tokens of a prompt shorter than `full_depth_below`.
    """
    return plan.at_full_depth(torch.arange(num_tokens), prompt_length)


@torch.no_grad()
def run_layers(
    module, tokens: Tensor, full_depth: Tensor, plan: PrunePlan,
    images: Images = TEXT, selected: Tensor | None = None, stop: int | None = None,
) -> tuple[Tensor, list[KeysValues]]:  # fmt: skip
    """Run one sequence through the layers. Tokens that are not at full depth skip the layers of the plan.

    Args:
        module: A PrunableModel.
        tokens: Ids [T].
        full_depth: The tokens that run every layer, [T] bool.
        plan: Says which layers the other tokens skip.
        images: What images bring to the prompt. Tokens after the prompt are text.
        selected: The prompt's tokens that skip only the pruned layers before plan.selects_at, [N] bool. None: no token.
        stop: The first layer that does not run. None: all layers run.

    Returns:
        h [1, T, D] after the last layer that has run, and K and V of each of these layers.
    """
    full_depth = full_depth.to(tokens.device)
    position = torch.arange(len(tokens), device=tokens.device)[None]  # [1, T]
    ropes = module.rope(images.rotary(position))  # cos and sin, by the layers' window (None: no window)
    images = images.at(position.cpu())
    last_attended = images.last_attended(position)
    keys_values = []

    h = images.place(module.embed(tokens[None]))  # [1, T, D]
    groups = plan.to(h.device, h.dtype).groups(len(module.layers), module.deepstack_layers)
    group_of = [group for group in groups for _ in group.layers]  # by layer
    for index, layer in enumerate(module.layers[:stop]):
        group = group_of[index]
        rope = ropes[layer.window]
        skips = ~full_depth & group.is_pruned  # [T]
        if selected is not None and index > plan.selects_at:
            skips[: len(selected)] &= ~selected
        if index == group.layers[0]:
            z = code(layer, group, h)  # None in kept groups, and in plans without corrections

        q, k, v = layer.queries_keys_values(h, rope)  # [1, T, H, E] and [1, T, K, E]
        if z is not None:
            k, v = corrected(layer, group, index, h, z, rope, skips, k, v)
        keys_values.append((k[0], v[0]))
        attended = module.causal_attention(q, k, v, layer.scale, layer.window, last_attended)
        updated = h + layer.attention_update(attended)
        updated = updated + layer.mlp_update(updated)

        passed = h if z is None or index < group.layers[-1] else with_update(group, h, z)
        h = torch.where(skips[:, None], passed, updated)  # the method
        h = images.add_deepstack(h, index)  # Qwen3-VL adds features of images after its first layers
    return h, keys_values


@torch.no_grad()
def forward(
    module, tokens: Tensor, full_depth: Tensor, plan: PrunePlan,
    images: Images = TEXT, selected: Tensor | None = None,
) -> tuple[Tensor, list[KeysValues]]:  # fmt: skip
    """Logits [T, V] at every position, meaningless at pruned tokens, and each layer's K and V. See `run_layers`."""
    h, keys_values = run_layers(module, tokens, full_depth, plan, images, selected)
    return module.head(h[0]), keys_values


def prefill(module, prompt: Tensor, plan: PrunePlan, images: Images = TEXT) -> Tensor:
    """The logits [V] of the boundary token of a prompt [T]."""
    selected = selected_tokens(module, prompt, plan, images)
    full_depth = full_depth_tokens(len(prompt), len(prompt), plan)
    logits, _ = forward(module, prompt, full_depth, plan, images, selected)
    return logits[-1]


def generate(module, prompt: Tensor, plan: PrunePlan, count: int, images: Images = TEXT) -> list[int]:
    """The greedy continuation of a prompt [T] by `count` tokens. Every step runs everything again."""
    selected = selected_tokens(module, prompt, plan, images)
    tokens = prompt
    for _ in range(count):
        full_depth = full_depth_tokens(len(prompt), len(tokens), plan)
        logits, _ = forward(module, tokens, full_depth, plan, images, selected)
        tokens = torch.cat((tokens, logits[-1].argmax()[None]))
    return tokens[len(prompt) :].tolist()


# The paper's method ends here. The rest is what calibrated plans and selected tokens add to it.


def code(layer, group: Group, h: Tensor) -> Tensor | None:
    """The code z [1, T, R] of each token, from which the group's layers compute their corrections. None without them.

    z_t = P [x_t ; x_{t-1}]. P is the group's `shared`. Below, U is in its `weight`, by layer, and A is its `update`.

    Args:
        layer: The group's first layer.
        group: The layer's group.
        h: [1, T, D], enters the layer. x_t is h_t, normalised without a weight, and x_{-1} is zero.
    """
    if group.corrections is None:
        return None
    x = layer.normalised(h)
    previous = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)  # [1, T, D]
    return torch.cat((x, previous), dim=-1) @ group.corrections.shared.T


def corrected(layer, group: Group, index: int, h, z, rope, skips, k, v) -> KeysValues:
    """The layer's k and v [1, T, K, E]. Tokens that skip it get others: its projections of h, plus U z.

    h [1, T, D] enters the layer, z [1, T, R] is the group's code, and skips [T] says which tokens skip the layer.
    """
    number = index - group.layers[0]
    correction = z @ group.corrections.weight[number].T  # [1, T, 2 * K * E]
    correction_k, correction_v = correction.chunk(2, dim=-1)
    own_k, own_v = layer.projected(h)  # before K's norm and rotary positions
    pruned_k, pruned_v = layer.finished_keys_values(own_k + correction_k, own_v + correction_v, rope)
    is_skipping = skips[:, None, None]
    return torch.where(is_skipping, pruned_k, k), torch.where(is_skipping, pruned_v, v)


def with_update(group: Group, h: Tensor, z: Tensor) -> Tensor:
    """A pruned token's h [1, T, D] after its group: h + A z if kept layers follow."""
    update = group.corrections.update
    return h if update is None else h + z @ update.T


def selected_tokens(module, prompt: Tensor, plan: PrunePlan, images: Images = TEXT) -> Tensor | None:
    """Which tokens of a prompt the plan selects by the attention that they receive, [N] bool. None: it selects none."""
    by_position = full_depth_tokens(len(prompt), len(prompt), plan)
    count = plan.num_selected(int((~by_position).sum()))
    if not count:
        return None
    scores = attention_scores(module, prompt, plan, images).masked_fill(by_position, -1)
    selected = torch.zeros_like(by_position)
    selected[scores.topk(count).indices] = True
    return selected.to(prompt.device)


@torch.no_grad()
def attention_scores(module, prompt: Tensor, plan: PrunePlan, images: Images = TEXT) -> Tensor:
    """How much a prompt's last tokens attend to each of its N tokens at the selecting layer, [N] on the CPU.

    The softmax is over all tokens up to the query, even in a layer with a window. A token counts by its largest weight
    over queries and heads, since one head that looks the answer up is enough. These weights are averaged over a token
    and those before it. FastKV (Jo et al. 2025) averages over both sides, but what the answer needs next is what
    follows an attended token.
    """
    by_position = full_depth_tokens(len(prompt), len(prompt), plan)
    h, _ = run_layers(module, prompt, by_position, plan, images, stop=plan.selects_at)
    layer = module.layers[plan.selects_at]
    position = torch.arange(len(prompt), device=prompt.device)[None]
    rope = module.rope(images.rotary(position))[layer.window]
    q, k, _ = layer.queries_keys_values(h, rope)  # [1, N, H, E] and [1, N, K, E]
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)  # [1, N, H, E]
    products = layer.scale * torch.einsum("nhe,mhe->hnm", q[0].float(), k[0].float())  # [H, N, N]
    later = torch.ones_like(products, dtype=torch.bool).triu(1)
    weights = products.masked_fill(later, -torch.inf).softmax(-1)
    received = weights[:, -SELECTING:].amax((0, 1))  # [N]
    return F.avg_pool1d(F.pad(received[None], (POOLED - 1, 0)), POOLED, stride=1)[0].cpu()
