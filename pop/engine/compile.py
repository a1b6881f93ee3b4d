"""The stages through torch.compile: one compiled graph serves all layers of a kind (changes.py).

A decoder has many layers of one kind, so the layer is compiled, not the model. Its weights and its slice of the cache
are arguments, and sizes are symbols. torch compiles a size of 1 as a special case, so each stage has a few graphs:

    one batch row, or several
    one token, or several                 of a chunk, or of its full-depth tokens
    one image, or several of one size     in a vision tower

They serve every length of prompts, batches and caches, every size of images, and every set of pruned layers. A warm-up
runs each of them, before the first call that may need it. What depends on how torch.compile behaves is in this file.
Compiled code does not look at its layer again, so each call first looks for changes (changes.py).
"""

import copy
import dataclasses
import logging
import sys
import threading
import types
from collections.abc import Callable
from functools import partial
from itertools import count, product

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

from pop.engine import forward, stages
from pop.engine.cache import KVCache
from pop.engine.changes import Kinds
from pop.engine.decode_step import decode
from pop.engine.modes import engine_modes
from pop.engine.stages import Stages
from pop.errors import UnsupportedError, reason_of
from pop.pruning.plan import PrunePlan

SMALLEST_COMPILED = 50_000_000  # parameters; a smaller model would answer before compilation ends

COMPILED = ("full_layer", "pruned_layer", "corrected_layer", "code", "received", "head")  # all functions of Stages
PRUNED = (stages.pruned_layer, stages.corrected_layer)

logger = logging.getLogger(__name__)


