"""The CPU's form of a CUDA graph: a function on fixed memory is recorded once, and then its work is repeated.

Its work is operators of torch and functions of compiled code. The Python around takes a third of a small model's step.
"""

import logging
import threading
from collections.abc import Callable
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pop.backends import cpu

CAN_RECORD = torch.__version__ >= "2.13"  # in 2.6, code compiles again in a record; those between are not tested
CALLS = {
    torch.ops.pop.cpu_decode_attention.default: cpu.decode_attention_call,
    torch.ops.pop.multiply_rows.default: cpu.multiply_rows_call,
}

logger = logging.getLogger(__name__)
_patching = threading.Lock()
_trusted: set[tuple] = set()  # the compiled functions of each record that was compared


class Graph:
    """Runs a function, the same one at each call. It is recorded at the second call, and repeated from then on.

    The caller gets copies. The function takes no arguments, and its Python reads no number of a tensor: the record has
    those of one call. Without compiled code, or if an operator gives a number, the function runs as it is. It also does
    if the first repetition of a record with its compiled code differs from it.
    """

    keeps_memory = True  # as it holds tensors, and not addresses

    def __init__(self, device: torch.device):
        self.has_run, self.threads, self.calls, self.kinds, self.outputs = False, None, None, (), ()

    def __call__(self, function: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        has_run, self.has_run = self.has_run, True
        if has_run and CAN_RECORD and self.threads != torch.get_num_threads():  # which recorded calls are for
            self.threads, record = torch.get_num_threads(), _Record()
            self.outputs, self.calls = record.of(function), record.calls if record.is_compiled else None
            self.kinds = tuple(call for call, _ in self.calls or () if not isinstance(call, partial))
        elif self.calls is None:
            return function()
        elif self.kinds not in _trusted:
            return self._compare(function)
        else:
            for call, arguments in self.calls:
                call(*arguments)
        return tuple(output.clone() for output in self.outputs)

    def _compare(self, function) -> tuple[torch.Tensor, ...]:
        changed = [arguments[0] for call, arguments in self.calls if isinstance(call, partial) and arguments]
        counters = [(x, x.clone()) for x in changed if not x.is_floating_point()]  # other memory is written anew
        for call, arguments in self.calls:
            call(*arguments)
        found = [output.clone() for output in self.outputs]
        for x, before in counters:
            x.copy_(before)
        results = function()
        if all(map(torch.equal, found, results)):
            _trusted.add(self.kinds)
        else:
            logger.warning("decode steps are not repeated, as a repeated one differs from one that was run")
            self.calls = None
        return results


class _Record(TorchDispatchMode):
    """What this thread calls in a function: operators, and functions of modules that torch.compile wrote."""

    is_compiled = False  # whether there are any of the latter

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # compiled code refuses to run in others

    def of(self, function):
        from torch._inductor.codecache import PyCodeCache

        self.calls, self.thread, patched = [], threading.get_ident(), []
        with _patching:
            try:
                for module in map(vars, PyCodeCache.modules):
                    for name in [name for name in list(module) if name.startswith("cpp_fused")]:
                        patched.append((module, name, module[name]))
                        module[name] = partial(self._compiled_code, module[name])
                with self:
                    return function()
            finally:
                for module, name, original in patched:
                    module[name] = original

    def _compiled_code(self, function, *arguments):
        if threading.get_ident() == self.thread and self.calls is not None:
            self.calls.append((function, arguments))
            self.is_compiled = True
        return function(*arguments)

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        options = options or {}
        results = operator(*arguments, **options)
        if self.calls is None or operator.is_view:
            return results
        gives_tensors = all(isinstance(result, torch.Tensor) for result in tree_leaves(results))
        if operator.namespace not in ("aten", "pop") or not gives_tensors:  # a sum over processes, for example
            logger.info("decode steps are not recorded, as %s cannot be repeated", operator)
            self.calls = None
        elif (kernel := CALLS.get(operator)) and (call := kernel(results, *arguments)):
            self.calls.append((call, ()))
        elif operator._schema.is_mutable:
            self.calls.append((partial(operator, **options), arguments))
        else:
            self.calls.append((_again, (results, operator, arguments, options)))
        return results


def _again(results, operator, arguments, options) -> None:
    """Call an operator that makes new tensors, and copy them to the memory of those that were made first."""
    for memory, new in zip(tree_leaves(results), tree_leaves(operator(*arguments, **options)), strict=True):
        memory.copy_(new)
