"""`Graph` on a CPU repeats all work of a function on its memory, or runs the function as it is."""

import logging
import threading
import time
from pathlib import Path

import pytest
import torch
from support.cases import assert_close
from support.compiler import requires_compiler
from torch._inductor.codecache import PyCodeCache

from pop.backends import cpu_graph
from pop.backends.cpu_graph import CAN_RECORD, Graph

DEVICE = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_is_trusted(monkeypatch):
    monkeypatch.setattr(cpu_graph, "_trusted", set())


pytestmark = pytest.mark.skipif(not CAN_RECORD, reason="nothing is recorded in this version of torch")


@requires_compiler
def test_all_kinds_of_operators_are_repeated():
    """New tensors, views, several results, and changes in place. The caller's tensors stay."""
    x, total, runs, double = torch.arange(6.0).view(2, 3), torch.zeros(3).long(), [], torch.compile(lambda x: x * 2)

    def function():
        runs.append(x.clone())
        low, high = double(x).unbind()
        values, indices = torch.stack((low, high)).max(dim=0)
        total.add_(values.long())
        total[indices.remainder(3)] += 1
        return total, torch.mm(x, x.T, out=torch.empty(2, 2)), indices

    graph, found = Graph(DEVICE), []
    for number in range(5):
        x.copy_(torch.tensor([[1, 5, -number], [number, 2, 3]]))
        total.fill_(7)
        found.append(graph(function))
        kept = total.clone()
        total.fill_(7)
        for mine, wanted in zip(found[-1], function(), strict=True):
            assert torch.equal(mine, wanted)
        assert torch.equal(total, kept)
    assert len(runs) == 5 + 3  # the first call, the one that was recorded, and that to compare with
    assert len({tuple(one[1].flatten().tolist()) for one in found}) == 5


@requires_compiler
def test_a_function_that_reads_a_number_runs_as_it_is(caplog):
    graph, x, double = Graph(DEVICE), torch.zeros(1), torch.compile(lambda x: x * 2)
    with caplog.at_level(logging.INFO, "pop"):
        found = [graph(lambda: (double(torch.full((int(x.add_(1)),), 5.0)),))[0] for _ in range(4)]
    assert [len(one) for one in found] == [1, 2, 3, 4]
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_a_function_without_compiled_code_runs_as_it_is():
    """Its Python may read numbers in ways that no operator shows."""
    graph, x = Graph(DEVICE), torch.zeros(1)
    found = [graph(lambda: (torch.full((int(x.add_(1).tolist()[0]),), 5),))[0] for _ in range(4)]
    assert [len(one) for one in found] == [1, 2, 3, 4]


@requires_compiler
def test_another_number_of_threads_is_recorded_anew():
    graph, threads, runs, double = Graph(DEVICE), torch.get_num_threads(), [], torch.compile(lambda x: x * 2)
    try:
        for number in (1, 1, 1, 1, 2, 2, 2, 1):
            torch.set_num_threads(number)
            double(x := torch.ones(3))  # compiles for this number
            graph(lambda: (runs.append(0) or double(x),))
    finally:
        torch.set_num_threads(threads)
    assert len(runs) in (5, 6)  # three records, one or two kinds of which were compared with a run


@requires_compiler
def test_compiled_code_is_repeated_and_that_of_other_threads_is_not():
    weight, memory, others = torch.eye(3) * 2, torch.zeros(3), torch.zeros(3)
    multiply = torch.compile(lambda x: (weight @ x).sin() + x)
    count = torch.compile(lambda x: x.add_(1))
    ended = threading.Event()

    def counting():
        while not ended.is_set():
            with torch.no_grad():
                count(others)
            time.sleep(1e-3)

    def function():
        time.sleep(0.05)
        return (multiply(multiply(memory)),)

    graph, wanted = Graph(DEVICE), function()
    count(others)
    thread = threading.Thread(target=counting)
    thread.start()
    graph(function), graph(function)
    ended.set()
    thread.join()
    others.zero_()
    for number in range(3):
        memory.fill_(number)
        (found,) = graph(function)
        assert_close(found, function()[0])
    assert not others.any() and not torch.equal(found, wanted[0])


@requires_compiler
def test_a_record_that_lacks_work_is_found(monkeypatch, caplog):
    """Compiled code may be where this does not look for it, as in a cache of torch.compile that was emptied."""
    x, double, add = torch.zeros(3), torch.compile(lambda x: x * 2), torch.compile(lambda x: x + 1)

    def function():
        return (add(double(x)),)

    function()
    modules = [module for module in PyCodeCache.modules if "cpp_fused_add" not in Path(module.__file__).read_text()]
    monkeypatch.setattr(PyCodeCache, "modules", modules)
    graph = Graph(DEVICE)
    with caplog.at_level(logging.WARNING):
        for number in range(5):
            x.fill_(number)
            assert torch.equal(graph(function)[0], torch.full((3,), 2.0 * number + 1))
    messages = [record.getMessage() for record in caplog.records if record.name == cpu_graph.__name__]
    assert ["differs" in message for message in messages] == [True]
