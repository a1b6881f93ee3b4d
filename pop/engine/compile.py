"""The stages through torch.compile: each is compiled once, for all layers of a model.

A decoder has many layers of one kind, so the layer is compiled, not the model. Its weights and its slice of the cache
are arguments, and sizes are symbols. torch compiles a size of 1 as a special case, so each stage has a few graphs:

    one batch row, or several
    one token, or several                 of a chunk, or of its full-depth rows, at full depth
    one image, or several of one size     in a vision tower

They serve every length of prompts, batches and caches, every size of images, and every set of pruned layers. A warm-up
runs each of them, before the first call that may need it. What depends on how torch.compile behaves is in this file.
Compiled code does not look at its layer again, so each call first looks for changes (parts.py).
"""

import copy
import dataclasses
import logging
import sys
import threading
import types
from functools import partial
from itertools import count

import torch

from pop.engine import forward, stages
from pop.engine.cache import KVCache
from pop.engine.decode_step import decode
from pop.engine.parts import Seen
from pop.engine.stages import Stages
from pop.errors import UnsupportedError
from pop.pruning.plan import PrunePlan

MOST_KINDS = 64  # of layers that a model compiles, so that endless changes do not compile endlessly
SMALLEST = 50_000_000  # parameters; a smaller model would answer before compilation ends

logger = logging.getLogger(__name__)


