"""Calibration's fit and losses, computed naively."""

import dataclasses
import math
from itertools import repeat

import numpy as np
import torch
from support.cases import assert_close

from pop import PrunePlan
from pop.calibration.refit import RIDGES, _accumulate, _batches, _Fit
from pop.models.images import TEXT
from pop.pruning import reference

RECORDED = ("input_layernorm", "self_attn.k_proj", "self_attn.v_proj", "")


def fitted(model, windows, plan, taps, rank=None) -> _Fit:
    """The library's fit to windows, with its passes over them."""
    fit = _Fit(model, plan, taps, rank)
    for number in range(len(fit.groups)):
        for batch in _batches(windows):
            _accumulate(model, batch, [fit], number)
        fit.finish(number)
    return fit


def assert_fit(found, weight, update):
    """Compare Corrections with a naive fit."""
    assert_close(found.weight, weight.float())
    assert (found.update is None) == (update is None)
    if update is not None:
        assert_close(found.update, update.float())


def naive_fit(model, windows, plan, taps, ridge, images=None):
    """Ridge regression toward the layers' own projections by lstsq, from what hooks record in naive passes.

    Args:
        plan: its projections' updates of h are used. The fit of each depends on those before it only.
        images: the Images of each window, or None for text.

    Returns:
        W [n, 2, K * E, taps * D], and A [g, D, taps * D], or None if h needs no updates.
    """
    module, first = model.module, plan.full_depth_first
    ends = [index for index in plan.layers if index + 1 not in (*plan.layers, len(module.layers))]

    def start(index):  # of the group of pruned layers
        return start(index - 1) if index - 1 in plan.layers and index > module.deepstack_layers else index

    final = {start(end) for end in ends}  # groups that are solved before the judge chooses lambda
    targets = [(index, i) for index in plan.layers for i in (0, 1)] + [(index, "update") for index in ends]
    xs, ys = {index: [] for index in plan.layers}, {target: [] for target in targets}
    for window, shown in zip(windows, images or repeat(TEXT, len(windows)), strict=True):
        tokens = torch.tensor(window)
        full_depth = torch.arange(len(window)) < first
        pruned = recorded(module, plan.layers, reference.forward, module, tokens, full_depth, plan, shown)
        full = recorded(module, plan.layers, module, tokens[None], shown)
        for index in plan.layers:
            h = pruned[start(index), "input_layernorm"][0].double().numpy()
            x = h / np.sqrt((h**2).mean(-1, keepdims=True) + module.config.norm_eps)
            if taps == 2:
                x = np.concatenate([x, np.concatenate([np.zeros_like(x[:1]), x[:-1]])], axis=1)
            xs[index].append(x[first:])
            for i, name in enumerate(("self_attn.k_proj", "self_attn.v_proj")):
                ys[index, i].append(full[index, name][1].double().numpy()[first:])
            if index in ends:
                ys[index, "update"].append(full[index, ""][1].double().numpy()[first:] - h[first:])
    out, updates = [], []
    for index in plan.layers:
        layer, x = module.layers[index], np.concatenate(xs[index])
        pull = math.sqrt((RIDGES[0] if start(index) in final else ridge) * len(x))
        rows = np.concatenate([x, pull * np.eye(x.shape[1])])
        gain = layer.input_layernorm.weight.detach().double().numpy() + (module.config.family == "gemma3")
        for i, linear in enumerate((layer.self_attn.k_proj, layer.self_attn.v_proj)):
            own = linear.weight.detach().double().numpy() * gain
            own = np.concatenate([own, np.zeros((len(own), (taps - 1) * own.shape[1]))], axis=1)
            y = np.concatenate(ys[index, i]) - (0 if linear.bias is None else linear.bias.detach().double().numpy())
            out.append(np.linalg.lstsq(rows, np.concatenate([y, pull * own.T]), rcond=None)[0].T)
        if index in ends:
            y = np.concatenate(ys[index, "update"])
            padded = np.concatenate([y, np.zeros((x.shape[1], y.shape[1]))])
            updates.append(torch.tensor(np.linalg.lstsq(rows, padded, rcond=None)[0].T))
    weight = torch.tensor(np.stack(out)).unflatten(0, (len(plan.layers), 2))
    return weight, torch.stack(updates) if updates else None


def recorded(module, layers, function, *args):
    """Call function(*args). Returns the first input and output of parts of layers, as (index, name) -> [T, ...]."""
    found, hooks = {}, []
    for index in layers:
        for name in RECORDED:

            def keep(_, inputs, output, key=(index, name)):
                found.setdefault(key, (inputs[0][0].detach(), output[0].detach()))

            hooks.append(module.layers[index].get_submodule(name).register_forward_hook(keep))
    function(*args)
    for hook in hooks:
        hook.remove()
    return found


def naive_kl(model, plan, tokens, cut, images=TEXT):
    """KL(full || pruned) [len(tokens) - cut + 1] of each prediction after a prompt of the first `cut` tokens."""
    tokens = torch.tensor(tokens)
    full_depth = reference.full_depth_tokens(cut, len(tokens), plan)
    full, _ = reference.forward(model.module, tokens, full_depth, PrunePlan.none(), images)
    pruned, _ = reference.forward(model.module, tokens, full_depth, plan, images)
    p, q = (logits[cut - 1 :].double().log_softmax(-1) for logits in (full, pruned))
    return (p.exp() * (p - q)).sum(-1)


def naive_gradients(module, plan, rows, full_depth, cut, images=None):
    """KL(full || pruned) at the tokens from `cut` on, a token, and its gradients for the projections of the plan.

    It runs pop/pruning/reference.py row by row, with autograd.

    Args:
        rows: token ids [B, T].
        full_depth: of each row, as the reference takes it.
        images: the Images of each row, or None for text.
    """
    refit = plan.corrections
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in refit.tensors.items()}
    plan = dataclasses.replace(plan, corrections=refit.replaced(leaves))
    total = count = 0
    for row, mask, shown in zip(rows, full_depth, images or repeat(TEXT, len(rows)), strict=True):
        forward = reference.forward.__wrapped__  # without its no_grad
        full, _ = forward(module, row, torch.ones_like(row).bool(), PrunePlan.none(), shown)
        pruned, _ = forward(module, row, mask, plan, shown)
        p, q = (logits[cut - 1 :].double().log_softmax(-1) for logits in (full, pruned))
        total, count = total + (p.exp() * (p - q)).sum(), count + len(p)
    return total.item() / count, torch.autograd.grad(total / count, [*leaves.values()])
