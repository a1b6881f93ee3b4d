"""`Graph` around a stand-in for torch's captures: it runs each step once, and does without a graph that fails."""

import contextlib
import logging

import pytest
import torch

from pop.backends import cuda_graph
from pop.backends.cuda_graph import CAPTURE_AT, Graph

CPU = torch.device("cpu")


class Stream:
    def wait_stream(self, other):
        pass


class FakeCuda:
    """What Graph uses of torch.cuda. `replay` does nothing, so a replayed call gives the recorded results again."""

    def __init__(self):
        self.captures = self.replays = 0
        self.refuses = False
        self.device = self.stream = lambda _: contextlib.nullcontext()
        self.current_stream = self.Stream = lambda *_: Stream()
        self.CUDAGraph, self.graph_pool_handle = lambda: self, lambda: 0
        self.is_current_stream_capturing = lambda: False

    def replay(self):
        self.replays += 1

    @contextlib.contextmanager
    def graph(self, *arguments, **options):
        self.captures += 1
        yield
        if self.refuses:
            raise RuntimeError("operation not permitted\nmore lines")


@pytest.fixture
def fake(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(cuda_graph, "_stream", lambda device: Stream())
    return fake


def counted():
    """A function, and the list of its results."""
    results = []

    def function():
        results.append(torch.tensor(len(results)))
        return (results[-1],)

    return function, results


def test_the_eighth_call_runs_the_function_and_records_it(fake):
    graph, (function, results) = Graph(CPU), counted()
    found = [graph(function)[0] for _ in range(CAPTURE_AT + 2)]
    assert [int(one) for one in found] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]  # the ninth result is the recorded one
    assert len(results) == CAPTURE_AT + 1 and (fake.captures, fake.replays) == (1, 2)
    memory = {one.data_ptr() for one in results[CAPTURE_AT - 1 :]}
    assert memory.isdisjoint(one.data_ptr() for one in found[CAPTURE_AT - 1 :])  # copies


def test_a_function_that_cannot_be_captured_runs_as_it_is(fake, caplog):
    graph, (function, _), fake.refuses = Graph(CPU), counted(), True
    with caplog.at_level(logging.WARNING):
        found = [int(graph(function)[0]) for _ in range(2 * CAPTURE_AT)]
    assert fake.captures == 1 and fake.replays == 0
    assert found == [*range(CAPTURE_AT), *range(CAPTURE_AT + 1, 2 * CAPTURE_AT + 1)]  # what was recorded did not count
    assert [record.getMessage() for record in caplog.records] == [
        "decode runs without a CUDA graph: operation not permitted"
    ]