class Compiled:
    """The compiled stages of one model. `stages` returns them once they are warm for the call at hand.

    They get `replay`. If compiling fails, `required` raises UnsupportedError. Otherwise a warning is logged, and the
    model runs eagerly. If several processes share the model, `add_up` sums a tensor over them: all compile or none.
    """

    def __init__(self, module, stages: Stages, *, replay=None, required: bool, progress: bool, add_up=None):
        self.module, self.required, self.progress, self.add_up = module, required, progress, add_up
        self._eager = stages
        self._seen = Seen()
        compiled = (_CompiledStage(stage, self._seen) for stage in stages[:-2])
        self._compiled: Stages | None = Stages(*compiled, stages.linear, replay)  # None once compiling has failed
        self._vision_block = _CompiledStage(vision_block, self._seen)
        self._warm: set[tuple] = set()
        self._lock = threading.Lock()

    @property
    def works(self) -> bool:
        return self._compiled is not None

    @property
    def vision_module(self):
        """The module, with its vision tower's layers compiled."""
        if self.module.vision_blocks is None or not self.works:
            return self.module
        compiled = [partial(self._vision_block, block) for block in self.module.tower]
        return _with_replaced(self.module, self.module.vision_blocks, compiled)

    def stages(self, rows: int, plan=PrunePlan.none(), look: bool = True) -> Stages:  # noqa: B008 (frozen)
        """Stages that are warm for these rows and this kind of plan. Unless `look`, only new hooks are looked for."""
        with self._lock:
            if self.works and not self._seen.unchanged(look):
                self._seen.look((self.module, *self.module.layers, *self.module.tower))
            kinds = set(self._seen.values()) - {None}
            for refit in (None, plan.corrections):
                # torch compiles again for other numbers of threads.
                form = rows > 1, torch.get_num_threads(), refit and refit.rank
                wanted = {(*form, kind) for kind in kinds}
                if not wanted <= self._warm and self.works:
                    self._warm_up(rows > 1, refit and plan)
                    self._warm |= wanted
        return self._compiled or self._eager

    def _warm_up(self, several: bool, refit: PrunePlan | None) -> None:
        if self.progress and not self._warm:
            print("... compiling prefill and decode, up to a minute the first time", file=sys.stderr, flush=True)
        try:
            if self.add_up is not None and not self._warm:
                self._check_compilers()
            if len(self._seen.kinds) > MOST_KINDS:
                raise UnsupportedError(f"its layers have been of {len(self._seen.kinds)} kinds")
            # Otherwise each call would make tensors of floats, and x * y + z would be two operations.
            flag = "cpp.enable_floating_point_contract_flag"  # a bool in older versions of torch
            fused = {flag: type(getattr(torch._inductor.config, flag))("fast")}
            with torch._dynamo.config.patch(specialize_float=True), torch._inductor.config.patch(fused):
                self._run(several, refit)
        except Exception as error:  # no compiler, no headers, no Triton ...: each has its own exception
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if self.required:
                raise UnsupportedError(f"the model cannot be compiled here ({reason}); use compile='auto'") from error
            logger.warning("pop runs without torch.compile, which fails here: %s", reason)
            self._compiled = None

    def _check_compilers(self) -> None:
        """Compile a small function, and raise in all processes if one fails. In the warm-up, the others would wait."""
        failures, reason = torch.zeros(2, device=next(self.module.parameters()).device), None
        try:
            torch.compile(lambda x: x + 1)(failures)
        except Exception as error:
            reason, failures = error, failures + 1
        if self.add_up(failures).any():
            raise reason or UnsupportedError("another process cannot compile")

    @torch.inference_mode(False)  # as the engine
    @torch.no_grad()
    def _run(self, several: bool, refit: PrunePlan | None) -> None:
        """Run all stages on all kinds of input, or those of a calibrated plan."""
        config, weight = self.module.config, next(self.module.parameters())
        warming = Stages(*(stage.warm_up for stage in self._compiled[:-2]), *self._compiled[-2:])
        # torch takes two sizes that are equal now to be equal always. So no two sizes below are equal.
        taken = {3, config.hidden_size, config.num_kv_heads, config.head_dim, config.head_dim // 2}
        rows = _unlike(taken, 2) if several else 1
        pairs = ((a, b) for a in count(4) for b in range(a + 2, 2 * a) if not {a, b, a + b, a + b + 1} & taken)
        first, second = next(pairs)
        slots = _unlike(taken, 1000)

        def prompt(tokens: int) -> torch.Tensor:
            return torch.zeros(rows, tokens, dtype=torch.int64, device=weight.device)

        def prefill(plan: PrunePlan) -> KVCache:
            cache = KVCache(config, rows, slots, dtype=weight.dtype, device=weight.device)
            forward.prefill(self.module, prompt(first), cache, torch.full((rows,), first), plan, first, warming)
            return cache

        if refit is not None:
            prefill(dataclasses.replace(refit, full_depth_first=1, full_depth_last=1, full_depth_selected=0.0))
            return
        for block in {self._seen[block]: block for block in self.module.tower}.values():
            taken = {size for tensor in self.module.vision_block_inputs(1, 1) for size in tensor.shape}
            for N in (1, _unlike(taken, 2)):  # one image, and several
                self._vision_block.warm_up(block, *self.module.vision_block_inputs(N, _unlike(taken, 4)))
        cache = prefill(PrunePlan(tuple(range(config.num_layers))))
        forward.extend(self.module, prompt(second), cache, warming)
        decode(self.module, prompt(1)[:, 0], cache, warming)


def _unlike(taken: set[int], least: int) -> int:
    """The next size from `least` on that is not taken, and whose successor is not. Now both are taken."""
    size = next(size for size in count(least) if not {size, size + 1} & taken)
    taken.update((size, size + 1))
    return size


def vision_block(layer, h, *rope):
    """A layer of a vision tower: h [N, P, C] -> [N, P, C]."""
    return layer(h, *rope)


def _with_replaced(module: torch.nn.Module, path: str, new) -> torch.nn.Module:
    """A shallow copy of `module` with `new` as its submodule at `path`. All other submodules are shared."""
    shallow = copy.copy(module)
    shallow._modules = dict(module._modules)
    name, _, rest = path.partition(".")
    shallow._modules[name] = _with_replaced(module._modules[name], rest, new) if rest else new
    return shallow


class _CompiledStage:
    """A stage, compiled separately for one token and for several.

    torch tries the compiled versions of a code object one after the other, and keeps only a few. So each kind of input
    has its own copy of the code.
    """

    def __init__(self, stage, seen: Seen):
        self.eager, self.seen = stage, seen
        self.function = stage.func if isinstance(stage, partial) else stage
        self.defaults = stage.__defaults__ if self.function is stage else tuple(stage.keywords.values())
        self.compiled: dict[tuple, object] = {}

    def warm_up(self, layer, h, *args):
        """A call that no hook sees: layers that run as they are are left out. Its sizes are unlike each other."""
        return h if self.seen[layer] is None else self(layer, h, *args)

    def __call__(self, layer, h, *args):
        kind, one_token = self.seen[layer], h.shape[-2] == 1
        # Compiling takes longer than it saves for logits of several tokens, and for chunks of one pruned token.
        rare = (stages.head,) if not one_token else (stages.pruned_layer, stages.corrected_layer)
        if kind is None or self.function in rare:
            return self.eager(layer, h, *args)
        key = kind, one_token, torch.get_num_threads()
        if self.function in (stages.pruned_layer, stages.corrected_layer):
            *inputs, keys, values = args
            h, *inputs = (_as_owner(x) for x in (h, *inputs))
            args = (*inputs, keys, values)
        elif self.function is not stages.full_layer:
            h, *args = (_as_owner(x) for x in (h, *args))
        return (self.compiled.get(key) or partial(self._compile, key))(layer, h, *args)

    def _compile(self, key: tuple, *args):
        """The first call of its kind."""
        code, name = self.function.__code__.replace(), self.function.__name__
        function = types.FunctionType(code, self.function.__globals__, name, self.defaults)
        # No checks of layers, whose kind is in the key. Older versions of torch cannot leave them out.
        options = {"guard_filter_fn": lambda guards: [not g.is_global and g.name[:5] != "layer" for g in guards]}
        can_filter = hasattr(torch.compiler, "skip_guard_on_inbuilt_nn_modules_unsafe")
        options = options if can_filter else None
        self.compiled[key] = torch.compile(function, fullgraph=True, dynamic=True, options=options)
        return self.compiled[key](*args)


def _as_owner(x):
    """The same values as contiguous tensors that are not views. A contiguous view's memory is shared.

    Compiled code is specialised to the strides of its inputs, to the size of a view's base, and to an offset in memory
    that happens to equal a size.
    """
    if isinstance(x, tuple):
        return tuple(map(_as_owner, x))
    if not x.is_contiguous() or x.storage_offset():
        return x.clone(memory_format=torch.contiguous_format)
    if not x._is_view():
        return x
    strides = [x.shape[axis + 1 :].numel() for axis in range(x.dim())]
    return x.new_empty(0).set_(x.untyped_storage(), 0, x.shape, strides)
