"""Calibration's fit and loss, done naively."""

import math

import numpy as np
import torch

from pop import PrunePlan
from pop.pruning import reference


def naive_fit(model, windows, plan, taps, ridge, images=None):
    """W [n, 2, K * E, taps * D]: ridge regression toward the layer's own by lstsq, from hooks in naive passes.

    images: the Images of each window.
    """
    module = model.module
    xs, ys = {index: [] for index in plan.layers}, {(index, i): [] for index in plan.layers for i in (0, 1)}
    for window, seen in zip(windows, images or [None] * len(windows), strict=True):
        tokens = torch.tensor(window)
        entered, projected = {}, {}

        def record(store, key):
            def keep(_, args, out):
                store.setdefault(key, (args[0][0], out[0]))

            return keep

        first = torch.arange(len(window)) < plan.full_depth_first
        for store, run in (
            (entered, lambda: reference.forward(module, tokens, first, plan, seen)),  # noqa: B023
            (projected, lambda: module(tokens[None], *([] if seen is None else [seen]))),  # noqa: B023
        ):
            hooks = []
            for index in plan.layers:
                layer = module.layers[index]
                for name in ("input_layernorm", "self_attn.k_proj", "self_attn.v_proj"):
                    hook = record(store, (index, name))
                    hooks.append(layer.get_submodule(name).register_forward_hook(hook))
            run()
            for hook in hooks:
                hook.remove()
        for index in plan.layers:
            start = index
            while start - 1 in plan.layers and start > module.deepstack_layers:
                start -= 1
            h = entered[start, "input_layernorm"][0].double().numpy()
            x = h / np.sqrt((h**2).mean(-1, keepdims=True) + module.config.norm_eps)
            if taps == 2:
                x = np.concatenate([x, np.concatenate([np.zeros_like(x[:1]), x[:-1]])], axis=1)
            xs[index].append(x[plan.full_depth_first :])
            for i, name in enumerate(("self_attn.k_proj", "self_attn.v_proj")):
                ys[index, i].append(projected[index, name][1].double().numpy()[plan.full_depth_first :])
    out = []
    for index in plan.layers:
        layer, x = module.layers[index], np.concatenate(xs[index])
        gain = layer.input_layernorm.weight.detach().double().numpy() + (module.config.family == "gemma3")
        for i, linear in enumerate((layer.self_attn.k_proj, layer.self_attn.v_proj)):
            own = linear.weight.detach().double().numpy() * gain
            own = np.concatenate([own, np.zeros((len(own), (taps - 1) * own.shape[1]))], axis=1)
            y = np.concatenate(ys[index, i]) - (0 if linear.bias is None else linear.bias.detach().double().numpy())
            pull = math.sqrt(ridge * len(x))
            rows = np.concatenate([x, pull * np.eye(x.shape[1])])
            out.append(np.linalg.lstsq(rows, np.concatenate([y, pull * own.T]), rcond=None)[0].T)
    return torch.tensor(np.stack(out)).unflatten(0, (len(plan.layers), 2))


def naive_kl(model, plan, window, cut=None, images=None):
    """KL(full || pruned) summed over the last third of the window, or from a cut on, and the number of tokens."""
    tokens, cut = torch.tensor(window), cut or len(window) * 2 // 3
    full_depth = reference.full_depth_tokens(cut, len(window), plan)
    full, _ = reference.forward(model.module, tokens, full_depth, PrunePlan.none(), images)
    pruned, _ = reference.forward(model.module, tokens, full_depth, plan, images)
    p, q = (logits[cut - 1 :].double().log_softmax(-1) for logits in (full, pruned))
    return float((p.exp() * (p - q)).sum()), len(p)
