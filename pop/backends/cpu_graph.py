"""The CPU's form of a CUDA graph: a function on fixed memory is recorded once, and then its work is repeated.

A decode step is a fixed list of torch operators and compiled functions. Repeating the list without the Python around it
saves a third of a small model's step. The engine sees only `Graph`, which it gets as `Stages.replay`.
"""

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pop.backends import cpu
from pop.engine.changes import sizes_of
from pop.engine.stages import Results, Work

CAN_RECORD = torch.__version__ >= "2.13"  # in 2.6, code compiles again in a record; the versions between are not tested
KERNELS = {
    torch.ops.pop.cpu_decode_attention.default: cpu.decode_attention_call,
    cpu.multiply_rows: cpu.multiply_rows_call,
}

logger = logging.getLogger(__name__)
_patching = threading.Lock()
_trusted: set[tuple] = set()  # the compiled functions of each record that was compared


class Graph:
    """Runs a function, the same one at each call. It is recorded at the second call, and repeated from then on.

    The function takes no arguments, and its Python reads no number of a tensor: the record has the numbers of one call.
    The caller gets copies of the results.

    A record reads the weights as they lay in memory. So it is made anew if their dtypes, shapes, strides or storages
    change, and for another number of threads.

    The function runs as it is without compiled code, and if an operator gives a number. At the third call it runs, and
    its results are compared with those of its record. If they differ, it is not repeated.
    """

    def __init__(self, module: torch.nn.Module, *_):
        self.weights = list(module.parameters())
        self.has_run = False
        self.record: _Record | None = None
        self.conditions: tuple | None = None  # the threads and the weights that the record was made for

    def __call__(self, function: Work) -> Results:
        # The first call runs, the second is recorded, and the third is compared, unless a record of the same compiled
        # functions was. Later ones repeat the record. If it has no calls, all later ones run.
        if not self.has_run:
            self.has_run = True
            return function()
        conditions = torch.get_num_threads(), sizes_of(self.weights)
        if self.record is None or self.conditions != conditions:
            record = _Record()
            results = record.run(function)
            self.record = record if record.is_complete else None
            self.conditions = conditions
            return results
        if self.record.calls is None:
            return function()
        if tuple(self.record.compiled) not in _trusted:
            return self.record.compare(function)
        return self.record.repeat()


class _Record(TorchDispatchMode):
    """What this thread calls in a function: operators, and functions of modules that torch.compile wrote."""

    def __init__(self):
        super().__init__()
        self.thread = threading.get_ident()
        self.is_complete = False  # whether it lacks no calls of code that was compiled meanwhile
        self.calls: list[Callable] | None = []  # None if the function cannot be repeated
        self.compiled: list[Callable] = []  # the compiled functions among the calls
        self.counters: list[Tensor] = []  # tensors of integers that the calls change in place
        self.outputs: Results = ()

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # compiled code refuses to run in other modes

    def run(self, function: Work) -> Results:
        """Run the function and record its calls. Returns copies of its results."""
        from torch._inductor.codecache import PyCodeCache

        with _patching, ExitStack() as undo:
            modules = list(PyCodeCache.modules)
            for module in modules:
                for name, original in list(vars(module).items()):
                    if name.startswith("cpp_fused"):
                        setattr(module, name, partial(self._run_compiled, original))
                        undo.callback(setattr, module, name, original)
            with self:
                self.outputs = function()
            self.is_complete = self.calls is None or len(modules) == len(PyCodeCache.modules)
        if not self.compiled:
            self.calls = None
        return self._copies()

    def repeat(self) -> Results:
        """Repeat the calls. Returns copies of the results."""
        for call in self.calls:
            call()
        return self._copies()

    def compare(self, function: Work) -> Results:
        """Repeat the calls, and run the function on the same numbers. Returns the results of the latter."""
        counts = [x.clone() for x in self.counters]  # all other memory is written anew
        repeated = self.repeat()
        for x, before in zip(self.counters, counts, strict=True):
            x.copy_(before)
        results = function()
        if all(map(torch.equal, repeated, results)):
            _trusted.add(tuple(self.compiled))
        else:
            logger.warning("decode steps are not repeated, as a repeated one differs from one that was run")
            self.calls = None
        return results

    def _copies(self) -> Results:
        return tuple(output.clone() for output in self.outputs)

    def _run_compiled(self, function: Callable, *arguments):
        if threading.get_ident() == self.thread and self.calls is not None:
            self.calls.append(partial(function, *arguments))
            self.compiled.append(function)
        return function(*arguments)

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        call = partial(operator, *arguments, **(options or {}))
        results = call()
        if self.calls is None or operator.is_view:
            return results
        gives_tensors = all(isinstance(result, Tensor) for result in tree_leaves(results))
        if operator.namespace not in ("aten", "pop") or not gives_tensors:  # a sum over processes, for example
            logger.info("decode steps are not recorded, as %s cannot be repeated", operator)
            self.calls = None
        elif operator in KERNELS and (kernel := KERNELS[operator](results, *arguments)):
            self.calls.append(kernel)
        elif operator._schema.is_mutable:
            self.calls.append(call)
            self.counters += [x for x in arguments[:1] if isinstance(x, Tensor) and not x.is_floating_point()]
        else:
            self.calls.append(partial(_copy_results, results, call))
        return results


def _copy_results(results, call: Callable) -> None:
    """Call an operator that makes new tensors, and copy them to the memory of those that were made first."""
    for memory, new in zip(tree_leaves(results), tree_leaves(call()), strict=True):
        memory.copy_(new)
