"""`Graph` around a stand-in for torch's captures: it runs each step once, and does without a graph that fails."""

import contextlib
import logging

import pytest
import torch
from support import fake_captures

from pop.backends.cuda_graph import CAPTURE_AT, Graph


@pytest.fixture
def fake():
    with fake_captures.installed() as fake:
        yield fake


@pytest.fixture
def module():
    module = torch.nn.Linear(2, 2)
    module.largest_of_processes = lambda x: x
    return module


def counted():
    """A function, and the list of its results."""
    results = []

    def function():
        results.append(torch.tensor(len(results)))
        return (results[-1],)

    return function, results


def calls(graph, count):
    function, _ = counted()
    return [int(graph(function)[0]) for _ in range(count)]


def test_the_eighth_call_runs_the_function_and_records_it(fake, module):
    graph, (function, results) = Graph(module, "decode of 1 rows"), counted()
    found = [graph(function)[0] for _ in range(CAPTURE_AT + 2)]
    assert [int(one) for one in found] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]  # the ninth result is the recorded one
    assert len(results) == CAPTURE_AT + 1 and (fake.captures, fake.replays) == (1, 2)
    memory = {one.data_ptr() for one in results[CAPTURE_AT - 1 :]}
    assert memory.isdisjoint(one.data_ptr() for one in found[CAPTURE_AT - 1 :])  # copies


def test_a_function_that_cannot_be_captured_runs_as_it_is(fake, module, caplog):
    """It is tried once for a module and a kind of function, since each attempt leaves memory behind."""
    fake.refuses = True
    run_and_not_recorded = [*range(CAPTURE_AT), *range(CAPTURE_AT + 1, 2 * CAPTURE_AT + 1)]
    with caplog.at_level(logging.WARNING):
        assert calls(Graph(module, "decode of 3 rows"), 2 * CAPTURE_AT) == run_and_not_recorded
        assert calls(Graph(module, "decode of 3 rows"), 2 * CAPTURE_AT) == [*range(2 * CAPTURE_AT)]
    assert fake.captures == 1 and fake.replays == 0
    assert [record.getMessage() for record in caplog.records] == [
        "decode of 3 rows runs without a CUDA graph: operation not permitted"
    ]
    fake.refuses = False
    calls(Graph(module, "decode of 1 rows"), CAPTURE_AT)
    assert fake.captures == 2


def test_a_step_within_a_capture_of_its_own_device_runs_as_it_is(fake, module):
    """Another device may be the current one: what is captured there says nothing about this module's."""
    entered = []

    @contextlib.contextmanager
    def device(of):
        entered.append(of)
        yield
        entered.pop()

    fake.device = device
    fake.is_current_stream_capturing = lambda: entered[-1:] == [torch.device("cpu")]
    assert calls(Graph(module, "decode of 1 rows"), CAPTURE_AT + 1) == [*range(CAPTURE_AT + 1)]
    assert fake.captures == 0 and entered == []
    fake.is_current_stream_capturing = lambda: not entered
    calls(Graph(module, "decode of 1 rows"), CAPTURE_AT + 1)
    assert (fake.captures, fake.replays) == (1, 1)


def test_a_graph_that_another_process_cannot_capture_is_dropped(fake, module):
    module.largest_of_processes = lambda failures: failures + 1
    assert calls(Graph(module, "decode of 1 rows"), CAPTURE_AT + 1) == [*range(CAPTURE_AT), CAPTURE_AT + 1]
    assert fake.captures == 1 and fake.replays == 0


def test_graphs_that_never_run_at_once_use_the_same_memory(fake, module):
    one = Graph(module, "prefill")
    two = Graph(module, "prefill", one)
    decode = Graph(module, "decode of 1 rows")
    for graph in (one, two, decode):
        calls(graph, CAPTURE_AT)
    assert fake.pools == [one.pool, one.pool, decode.pool] and decode.pool is not one.pool
