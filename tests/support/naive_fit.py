"""Calibration's fit and losses, computed naively."""

import dataclasses
import math
from itertools import repeat

import numpy as np
import torch
from support.cases import assert_close

from pop import PrunePlan
from pop.calibration import refit
from pop.calibration.refit import RIDGE
from pop.models.images import TEXT
from pop.pruning import reference

RECORDED = ("input_layernorm", "self_attn.k_proj", "self_attn.v_proj", "")


def fitted(model, windows, plan, rank=None, ridge=RIDGE) -> PrunePlan:
    """The plan with the library's fit to windows. By default its rank is full."""
    (found,) = refit.fitted(model, windows, plan, 2 * model.config.hidden_size if rank is None else rank, [ridge])
    return found


def assert_fit(module, found, keys_values, updates):
    """Compare Corrections of full rank with a naive fit, by the matrices that compute K and V, and updates of h."""
    own = own_projections(module, found.layers)
    assert_close(whole_projections(module, found), own + keys_values.float(), "K and V:")
    assert (found.update is None) == (updates is None)
    if updates is not None:
        assert_close(found.update @ found.shared[: len(found.update)], updates.float(), "updates of h:")


def own_projections(module, layers):
    """The matrices [n, 2, K * E, 2 * D] by which layers compute K and V from normalised states x_t and x_{t-1}."""
    own = []
    for index in layers:
        layer = module.layers[index]
        gain = norm_gain(module, index)
        for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            weight = linear.weight.detach() * (1 if gain is None else gain)
            own.append(torch.cat((weight, torch.zeros_like(weight)), dim=1))
    return torch.stack(own).unflatten(0, (-1, 2))


def norm_gain(module, index):
    """What the norm before a layer's attention multiplies with, [D]. None: the layer has no such norm, as in OLMo-2."""
    norm = module.layers[index].input_layernorm
    if isinstance(norm, torch.nn.Identity):
        return None
    return norm(torch.full((module.config.hidden_size,), 1e4)).detach()  # so large that eps does not count


def whole_projections(module, corrections):
    """The same with corrections: the layers' own matrices, and U P."""
    shared = torch.cat([corrections.group(range(index, index + 1)).shared[None] for index in corrections.layers])
    return own_projections(module, corrections.layers) + torch.einsum("nkir,nrd->nkid", corrections.weight, shared)


def naive_fit(model, windows, plan, ridge, images=None):
    """Ridge regression toward no correction by lstsq, from what hooks record in naive passes.

    Args:
        plan: its corrections' updates of h are used. The fit of each depends on those before it only.
        images: the Images of each window, or None for text.

    Returns:
        The corrections of K and V [n, 2, K * E, 2 * D], and of h [g, D, 2 * D], or None if h needs none.
    """
    module, first = model.module, plan.full_depth_first
    ends = [index for index in plan.layers if index + 1 not in (*plan.layers, len(module.layers))]

    def start(index):  # of the group of pruned layers
        return start(index - 1) if index - 1 in plan.layers else index

    final = {start(end) for end in ends}  # groups that are solved before lambda is chosen
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
            previous = np.concatenate([np.zeros_like(x[:1]), x[:-1]])
            xs[index].append(np.concatenate([x, previous], axis=1)[first:])
            layer = module.layers[index]
            gain = norm_gain(module, index)
            attended = h if gain is None else x * gain.double().numpy()
            for i, name in enumerate(("self_attn.k_proj", "self_attn.v_proj")):
                linear = layer.get_submodule(name)
                own = attended @ linear.weight.detach().double().numpy().T
                own += 0 if linear.bias is None else linear.bias.detach().double().numpy()
                ys[index, i].append((full[index, name][1].double().numpy() - own)[first:])
            if index in ends:
                ys[index, "update"].append(full[index, ""][1].double().numpy()[first:] - h[first:])

    def solution(index, target):
        x, y = np.concatenate(xs[index]), np.concatenate(ys[index, target])
        if target == "update":  # the windows are one batch
            size = np.linalg.norm(y, axis=-1)
            y[size > refit.SINK * np.sort(size)[(len(size) - 1) // 2]] = 0
        pull = math.sqrt((RIDGE if start(index) in final else ridge) * len(x))
        rows = np.concatenate([x, pull * np.eye(x.shape[1])])
        padded = np.concatenate([y, np.zeros((x.shape[1], y.shape[1]))])
        return torch.tensor(np.linalg.lstsq(rows, padded, rcond=None)[0].T)

    keys_values = torch.stack([torch.stack([solution(index, i) for i in (0, 1)]) for index in plan.layers])
    updates = [solution(index, "update") for index in ends]
    return keys_values, torch.stack(updates) if updates else None


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
    return kl(full[cut - 1 :], pruned[cut - 1 :])


def kl(full, pruned):
    """KL(full || pruned) [...] of logits [..., V]."""
    p, q = (logits.double().log_softmax(-1) for logits in (full, pruned))
    return (p.exp() * (p - q)).sum(-1)


def naive_gradients(module, plan, rows, chosen, cut, images=None):
    """KL(full || pruned) at the tokens from `cut` on, a token, and its gradients for the corrections of the plan.

    It runs pop/pruning/reference.py row by row, with autograd.

    Args:
        rows: token ids [B, T].
        chosen: the selected tokens of the prompts [B, cut] bool.
        images: the Images of each row, or None for text.
    """
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in plan.corrections.tensors.items()}
    plan = dataclasses.replace(plan, corrections=plan.corrections.replaced(leaves))
    run_layers = reference.run_layers.__wrapped__  # without its no_grad
    losses = []
    for row, selected, shown in zip(rows, chosen, images or repeat(TEXT, len(rows)), strict=True):
        full_depth = reference.full_depth_tokens(cut, len(row), plan)
        selected = selected if selected.any() else None
        full, _ = run_layers(module, row, full_depth, PrunePlan.none(), shown)
        pruned, _ = run_layers(module, row, full_depth, plan, shown, selected)
        losses.append(kl(*(module.head(h[0, cut - 1 :]) for h in (full, pruned))))
    loss = torch.cat(losses).mean()
    return loss.item(), torch.autograd.grad(loss, [*leaves.values()])
