"""The full pass and the pruned one, teacher and student, with all that many pruned passes of one text share.

One full pass gives p, the teacher's predictions. It also gives h at the first pruned layer r, which is the same in a
pruned pass. From there on the student carries only the full-depth rows f through the pruned layers:

    h, all tokens     ──── layers before r ────┬──── layers from r on ─────────────────► p      no gradients
                                               └── x ── W_l, b_l ── K, V of layer l
                                                                         │
    full-depth rows   f ── layer r ── ... ─────────────────────────── layer l ── ... ──► q      gradients of W_l and b_l

Kept layers after pruned ones run all tokens, from an h that a linear map A has updated. A also has gradients.
"""

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from pop.engine.selection import select
from pop.models.images import TextOnly
from pop.models.layers import causal_mask, masked_attention
from pop.pruning.plan import PrunePlan
from pop.pruning.reference import full_depth_tokens

# The backward pass recomputes the activations inside a checkpointed function, so they need not be kept.
checkpointed = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def teacher(module, tokens: torch.Tensor, images: TextOnly, layers) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """The full pass: tokens [B, T] -> h [B, T, D] that enters each of `layers`, and h after the last layer."""
    entering = {}

    def step(index, layer, h, rope, attend):
        if index in layers:
            entering[index] = h
        return layer(h, rope, attend)

    h = module.through_layers(tokens, images, step)
    return entering, h


def full_depth_rows(module, plan: PrunePlan, h: torch.Tensor, cut: int, images: TextOnly) -> torch.Tensor:
    """Which tokens run at full depth, [B, R] int64 in order: those of the plan in the prompts, and what follows `cut`.

    h [B, T, D] enters the first pruned layer.
    """
    B, T, _ = h.shape
    full_depth = full_depth_tokens(cut, T, dataclasses.replace(plan, full_depth_selected=0.0)).expand(B, -1)
    others = ~full_depth[:, :cut]
    count = plan.num_selected(int(others[0].sum()))
    rotary = images.rotary(torch.arange(cut).expand(B, -1))
    selected = select(module, plan, h[:, :cut], rotary, torch.full((B,), cut), others, torch.full((B,), count))
    R, full_depth = int(full_depth[0].sum()) + count, full_depth.to(h.device) | F.pad(selected, (0, T - cut))
    return (~full_depth).to(torch.uint8).argsort(dim=1, stable=True)[:, :R]  # full-depth tokens first, in order


def student(module, plan: PrunePlan, h, rows, images: TextOnly) -> torch.Tensor:
    """The pass of pop/pruning/reference.py from the first pruned layer on, in the dtype of h.

    Args:
        module, plan: As above. The projections may be in any dtype.
        h: [B, T, D], enters the first pruned layer.
        rows: [B, R] int64, which tokens run at full depth, in order.

    Returns:
        [B, R, D] after the last layer.
    """
    B, T, _ = h.shape
    at = torch.arange(B, device=h.device)[:, None], rows
    positions = torch.arange(T, device=h.device).expand(B, -1)  # [B, T]
    last_attended, ropes = images.last_attended(positions), module.rope(images.rotary(positions))
    masks = {window: causal_mask(T, window, last_attended, h.device).expand(B, -1, -1)[at] for window in ropes}
    if (refit := plan.projections) is not None:
        refit = refit.replaced({name: x.to(h.dtype) for name, x in refit.tensors.items()})

    def attend(layer, q, k, v):
        return module.causal_attention(q, k, v, layer.scale, layer.window, last_attended)

    def attend_rows(layer, q, k, v, *, of_prompt):
        k, v = (old.index_put(at, new) for old, new in zip(of_prompt, (k, v), strict=True))  # [B, T, K, E]
        return masked_attention(q, k, v, masks[layer.window], layer.scale)

    for is_pruned, group in plan.groups(len(module.layers), module.deepstack_layers):
        if group[0] < plan.layers[0]:
            continue
        if is_pruned:
            if refit is not None:
                x = module.layers[group[0]].normalised(h)
                x = refit.inputs(x, torch.zeros_like(x[:, 0]), group[0])
            f, passed = h[at], h if refit is None else refit.passed(h, x, group[-1])  # [B, R, D] and [B, T, D]
            for index in group:
                layer, number = module.layers[index], plan.layers.index(index)
                rope = ropes[layer.window]
                k, v = layer.projected(h) if refit is None or refit.shared is not None else (0, 0)  # [B, T, K * E] each
                if refit is not None:
                    found = F.linear(x, refit.weight[number].flatten(0, 1), refit.bias[number].flatten())
                    k, v = map(torch.add, found.chunk(2, dim=-1), (k, v))
                attend_pruned = functools.partial(attend_rows, of_prompt=layer.placed(k, v, rope))
                f = layer(f, tuple(table[at] for table in rope), attend_pruned)
            h = passed.index_put(at, f)
        else:
            for index in group:
                layer = module.layers[index]
                h = checkpointed(layer, h, ropes[layer.window], attend)
        h = images.add_deepstack(h, group[-1])
    return h[at]
