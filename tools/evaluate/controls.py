"""Controls for refit projections: K and V of pruned layers from inputs that say little about the prompt.

`constant-kv` gives all tokens the same K and V: the full model's mean. K differs between tokens by its position only.
`embedding-kv` fits K and V to the tokens' embeddings, so they say which tokens there are, but not what came before.

What a refit gains beyond these comes from the hidden state. Like the refit, both run the first token at full depth and
choose K and V in closed form. Their pull is toward the mean, not toward the layers' own projections.
"""

from __future__ import annotations

import dataclasses

import torch

import pop
from pop.engine.attention import write
from pop.errors import InputError
from tools.evaluate.baselines import attend_prompt, embed, write_and_attend
from tools.evaluate.contender import Contender, OneByOne

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
        slots = torch.arange(len(tokens) - 1, device=h.device)[None]
        for index, layer in enumerate(module.layers):
            tables = rope[layer.window]
            if index in self.weights:
                W, b = self.weights[index]
                first, rest = ([table[:, rows] for table in tables] for rows in (slice(1), slice(1, None)))
                h[:, :1] = layer(h[:, :1], first, write_and_attend(cache, index, slots[:, :1]))
                write(*cache.layer(index), slots[:, 1:], *layer.placed(*(x @ W + b).chunk(2, dim=-1), rest))
            else:
                h = layer(h, tables, write_and_attend(cache, index, slots))
        cache.lengths += len(tokens) - 1
        return self.extend(tokens[-1:], cache)[0]  # the boundary token

    def flops(self, num_tokens: int) -> None:
        return None


def constant_kv(model: pop.Model, fraction: float, windows: list[torch.Tensor]) -> Contender:
    """POP on the deepest layers with constant K and V."""
    return _fitted("constant-kv", model, fraction, windows, constant=True)


def embedding_kv(model: pop.Model, fraction: float, windows: list[torch.Tensor]) -> Contender:
    """POP on the deepest layers with K and V fitted to the embedding."""
    return _fitted("embedding-kv", model, fraction, windows, constant=False)


@torch.no_grad()
def _fitted(name: str, model: pop.Model, fraction: float, windows: list[torch.Tensor], constant: bool) -> Contender:
    plan, module = pop.PrunePlan.deepest(model.config.num_layers, fraction), model.module
    D, n = model.config.hidden_size, sum(len(window) - 1 for window in windows)
    x, xx = torch.zeros(D, dtype=torch.float64), torch.zeros(D, D, dtype=torch.float64)  # sums over tokens
    sums = {}  # of y and x'y, by pruned layer
    for window in windows:
        h, rope = embed(module, window)
        X = normalised(module, h)[0, 1:].double().cpu()
        x, xx = x + X.sum(0), xx + X.T @ X
        for index, layer in enumerate(module.layers):
            if index in plan.layers:
                Y = torch.cat(layer.projected(h), dim=-1)[0, 1:].double().cpu()
                y, xy = sums.get(index, (0, 0))
                sums[index] = y + Y.sum(0), xy + X.T @ Y
            h = layer(h, rope[layer.window], attend_prompt)
    factor = torch.linalg.cholesky(xx - x[:, None] * x / n + RIDGE * n * torch.eye(D))
    weights = {}
    for index, (y, xy) in sums.items():
        W = torch.cholesky_solve(xy - x[:, None] * y / n, factor) * (not constant)
        weights[index] = tuple(part.to(model.device, model.dtype) for part in (W, (y - x @ W) / n))
    return FromEmbedding(name, model, plan, weights=weights)


def normalised(module, h: torch.Tensor) -> torch.Tensor:
    """h / rms(h), without a weight."""
    return module.layers[0].normalised(h)
