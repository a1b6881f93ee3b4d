"""Other methods that make a model cheaper, and POP with a part left out.

`shortgpt` removes the layers of the least block influence from both stages (Men et al. 2024).
`deepest-dropped` removes the deepest layers from both stages.
`slicegpt` cuts the least principal components of hidden states (Ashkboos et al. 2024), see slicegpt.py.
`no-kv` is POP without K/V projections: in pruned layers, decode attends only to the last prompt token.
`first-kv` is the same, but the first token, the attention sink, also runs at full depth and is attended to.
`no-boundary` is POP without boundary handling: the last prompt token is pruned like all others.
`constant-kv` and `embedding-kv` take K and V from too little, see controls.py.

Those in attended.py drop tokens. All are contenders. They are written to be read, not to be fast. Shape letters:
pop/models/layers.py.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

import pop
from pop.calibration.texts import SHORTEST, text_windows
from pop.engine.attention import write
from pop.errors import InputError
from tools.evaluate.contender import Contender, OneByOne
from tools.evaluate.passes import WithGaps, attend_prompt, embed, visible, write_and_attend

# ---- Layers removed from both stages ----


def deepest_dropped(model: pop.Model, fraction: float, windows=None) -> Contender:
    """Remove the deepest floor(L * fraction) layers."""
    layers = pop.PrunePlan.deepest(model.config.num_layers, fraction).layers
    return Contender("deepest-dropped", without_layers(model, layers), pop.PrunePlan.none())


def shortgpt(model: pop.Model, fraction: float, windows: list[torch.Tensor]) -> Contender:
    """Remove the floor(L * fraction) layers of the least block influence on the calibration `windows`."""
    count = len(pop.PrunePlan.deepest(model.config.num_layers, fraction).layers)
    layers = block_influence(model, windows).argsort(stable=True)[:count].tolist()
    return Contender("shortgpt", without_layers(model, layers), pop.PrunePlan.none())


@torch.no_grad()
def block_influence(model: pop.Model, windows: list[torch.Tensor]) -> torch.Tensor:
    """BI_l = 1 - E[cos(h before layer l, h after it)] over all tokens: [L] (Men et al. 2024, equation 1).

    windows: token ids, each [T], as `calibration_windows` makes them.
    """
    module = model.module
    totals = torch.zeros(len(module.layers), dtype=torch.float64)
    for window in windows:
        h, rope = embed(module, window)
        for index, layer in enumerate(module.layers):
            after = layer(h, rope[layer.window], attend_prompt)
            similar = F.cosine_similarity(h.double(), after.double(), dim=-1)  # [1, T]
            totals[index] += (1 - similar).sum().cpu()
            h = after
    return totals / sum(map(len, windows))


def without_layers(model: pop.Model, layers: Iterable[int]) -> pop.Model:
    """A model without `layers` that shares the weights of `model`. Raises InputError if no layer would be left."""
    if len(set(layers)) == model.config.num_layers:
        raise InputError("a baseline would remove every layer; give it a smaller fraction")
    module = shared_copy(model.module)
    for index in sorted(layers, reverse=True):
        del module.layers[index]
    module.config = dataclasses.replace(model.config, num_layers=len(module.layers))
    return pop.Model(module, module.config, model.tokenizer, plan=None, max_seq_len=model.max_seq_len)


# ---- POP with a part taken out ----


class NoBoundary(OneByOne):
    """Every prompt token is pruned, even the last one: the first new token is predicted from its pruned state."""

    @torch.no_grad()
    def prefill(self, tokens: list[int], cache: pop.KVCache) -> torch.Tensor:
        module = self.model.module
        h, rope = embed(module, torch.tensor(tokens, device=self.model.device))
        slots = torch.arange(len(tokens), device=h.device)[None]  # [1, T]
        for index, layer in enumerate(module.layers):
            if index in self.plan.layers:
                k, v = layer.keys_values(h, rope[layer.window])
                write(cache.keys[index], cache.values[index], slots, k, v)
            else:
                h = layer(h, rope[layer.window], write_and_attend(cache, index, slots))
        cache.lengths += len(tokens)
        return module.head(h[0, -1])


class NoKV(WithGaps):
    """In pruned layers, only the boundary token writes K and V. It attends to itself, decode to it and new tokens."""

    first = 0  # leading tokens of the prompt that also run at full depth, and that all others attend to

    @torch.no_grad()
    def prefill(self, tokens: list[int], cache: pop.KVCache) -> torch.Tensor:
        module = self.model.module
        h, rope = embed(module, torch.tensor(tokens, device=self.model.device))
        h = h.clone()
        slots = torch.arange(len(tokens), device=h.device)  # [N]
        everyone = torch.ones_like(slots, dtype=torch.bool)
        at_full_depth = (slots < self.first) | (slots == len(tokens) - 1)  # [N]
        cache.present = []
        for index, layer in enumerate(module.layers):
            rows = at_full_depth if index in self.plan.layers else everyone
            present = rows.expand(module.config.num_kv_heads, -1)
            mask = None if rows is everyone else visible(slots[rows], present, layer.window)
            tables = [table[:, rows] for table in rope[layer.window]]
            h[:, rows] = layer(h[:, rows], tables, write_and_attend(cache, index, slots[None, rows], mask))
            cache.present.append(present)
        cache.lengths += len(tokens)
        return module.head(h[0, -1])


class FirstKV(NoKV):
    """As NoKV, but the first token also runs at full depth, and is attended to."""

    first = 1


def no_boundary(model: pop.Model, fraction: float, windows=None) -> Contender:
    """POP on the deepest layers without boundary handling."""
    return NoBoundary("no-boundary", model, pop.PrunePlan.deepest(model.config.num_layers, fraction))


def first_kv(model: pop.Model, fraction: float, windows=None) -> Contender:
    """POP on the deepest layers without K/V projections, except for the first token."""
    return FirstKV("first-kv", model, pop.PrunePlan.deepest(model.config.num_layers, fraction))


def no_kv(model: pop.Model, fraction: float, windows=None) -> Contender:
    """POP on the deepest layers without K/V projections."""
    return NoKV("no-kv", model, pop.PrunePlan.deepest(model.config.num_layers, fraction))


# ---- Shared with slicegpt.py and selection.py ----


def calibration_windows(model: pop.Model, texts: list, length: int = 512, most: int = 16) -> list[torch.Tensor]:
    """Cut texts into windows of token ids, each [T], as `pop.calibrate` does.

    Args:
        model: its tokenizer encodes strings.
        texts: strings or lists of token ids.
        length: the most tokens of a window.
        most: the most windows. From more, evenly spread ones are taken.
    """
    windows = text_windows(model, texts, None, None, min(length, model.max_seq_len))
    if not windows:
        raise InputError(f"no calibration text has {SHORTEST} tokens; give a longer one")
    step = max(1, math.ceil(len(windows) / most))
    return [torch.tensor(tokens, device=model.device) for tokens, _ in windows[::step]]


def shared_copy(module: nn.Module) -> nn.Module:
    """A copy whose structure can be changed. It shares the parameters of `module`."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})
