"""Decode: a compiled model against the same module run eagerly, while its weights and hooks change between steps.

The compiled model records its steps and repeats them, so each change tests whether a record notices it. Where the
eager model fails, the compiled one may fail, or go on without the change.
"""

from contextlib import contextmanager
from pathlib import Path
from random import Random

import torch
from torch import nn

import pop
from tools.fuzz.cases import TEXT_IDS, Counting, check_close, random_model

CHANGES_A_ROUND = 20
TOLERANCE = 1e-4  # of the logits' standard deviation
ROUNDED = 0.05  # likewise, if a weight was rounded to bfloat16


@contextmanager
def with_data(weight: nn.Parameter, data: torch.Tensor):
    old = weight.data
    weight.data = data
    yield
    weight.data = old


CHANGES = {  # of a linear layer
    "other values": lambda part: with_data(part.weight, part.weight * 1.5),
    "other strides": lambda part: with_data(part.weight, part.weight.T.contiguous().T),
    "another dtype": lambda part: with_data(part.weight, part.weight.bfloat16()),
    "less memory": lambda part: with_data(part.weight, torch.zeros(1)),
    "a hook": lambda part: part.register_forward_hook(lambda part, args, out: out * 1.5),
}


class Loop(Counting):
    @torch.no_grad()
    def try_one(self, random: Random, folder: Path) -> None:
        model = random_model(random, folder)
        models = [pop.Model(model.module, model.config, compile=compile) for compile in (True, False)]
        linears = [part for part in model.module.model.modules() if isinstance(part, nn.Linear)]
        for _ in range(CHANGES_A_ROUND):
            tokens = random.choices(TEXT_IDS, k=10)
            _, unchanged = [decode(model, prefilled(model), tokens) for model in models]
            caches = [prefilled(model) for model in models]
            kind, change = random.choice([*CHANGES.items()])
            with change(random.choice(linears)):
                compiled, eager = [decode(*both, tokens) for both in zip(models, caches, strict=True)]
            if not isinstance(eager, Exception):
                check_close(compiled, eager, TOLERANCE)
            elif not isinstance(compiled, Exception):
                check_close(compiled, unchanged, ROUNDED)
            self.counts[kind] += 1


def prefilled(model: pop.Model) -> pop.KVCache:
    """A cache after a prefill and steps, which the compiled model records."""
    cache = model.new_cache(1, 64)
    model.prefill([[5, 6, 7]], cache)
    for token in (8, 9, 10):
        model.decode([token], cache)
    return cache


def decode(model: pop.Model, cache: pop.KVCache, tokens: list[int]) -> torch.Tensor | Exception:
    """The logits [N, V], or what is raised: for weights that do not fit, torch raises nearly anything."""
    try:
        return torch.cat([model.decode([token], cache) for token in tokens])
    except Exception as error:
        return error