class ReadyStages:
    """The stages of one model, for calls: they look for changes of the module, and are warm if they are compiled.

    Args:
        module: A PrunableModel.
        replay, replayed_tokens: What the stages have (stages.py), unless a layer can only run as it is.
        compile: Whether to compile them.
        required: Whether a failure raises UnsupportedError. Otherwise a warning is logged, and the model runs eagerly.
        progress: Whether to print a line before the first compilation.
        is_shared: Whether several processes share the model, so that all of them compile or none does.
    """

    def __init__(
        self,
        module,
        replay=None,
        replayed_tokens: int = 0,
        *,
        compile: bool = False,
        required: bool = False,
        progress: bool = False,
        is_shared: bool = False,
    ):
        self.module = module
        self.replay = replay
        self.replayed_tokens = replayed_tokens
        self.required = required
        self.progress = progress
        self.is_shared = is_shared
        self._kinds = Kinds()
        self._stages = stages.EAGER
        self._compiled: dict[str, _CompiledStage] = {}  # empty also once compiling has failed
        if compile:
            self._compiled = {name: _CompiledStage(getattr(stages, name), self._kinds) for name in COMPILED}
        self._vision_block = _CompiledStage(vision_block, self._kinds)
        self._warm: set[tuple] = set()
        self._lock = threading.Lock()

    @property
    def works(self) -> bool:
        return bool(self._compiled)

    @property
    def vision_module(self):
        """The module, with its vision tower's layers compiled."""
        if self.module.vision_blocks is None or not self.works:
            return self.module
        compiled = [partial(self._vision_block, block) for block in self.module.tower]
        return _with_replaced(self.module, self.module.vision_blocks, compiled)

    def forget(self) -> None:
        """Look at all layers anew before the next call, and record decode steps again."""
        with self._lock:
            self._kinds.forget()

    def __call__(self, rows: int, plan=PrunePlan.none(), compare: bool = True) -> Stages:  # noqa: B008 (frozen)
        """Stages that are warm for these rows and this kind of plan. Unless `compare`, it looks for new hooks only."""
        with self._lock:
            if (self.works or self.replay) and not self._kinds.unchanged(compare):
                self._kinds.take_snapshots((self.module, *self.module.layers, *self.module.tower))
                self._renew()
            self._warm_up_once(rows > 1, PrunePlan.none())
            self._warm_up_once(rows > 1, plan)
        return self._stages

    def _renew(self) -> None:
        """Make another object of the stages, which no recorded step was made with."""
        decoder = (self.module, *self.module.layers)
        has_hooks = None in map(self._kinds.get, decoder)  # which a record would leave out
        self._stages = Stages(**self._compiled)
        if not has_hooks:
            self._stages = self._stages._replace(replay=self.replay, replayed_tokens=self.replayed_tokens)

    def _warm_up_once(self, several: bool, plan: PrunePlan) -> None:
        """Compile the graphs for one row, or for several, that are not compiled yet.

        PrunePlan.none() stands for the graphs that all plans need. Another plan may need more.
        """
        # Code is compiled for the rank of corrections, if there are any, and for a selection. A plain plan has neither.
        rank = plan.corrections and plan.corrections.rank
        forms = {("rank", rank), ("selects", plan.selects)}
        kinds = set(self._kinds.values()) - {None}
        # torch compiles again for other numbers of threads.
        wanted = set(product([several], [torch.get_num_threads()], forms, kinds))
        if self.works and not wanted <= self._warm:
            self._warm_up(several, plan)
            self._warm |= wanted

    def _warm_up(self, several: bool, plan: PrunePlan) -> None:
        if self.progress and not self._warm:
            print("... compiling prefill and decode, about half a minute the first time", file=sys.stderr, flush=True)
        try:
            if self.is_shared and not self._warm:
                self._check_compilers()
            # "fast" lets the C++ compiler fuse x * y + z. In older versions of torch the flag is a bool, here True.
            flag = "cpp.enable_floating_point_contract_flag"
            fused = {flag: type(getattr(torch._inductor.config, flag))("fast")}
            # Floats become constants. Otherwise each call would make tensors of them.
            with torch._dynamo.config.patch(specialize_float=True), torch._inductor.config.patch(fused):
                self._run(several, plan)
        except Exception as error:  # no compiler, no headers, no Triton ...: each has its own exception
            reason = reason_of(error)
            if self.required:
                raise UnsupportedError(f"the model cannot be compiled here ({reason}); use compile='auto'") from error
            logger.warning("pop runs without torch.compile, which fails here: %s", reason)
            self._compiled = {}
            self._renew()

    def _check_compilers(self) -> None:
        """Compile a small function, and raise in all processes if one fails. In the warm-up, the others would wait."""
        failures = torch.zeros(2, device=next(self.module.parameters()).device)
        reason = UnsupportedError("another process cannot compile")
        try:
            torch.compile(lambda x: x + 1)(failures)
        except Exception as error:
            reason = error
            failures = failures + 1
        if self.module.largest_of_processes(failures).any():
            raise reason

    @engine_modes()
    def _run(self, several: bool, plan: PrunePlan) -> None:
        """Run the stages of all plans on all kinds of input, or those of a plan that prunes layers.

        If two sizes are equal at compile time, torch assumes that they always are. So no two sizes here are equal.
        """
        config = self.module.config
        weight = next(self.module.parameters())
        warm_ups = {name: stage.warm_up for name, stage in self._compiled.items()}
        warming = Stages(**warm_ups)
        taken = {3, config.num_kv_heads, config.head_dim, config.head_dim // 2}
        taken.update(size for parameter in self.module.parameters() for size in parameter.shape)
        rows = _unlike(taken, 2) if several else 1
        # Inductor tunes kernels for GPUs with these sizes, so they are those of a usual prompt there.
        first = _unlike(taken, 500 if weight.is_cuda else 4)
        second = _unlike(taken | {size - first for size in taken}, first + 2)  # `extend` adds both to one cache
        slots = _unlike(taken, 1200)

        def prompt(tokens: int) -> Tensor:
            return torch.zeros(rows, tokens, dtype=torch.int64, device=weight.device)

        def prefill(plan: PrunePlan) -> KVCache:
            cache = KVCache(config, rows, slots, dtype=weight.dtype, device=weight.device)
            lengths = torch.full((rows,), first)
            forward.prefill(self.module, prompt(first), cache, lengths, plan, first, warming)
            return cache

        if plan.layers:
            share = 0.5 if plan.selects else 0.0
            plan = dataclasses.replace(
                plan, full_depth_first=1, full_depth_last=1, full_depth_below=0, full_depth_selected=share
            )
            prefill(plan)
            return
        self._run_vision_blocks()
        cache = prefill(PrunePlan(tuple(range(config.num_layers))))
        forward.extend(self.module, prompt(second), cache, warming)
        decode(self.module, prompt(1)[:, 0], cache, warming)

    def _run_vision_blocks(self) -> None:
        """Run a layer of each kind of the vision tower, on one image and on several."""
        for block in {self._kinds[block]: block for block in self.module.tower}.values():
            taken = {size for tensor in self.module.vision_block_inputs(1, 1) for size in tensor.shape}
            for images in (1, _unlike(taken, 2)):
                inputs = self.module.vision_block_inputs(images, _unlike(taken, 4))
                self._vision_block.warm_up(block, *inputs)


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

    def __init__(self, stage, kinds: Kinds):
        self.function = stage
        self.kinds = kinds
        self.compiled: dict[tuple, Callable] = {}

    def warm_up(self, layer, h, *args):
        """Run the stage once to compile it. Layers with hooks are skipped, so no hook sees this call."""
        calls_modules = self.function is not stages.code  # which only normalises and multiplies, so no hook sees it
        if calls_modules and self.kinds.of(layer) is None:
            # What follows needs as many dimensions. Sizes and values do not matter.
            return h[..., 0] if self.function is stages.received else h
        return self(layer, h, *args)

    def __call__(self, layer, h, *args):
        kind = self.kinds.of(layer)
        one_token = h.shape[-2] == 1
        # Compiling takes longer than it saves for logits of several tokens, and for chunks of one pruned token.
        if self.function is stages.head:
            is_rare = not one_token
        else:
            is_rare = one_token and self.function is not stages.full_layer
        if kind is None or is_rare:
            return self.function(layer, h, *args)
        key = kind, one_token, torch.get_num_threads()
        if key not in self.compiled:
            self.compiled[key] = self._compile(is_tuned=one_token and h.is_cuda)
        return self.compiled[key](layer, *self._prepared(h, *args))

    def _prepared(self, h, *args):
        """The arguments as tensors that compiled code need not be specialised to. The cache's are so already."""
        if self.function is stages.full_layer:
            return h, *args
        own = len(args) - 2 if self.function in PRUNED else len(args)
        return *map(_as_owner, (h, *args[:own])), *args[own:]

    def _compile(self, is_tuned: bool) -> Callable:
        """The stage for inputs of one kind. Its first call compiles it."""
        code = self.function.__code__.replace()
        function = types.FunctionType(code, self.function.__globals__, self.function.__name__)
        options = {}
        # No checks of layers, whose kind is in the key. Older versions of torch cannot leave them out.
        if hasattr(torch.compiler, "skip_guard_on_inbuilt_nn_modules_unsafe"):
            options["guard_filter_fn"] = lambda guards: [not g.is_global and g.name[:5] != "layer" for g in guards]
        if is_tuned:
            # A product with one row becomes a sum, which is fused with its neighbours: 13 kernels a layer, not 16.
            options["coordinate_descent_tuning"] = True
        return torch.compile(function, fullgraph=True, dynamic=True, options=options)


def _as_owner(x):
    """The same values as contiguous tensors that are not views. A contiguous view's memory is shared.

    Compiled code is specialised to the strides of its inputs, to the size of a view's base, and to an offset in memory
    that happens to equal a size.
    """
    if isinstance(x, tuple):
        return tuple(map(_as_owner, x))
    if x.is_contiguous() and not x._is_view():
        return x
    dense = x.contiguous().view(-1).view(x.shape)  # also in dimensions of size 1
    return from_dlpack(to_dlpack(dense))
