"""The full pass and the pruned one, teacher and student, with all that many pruned passes of one text share.

One full pass gives p, the teacher's predictions. It also gives h at layer r: the first pruned layer, or the selecting
layer if that is below it. This h is the same in a pruned pass. From there on the student carries only the full-depth
rows f through the pruned layers:

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
from pop.pruning.corrections import corrected_keys_values
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

    return entering, module.through_layers(tokens, images, step)


def first_layer(plan: PrunePlan) -> int:
    """Where the student begins: at the first pruned layer, or at the selecting layer if that is below it."""
    return min(plan.layers[0], plan.selects_at)


def student(module, plan: PrunePlan, h, cut: int, images: TextOnly) -> torch.Tensor:
    """The pass of pop/pruning/reference.py from `first_layer` on, in the dtype of h.

    Args:
        module, plan: As above. The projections may be in any dtype.
        h: [B, T, D], enters `first_layer`.
        cut: The length of the prompts. All later tokens run at full depth.

    Returns:
        [B, T, D] after the last layer, meaningless at pruned tokens.
    """
    B, T, _ = h.shape
    positions = torch.arange(T, device=h.device).expand(B, -1)  # [B, T]
    last_attended, ropes = images.last_attended(positions), module.rope(images.rotary(positions))
    by_position = full_depth_tokens(cut, T, dataclasses.replace(plan, full_depth_selected=0.0)).expand(B, -1)
    full_depth = by_position.to(h.device)  # [B, T]
    if plan.corrections is not None:
        cast = {name: x.to(h.dtype) for name, x in plan.corrections.tensors.items()}
        plan = dataclasses.replace(plan, corrections=plan.corrections.replaced(cast))

    def attend(layer, q, k, v):
        return module.causal_attention(q, k, v, layer.scale, layer.window, last_attended)

    def attend_rows(layer, q, k, v, *, of_prompt):
        k, v = (old.index_put(at, new) for old, new in zip(of_prompt, (k, v), strict=True))  # [B, T, K, E]
        return masked_attention(q, k, v, masks[layer.window], layer.scale)

    @torch.no_grad()
    def chosen(index, h):  # [B, T] bool, the full-depth tokens from a layer on
        if index != plan.selects_at:
            return full_depth
        rotary, others = images.rotary(torch.arange(cut).expand(B, -1)), ~by_position[:, :cut]
        count = torch.full((B,), plan.num_selected(int(others[0].sum())))
        selected = select(module, plan, h[:, :cut], rotary, torch.full((B,), cut), others, count)
        return full_depth | F.pad(selected, (0, T - cut))

    for whole in plan.groups(len(module.layers), module.deepstack_layers):
        group = [index for index in whole.layers if index >= first_layer(plan)]
        if not group:
            continue
        if whole.is_pruned:
            refit = whole.corrections
            at = full_depth.nonzero().view(B, -1, 2).unbind(-1)  # [B, R] each: as many in each row
            masks = {window: causal_mask(T, window, last_attended, h.device).expand(B, -1, -1)[at] for window in ropes}
            if refit is not None:
                x = module.layers[group[0]].normalised(h)
                z = refit.code(x, torch.zeros_like(x[:, 0]))
            f, passed = h[at], h if refit is None else refit.updated(h, z)  # [B, R, D] and [B, T, D]
            for number, index in enumerate(group):
                layer = module.layers[index]
                rope = ropes[layer.window]
                if refit is None:
                    k, v = layer.keys_values(h, rope)
                else:
                    k, v = corrected_keys_values(layer, h, z, refit.weight[number], refit.bias[number], rope)
                attend_pruned = functools.partial(attend_rows, of_prompt=(k, v))
                f = layer(f, tuple(table[at] for table in rope), attend_pruned)
            h = passed.index_put(at, f)
        else:
            for index in group:
                full_depth, layer = chosen(index, h), module.layers[index]
                h = checkpointed(layer, h, ropes[layer.window], attend)
        h = images.add_deepstack(h, group[-1])
    return h
