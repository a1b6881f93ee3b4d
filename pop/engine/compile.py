"""The engine's stages through torch.compile: each is compiled once, for all layers of a model.

A decoder has many layers of one kind, so the layer is what is compiled, not the model: its weights and its part of the
cache are arguments. Sizes are symbols in the compiled code, except that torch treats a size of 1 apart from all others.
That leaves a handful of graphs for each stage,

    one row, or several                   of the batch
    one token, or several                 of a chunk or of the full-depth rows
    fresh, or on a filled cache           if there are several tokens
    up to 4096 slots filled, or more      if there is one: on CPUs torch sums more numbers than that another way
    one image, or several of one size     of a vision tower

whatever the lengths of prompts, batches and caches, the sizes of images, and whichever layers a plan prunes. Each is
run once, with tiny prompts, before the first call that needs it: then nothing compiles again.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import threading
import types
from collections.abc import Callable
from itertools import count

import torch

from pop import engine
from pop.engine.cache import KVCache, empty_slots
from pop.errors import UnsupportedError
from pop.inputs.processors import processor_of
from pop.pruning.plan import PrunePlan

LONG = 4096  # filled slots, see above
SMALLEST = 50_000_000  # parameters; a smaller model answers before it is compiled

logger = logging.getLogger(__name__)


class Compiled:
    """The compiled stages of one model, which `stages` hands out once they are warm for the call at hand.

    required: raise UnsupportedError where nothing can be compiled, instead of a line in the log and eager stages.
    """

    def __init__(self, module, *, required: bool, progress: bool):
        self.module, self.required, self.progress = module, required, progress
        self._stages = engine.Stages(*(_CompiledStage(stage) for stage in engine.EAGER))
        self._warm: set[tuple] = set()
        self._lock = threading.Lock()

    @property
    def works(self) -> bool:
        """False once compiling has failed."""
        return self._stages is not engine.EAGER

    def stages(self, rows: int, plan: PrunePlan = PrunePlan.none()) -> engine.Stages:  # noqa: B008 (it is frozen)
        """Stages that have every graph for this many rows and this kind of plan; the first call compiles."""
        taps = None if plan.projections is None else plan.projections.taps
        with self._lock:
            for wanted in ((rows > 1, None), (rows > 1, taps)):
                wanted = (*wanted, *_circumstances())
                if wanted in self._warm or not self.works:
                    continue
                if self.progress and not self._warm:
                    note = "... compiling prefill and decode, up to a minute the first time"
                    print(note, file=sys.stderr, flush=True)
                try:
                    with torch._dynamo.config.patch(specialize_float=True):  # else each call makes tensors of them
                        self._run(rows > 1, plan if wanted[1] else None)
                except Exception as error:  # no compiler, no headers, no Triton ...: each has an exception of its own
                    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                    if self.required:
                        message = f"the model cannot be compiled here ({reason}); use compile='auto' or False"
                        raise UnsupportedError(message) from error
                    logger.warning("pop runs without torch.compile, which fails here: %s", reason)
                    self._stages = engine.EAGER
                self._warm.add(wanted)
        return self._stages

    @torch.no_grad()
    def _run(self, several: bool, refit: PrunePlan | None) -> None:
        """Run all stages on all kinds of input; `refit`: those that a calibrated plan adds.

        torch takes two sizes for the same if they are equal when it compiles. Here none is equal to another.
        """
        config, weight = self.module.config, next(self.module.parameters())
        vision, experts = (getattr(config, name, None) for name in ("vision", "experts"))
        parts = [part for part in (config, vision, experts) if part is not None]
        taken = {value for part in parts for value in vars(part).values() if isinstance(value, int)}
        taken |= {config.head_dim // 2, *((vision.hidden_size // vision.num_heads,) if vision else ())}
        taken.add(3)  # numbers that Seen.span has
        rows = _unlike(taken) if several else 1
        first, second = _unlike(taken, 4), _unlike(taken, 3)  # tokens of two prompts
        filled = first + second
        while {filled, filled + 1} & taken:
            filled, second = filled + 1, second + 1
        taken |= {second, filled, filled + 1}
        usual, slots, long = _unlike(taken, 1000), _unlike(taken, 1100) - 1, _unlike(taken, LONG + 1)

        def prompt(tokens: int) -> torch.Tensor:
            return torch.zeros(rows, tokens, dtype=torch.int64, device=weight.device)

        def prefill(tokens: int, plan: PrunePlan, chunk_size: int) -> KVCache:
            cache = KVCache(config, rows, slots, dtype=weight.dtype, device=weight.device)
            lengths = torch.full((rows,), tokens)
            engine.prefill(self.module, prompt(tokens), cache, lengths, plan, chunk_size, self._stages)
            return cache

        if refit is not None:
            refit = dataclasses.replace(refit, full_depth_first=1, full_depth_last=1)
            prefill(first, refit, first)
            prefill(3, refit, 1)  # token by token
            return
        for N in (1, _unlike(taken)):  # of a vision tower, one image and several
            if call := processor_of(config).layer_call(self.module, N, _unlike(taken, 4)):
                self._stages.vision_layer(*call)
        # The first step of decode has many slots to attend: it is for these that the compiler lays out its loops.
        cache = KVCache(config, rows, slots, dtype=weight.dtype, device=weight.device)
        cache.lengths = torch.full((rows,), usual - 1)
        engine.decode(self.module, prompt(1)[:, 0], cache, self._stages)
        everything = PrunePlan(tuple(range(config.num_layers)))
        prefill(first, everything, first)
        prefill(2, everything, 1)
        cache = prefill(first, PrunePlan.none(), first)
        engine.extend(self.module, prompt(second), cache, self._stages)

        # A step of decode on a long cache, in one layer of each kind.
        h = self.module.embed(prompt(1))  # [B, 1, D]
        positions = torch.full((rows, 1), long - 1, device=h.device)
        keys, values = (empty_slots(config, rows, long + 1, h.dtype, h.device) for _ in range(2))
        mask = torch.ones(rows, 1, long, dtype=torch.bool, device=h.device)
        ropes = self.module.rope(positions)
        for layer in {_kind(layer, engine.full_layer): layer for layer in self.module.layers}.values():
            seen = engine.Seen(ropes[layer.window], positions, mask)
            self._stages.full_layer(layer, h, *seen.arguments(keys, values))


def _unlike(taken: set[int], least: int = 2) -> int:
    """The next size from `least` up that is not taken; then it is."""
    size = next(size for size in count(least) if size not in taken)
    taken.add(size)
    return size


def _circumstances() -> tuple:
    """What torch compiles code anew for, without being asked."""
    return torch.get_num_threads(), torch.is_inference_mode_enabled()


class _CompiledStage:
    """A stage, compiled for one token apart from several.

    torch keeps a few compiled versions of a function, told apart by its code, and then gives up; and on each call it
    tries one after the other until one fits. So there are copies of the code, each with few versions.
    """

    def __init__(self, stage: Callable):
        self.stage = stage
        self.compiled: dict[tuple, Callable] = {}
        self.kinds: dict[torch.nn.Module, int] = {}  # layers that differ in nothing but weights have the same number
        self.known: dict[tuple, int] = {}

    def __call__(self, layer, h, *args):
        if layer not in self.kinds:
            self.kinds[layer] = self.known.setdefault(_kind(layer, self.stage), len(self.known))
        key = (self.kinds[layer], h.shape[-2] == 1, *_circumstances())
        if key not in self.compiled:
            copy = types.FunctionType(self.stage.__code__.replace(), self.stage.__globals__, self.stage.__name__)
            self.compiled[key] = torch.compile(copy, fullgraph=True, dynamic=True, options=_options())
        return self.compiled[key](layer, h, *args)


def _kind(layer: torch.nn.Module, stage: Callable) -> tuple:
    """What compiled code depends on in a layer: all but its weights' values, its window, which no stage reads, and the
    MLP where the stage is a pruned layer's. So in a model of dense and sparse layers that code is the same for both."""
    is_pruned = stage in (engine.pruned_layer, engine.refit_layer)
    parts = []
    for name, module in layer.named_modules():
        if is_pruned and name.split(".")[0] == "mlp":
            continue
        settings = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str)) and k != "window"}
        weights = {k: (v.shape, v.dtype, v.device) for k, v in module.named_parameters(recurse=False)}
        parts.append((name, type(module), tuple(sorted(settings.items())), tuple(sorted(weights.items()))))
    return tuple(parts)


def _on_tensors(guards) -> list[bool]:
    """Which of torch's guards to check on each call: those on h and the other tensors.

    Of a layer, its kind has been looked at; modules and global names do not change. To check these again on each call
    takes as long as a tenth of a small layer's decode.
    """
    return [not guard.is_global and not guard.name.startswith("layer") for guard in guards]


def _options() -> dict | None:
    """For torch.compile, which empties the dictionary; versions that cannot leave out guards check them all."""
    can_filter = hasattr(torch.compiler, "skip_guard_on_inbuilt_nn_modules_unsafe")
    return {"guard_filter_fn": _on_tensors} if can_filter else None
