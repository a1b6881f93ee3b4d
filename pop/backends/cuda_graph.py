"""CUDA graphs: a function on fixed memory is captured once, and then replayed with one launch."""

from collections.abc import Callable

import torch

CAPTURE_AT = 8  # calls; capturing takes the host as long as a few calls, so a short answer does without


class Graph:
    """Runs a function, the same one at each call, and from the eighth call on replays it.

    The caller gets tensors of its own. The function takes no arguments and no numbers from the host. Of the tensors
    that it changes, it may add to those in `accumulated` only; the others get the same values each time that it runs on
    the same inputs.
    """

    def __init__(self, accumulated: tuple[torch.Tensor, ...]):
        self.accumulated = accumulated
        self.calls, self.graph, self.outputs = 0, None, ()

    def __call__(self, function: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        self.calls += 1
        if self.calls < CAPTURE_AT or torch.cuda.is_current_stream_capturing():
            return function()
        if self.graph is None:
            self._capture(function)
        self.graph.replay()
        return tuple(output.clone() for output in self.outputs)

    def _capture(self, function) -> None:
        with torch.cuda.device(self.accumulated[0].device):
            before = [tensor.clone() for tensor in self.accumulated]
            stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                function()  # libraries allocate their workspaces for this stream now
            current.wait_stream(stream)
            for tensor, old in zip(self.accumulated, before, strict=True):
                tensor.copy_(old)
            graph = torch.cuda.CUDAGraph()
            # "thread_local": NCCL's watchdog thread queries events meanwhile.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self.outputs = function()  # is recorded and does not run
        self.graph = graph
