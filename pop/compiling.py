"""The engine's stages through torch.compile: each is compiled once, for all layers of a model.

A decoder has many layers of one kind, so the layer is what is compiled, not the model: its weights and its part of the
cache are arguments. Sizes are symbols in the compiled code, except that torch treats a size of 1 apart from all others.
That leaves a handful of graphs for each stage,

    one row, or several                   of the batch
    one token, or several                 of a chunk or of the full-depth rows
    fresh, or on a filled cache           if there are several tokens
    up to 4096 slots filled, or more      if there is one: on CPUs torch sums more numbers than that another way

whatever the lengths of prompts, batches and caches, and whichever layers a plan prunes. Each is run once, with a small
prompt, before the first call that needs it: then nothing compiles again.
"""

from __future__ import annotations

import functools
import sys
import threading
import types
from collections.abc import Callable
from itertools import count

import torch

from pop import engine
from pop.cache import KVCache
from pop.plan import PrunePlan

LONG = 4096  # filled slots, see above
SMALLEST = 50_000_000  # parameters; a smaller model answers before it is compiled


@functools.cache
def obstacle(device_type: str) -> str | None:
    """Why nothing can be compiled for this kind of device, or None. Compiles a tiny function to know."""
    try:
        _compile(_probe)(torch.zeros(8, device=device_type))
    except Exception as error:  # no compiler, no headers, no Triton ...: each has an exception of its own
        return f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return None


class Compiled:
    """The compiled stages of one model, which `stages` hands out once they are warm for the call at hand."""

    def __init__(self, module, *, device, dtype, progress: bool):
        self.module, self.device, self.dtype, self.progress = module, device, dtype, progress
        self._stages = engine.Stages(*(_CompiledStage(stage) for stage in engine.EAGER))
        self._warm: set[tuple] = set()
        self._lock = threading.Lock()

    def stages(self, rows: int, plan: PrunePlan) -> engine.Stages:
        """Stages that have every graph for this many rows and this kind of plan; the first call compiles."""
        projections = None if plan.projections is None else plan.projections.taps
        wanted = (rows > 1, bool(plan.layers), projections)
        with self._lock:
            if wanted not in self._warm:
                if self.progress and not self._warm:
                    print(
                        "... compiling prefill and decode, up to a minute the first time", file=sys.stderr, flush=True
                    )
                self._run(rows > 1, plan)
                self._warm.add(wanted)
        return self._stages

    @torch.no_grad()
    def _run(self, several: bool, plan: PrunePlan) -> None:
        """Run a prompt by the plan, one more on the filled cache at full depth, and a step of decode.

        torch takes two sizes for the same if they are equal when it compiles. Here none is equal to another.
        """
        config = self.module.config
        taken = {value for value in vars(config).values() if isinstance(value, int)} | {config.head_dim // 2}
        rows = _unlike(taken) if several else 1
        first = _unlike(taken, plan.full_depth_first + plan.full_depth_last + 3)  # tokens of the first prompt
        second = _unlike(taken, 3)
        filled = first + second
        while {filled, filled + 1} & taken:
            filled, second = filled + 1, second + 1
        taken |= {second, filled, filled + 1}
        cache = KVCache(config, rows, _unlike(taken, filled + 2) - 1, dtype=self.dtype, device=self.device)
        for tokens, by in ((first, plan), (second, PrunePlan.none())):
            prompt = torch.zeros(rows, tokens, dtype=torch.int64, device=self.device)
            lengths = torch.full((rows,), tokens)
            engine.prefill(self.module, prompt, cache, lengths, by, tokens, self._stages)
        engine.decode(self.module, prompt[:, 0], cache, self._stages)
        if not plan.layers:
            self._run_long(rows, _unlike(taken, LONG + 1))

    def _run_long(self, rows: int, filled: int) -> None:
        """A step of decode on a long cache, in one layer."""
        h = self.module.embed(torch.zeros(rows, 1, dtype=torch.int64, device=self.device))  # [B, 1, D]
        positions = torch.full((rows, 1), filled - 1, device=self.device)
        shape = (rows, filled + 2, self.module.config.num_kv_heads, self.module.config.head_dim)
        keys, values = (torch.zeros(shape, dtype=h.dtype, device=h.device) for _ in range(2))
        mask = torch.ones(rows, 1, filled, dtype=torch.bool, device=h.device)
        layer = self.module.layers[0]
        self._stages.full_layer(layer, h, self.module.rope(positions)[layer.window], positions, keys, values, mask)


def _unlike(taken: set[int], least: int = 2) -> int:
    """The next size from `least` up that is not taken; then it is."""
    size = next(size for size in count(least) if size not in taken)
    taken.add(size)
    return size


class _CompiledStage:
    """A stage, compiled for one token apart from several.

    torch keeps a few compiled versions of a function, told apart by its code, and then gives up; and on each call it
    tries one after the other until one fits.
    """

    def __init__(self, stage: Callable):
        self.stage = stage
        self.compiled: dict[bool, Callable] = {}

    def __call__(self, layer, h, *args):
        one_token = h.shape[-2] == 1
        if one_token not in self.compiled:
            self.compiled[one_token] = _compile(self.stage, fullgraph=True, dynamic=True)
        return self.compiled[one_token](layer, h, *args)


def _compile(function: Callable, **options) -> Callable:
    """torch.compile of a copy of the function, which shares no compiled version with any other copy."""
    copy = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(copy, **options)


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1
