"""CUDA graphs: a function on fixed memory is captured once, and then replayed with one launch."""

from __future__ import annotations

import functools
import logging
import threading
from weakref import WeakKeyDictionary

import torch

from pop.engine.stages import Results, Work

CAPTURE_AT = 8  # calls; capturing takes as long as a few calls, so a short answer is faster without it

logger = logging.getLogger(__name__)
_capturing = threading.Lock()  # a capture begins with torch.cuda.synchronize, which CUDA refuses during another one
_stream = functools.cache(torch.cuda.Stream)  # one for a device: cuBLAS keeps 32 MiB for each stream that it has used
# What could not be captured of a module. Each attempt leaves 40 MB behind, so there is one.
_refused: WeakKeyDictionary[torch.nn.Module, set[str]] = WeakKeyDictionary()


class Graph:
    """Runs a function, the same one at each call. It is captured at the eighth call, and replayed from then on.

    The function takes no arguments and no numbers from the host. The caller gets copies of its results. A function that
    cannot be captured, such as one that waits for the device, runs as it is.

    NCCL demands that all processes of a module capture a sum over them, or none. So they call alike, and the graph is
    dropped in all of them if one of them cannot capture it.

    Args:
        module: What the function runs.
        what: The kind of function, in words. If one function of a kind cannot be captured, none is tried again.
        other: The graph of another function, which never runs at the same time. Both use the same memory.
    """

    def __init__(self, module: torch.nn.Module, what: str, other: Graph | None = None):
        self.device = next(module.parameters()).device
        self.largest_of_processes = module.largest_of_processes
        self.refused = _refused.setdefault(module, set())
        self.what = what
        self.pool = other.pool if other else torch.cuda.graph_pool_handle()
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: Results = ()  # which each replay overwrites

    def __call__(self, function: Work) -> Results:
        self.calls += 1
        if self.calls < CAPTURE_AT or self.what in self.refused:
            return function()
        with torch.cuda.device(self.device):
            if torch.cuda.is_current_stream_capturing():
                return function()
            if self.graph is None:
                return self._run_and_capture(function)
        self.graph.replay()
        return tuple(output.clone() for output in self.outputs)

    def _run_and_capture(self, function: Work) -> Results:
        """Run the function, capture it, and return the results of the run. The graph's device is the current one."""
        with _capturing:
            stream = _stream(self.device)
            current = torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):  # where libraries allocate their workspaces now
                results = function()
            current.wait_stream(stream)
            results = tuple(result.clone() for result in results)
            graph = torch.cuda.CUDAGraph()
            try:
                # A capture that fails leaves its stream as the current one, so `current` surrounds it.
                # "thread_local": NCCL's watchdog thread queries events meanwhile.
                capture = torch.cuda.graph(graph, self.pool, stream, capture_error_mode="thread_local")
                with torch.cuda.stream(current), capture:
                    self.outputs = function()  # is recorded and does not run
                self.graph = graph
            except Exception as error:
                reason = str(error.__context__ or error).split("\n")[0]
                logger.warning("%s runs without a CUDA graph: %s", self.what, reason)
            failed = torch.tensor([self.graph is None], dtype=torch.int64, device=self.device)
            if self.largest_of_processes(failed):
                self.refused.add(self.what)
                self.graph = None
        return results
