"""CUDA graphs: a function on fixed memory is captured once, and then replayed with one launch."""

import functools
import logging
import math
import threading
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

CAPTURE_AT = 8  # calls; capturing takes as long as a few calls, so a short answer is faster without it

logger = logging.getLogger(__name__)
_capturing = threading.Lock()  # a capture begins with torch.cuda.synchronize, which CUDA refuses during another one
_stream = functools.cache(torch.cuda.Stream)  # one for a device: cuBLAS keeps 32 MiB for each stream that it has used


class Graph:
    """Runs a function, the same one at each call. It is captured at the eighth call, and replayed from then on.

    The function takes no arguments and no numbers from the host. The caller gets copies of its results. Each call runs
    the function once, so processes that communicate in it may capture it at different calls. A function that cannot be
    captured, such as one that waits for the device, runs as it is.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: tuple[Tensor, ...] = ()  # which each replay overwrites

    def __call__(self, function: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        self.calls += 1
        if self.calls < CAPTURE_AT or torch.cuda.is_current_stream_capturing():
            return function()
        if self.graph is None:
            return self._capture(function)
        self.graph.replay()
        return tuple(output.clone() for output in self.outputs)

    def _capture(self, function) -> tuple[Tensor, ...]:
        """Run the function, capture it, and return the results of the run."""
        with _capturing, torch.cuda.device(self.device):
            stream = _stream(self.device)
            current = torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):  # where libraries allocate their workspaces now
                results = function()
            current.wait_stream(stream)
            results = tuple(result.clone() for result in results)
            graph = torch.cuda.CUDAGraph()
            pool = torch.cuda.graph_pool_handle()
            try:
                # "thread_local": NCCL's watchdog thread queries events meanwhile.
                with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                    self.outputs = function()  # is recorded and does not run
                self.graph = graph
            except RuntimeError as error:
                logger.warning("decode runs without a CUDA graph: %s", str(error.__context__ or error).split("\n")[0])
                self.calls = -math.inf
                with suppress(AttributeError, RuntimeError):  # some versions of torch leave the pool open
                    torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        return results
