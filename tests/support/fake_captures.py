"""A stand-in for what pop.backends.cuda_graph uses of torch.cuda, for tests without a GPU."""

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

import torch

from pop.backends import cuda_graph


class Stream:
    def wait_stream(self, other):
        pass


class FakeCuda:
    """Counts captures. `replay` does nothing, so a replayed call gives the recorded results again."""

    def __init__(self):
        self.captures = self.replays = 0
        self.refuses = False
        self.device = self.stream = lambda _: contextlib.nullcontext()
        self.current_stream = self.Stream = lambda *_: Stream()
        self.CUDAGraph = lambda: self
        self.is_current_stream_capturing = lambda: False
        self.graph_pool_handle = object
        self.pools = []

    def since(self, counts: tuple[int, int]) -> tuple[int, int]:
        """How many captures and replays there were since there were `counts`."""
        return self.captures - counts[0], self.replays - counts[1]

    def replay(self):
        self.replays += 1

    @contextlib.contextmanager
    def graph(self, graph, pool, *arguments, **options):
        self.captures += 1
        self.pools.append(pool)
        yield
        if self.refuses:
            raise RuntimeError("operation not permitted\nmore lines")


@contextlib.contextmanager
def installed() -> Iterator[FakeCuda]:
    """A stand-in in the place of torch.cuda."""
    fake = FakeCuda()
    with patch.object(torch, "cuda", fake), patch.object(cuda_graph, "_stream", lambda device: Stream()):
        yield fake
