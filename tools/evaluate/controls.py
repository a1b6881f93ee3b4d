"""Controls for calibrated plans: K and V of pruned layers from inputs that say little about the prompt.

`constant-kv` gives all tokens the same K and V: the full model's mean. K differs between tokens by its position only.
`embedding-kv` fits K and V to the tokens' embeddings, so they say which tokens there are, but not what came before.

What a calibrated plan gains beyond these comes from the hidden state. Both controls also run the first token at full
depth and choose K and V in closed form. They shrink toward the mean, not toward the layers' own projections.
"""

from __future__ import annotations

import dataclasses

import torch

import pop
from pop.engine.attention import write
from pop.errors import InputError
from tools.evaluate.contender import Contender, OneByOne
from tools.evaluate.passes import attend_prompt, embed, write_and_attend

RIDGE = 0.1  # lambda of `embedding-kv`


@dataclasses.dataclass
class FromEmbedding(OneByOne):
    """Pruned layers take K and V from the normalised embedding x: x W + b."""

    weights: dict[int, tuple[torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=dict)
    # W [D, 2 * K * E] and b [2 * K * E], by pruned layer

    @torch.no_grad()
    def prefill(self, tokens: list[int], cache: pop.KVCache) -> torch.Tensor:
        if len(tokens) < 2:
            raise InputError("a control needs a prompt of at least 2 tokens; give a longer one")
        module = self.model.module
        h, rope = embed(module, torch.tensor(tokens[:-1], device=self.model.device))
        h = h.clone()
        x = normalised(module, h)[:, 1:]  # [1, T - 1, D], of the tokens that are neither first nor last
        slots = torch.arange(len(tokens) - 1, device=h.device)[None]  # [1, T - 1]
        for index, layer in enumerate(module.layers):
            tables = rope[layer.window]
            if index not in self.weights:
                h = layer(h, tables, write_and_attend(cache, index, slots))
                continue
            first = [table[:, :1] for table in tables]
            rest = [table[:, 1:] for table in tables]
            h[:, :1] = layer(h[:, :1], first, write_and_attend(cache, index, slots[:, :1]))
            W, b = self.weights[index]
            k, v = (x @ W + b).chunk(2, dim=-1)  # [1, T - 2, K * E] each
            k, v = layer.finished_keys_values(k, v, rest)
            write(cache.keys[index], cache.values[index], slots[:, 1:], k, v)
        cache.lengths += len(tokens) - 1
        return self.extend(tokens[-1:], cache)[0]  # the boundary token


def constant_kv(model: pop.Model, fraction: float, windows: list[torch.Tensor]) -> Contender:
    """POP on the deepest layers with constant K and V."""
    return _fitted("constant-kv", model, fraction, windows, constant=True)


def embedding_kv(model: pop.Model, fraction: float, windows: list[torch.Tensor]) -> Contender:
    """POP on the deepest layers with K and V fitted to the embedding."""
    return _fitted("embedding-kv", model, fraction, windows, constant=False)


@torch.no_grad()
def _fitted(name: str, model: pop.Model, fraction: float, windows: list[torch.Tensor], constant: bool) -> Contender:
    plan = pop.PrunePlan.deepest(model.config.num_layers, fraction)
    module = model.module
    D = model.config.hidden_size
    n = sum(len(window) - 1 for window in windows)
    x = torch.zeros(D, dtype=torch.float64)  # sums over tokens
    xx = torch.zeros(D, D, dtype=torch.float64)
    y = dict.fromkeys(plan.layers, 0)
    xy = dict.fromkeys(plan.layers, 0)
    for window in windows:
        h, rope = embed(module, window)
        X = normalised(module, h)[0, 1:].double().cpu()  # [T - 1, D]
        x += X.sum(0)
        xx += X.T @ X
        for index, layer in enumerate(module.layers):
            if index in y:
                Y = torch.cat(layer.projected(h), dim=-1)[0, 1:].double().cpu()  # [T - 1, 2 * K * E]
                y[index] = y[index] + Y.sum(0)
                xy[index] = xy[index] + X.T @ Y
            h = layer(h, rope[layer.window], attend_prompt)
    covariance = xx - x[:, None] * x / n
    factor = torch.linalg.cholesky(covariance + RIDGE * n * torch.eye(D))
    weights = {}
    for index in plan.layers:
        W = torch.cholesky_solve(xy[index] - x[:, None] * y[index] / n, factor)
        if constant:
            W = torch.zeros_like(W)
        b = (y[index] - x @ W) / n
        weights[index] = (W.to(model.device, model.dtype), b.to(model.device, model.dtype))
    return FromEmbedding(name, model, plan, weights=weights)


def normalised(module, h: torch.Tensor) -> torch.Tensor:
    """h / rms(h), without a weight."""
    return module.layers[0].normalised(h)
