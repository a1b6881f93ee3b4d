"""`Graph` on a CPU repeats all work of a function on its memory, or runs the function as it is."""

import logging
import threading
import time
from pathlib import Path

import pytest
import torch
from support.cases import assert_close, new_cache
from support.compiler import requires_compiler
from support.tiny import random_model, tiny_config
from torch._inductor.codecache import PyCodeCache

import pop
from pop import engine
from pop.backends import cpu, cpu_graph
from pop.backends.cpu_graph import CAN_RECORD, Graph
from pop.engine.changes import Kinds
from pop.engine.decode_step import DecodeStep

NO_WEIGHTS = torch.nn.Module()


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

    graph, found = Graph(NO_WEIGHTS, 1), []
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
    graph, x, double = Graph(NO_WEIGHTS, 1), torch.zeros(1), torch.compile(lambda x: x * 2)
    with caplog.at_level(logging.INFO, "pop"):
        found = [graph(lambda: (double(torch.full((int(x.add_(1)),), 5.0)),))[0] for _ in range(4)]
    assert [len(one) for one in found] == [1, 2, 3, 4]
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_a_function_without_compiled_code_runs_as_it_is():
    """Its Python may read numbers in ways that no operator shows."""
    graph, x = Graph(NO_WEIGHTS, 1), torch.zeros(1)
    found = [graph(lambda: (torch.full((int(x.add_(1).tolist()[0]),), 5),))[0] for _ in range(4)]
    assert [len(one) for one in found] == [1, 2, 3, 4]


@requires_compiler
def test_another_number_of_threads_is_recorded_anew():
    graph, threads, runs, double = Graph(NO_WEIGHTS, 1), torch.get_num_threads(), [], torch.compile(lambda x: x * 2)
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

    graph, wanted = Graph(NO_WEIGHTS, 1), function()
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
    graph = Graph(NO_WEIGHTS, 1)
    with caplog.at_level(logging.WARNING):
        for number in range(5):
            x.fill_(number)
            assert torch.equal(graph(function)[0], torch.full((3,), 2.0 * number + 1))
    messages = [record.getMessage() for record in caplog.records if record.name == cpu_graph.__name__]
    assert ["differs" in message for message in messages] == [True]


@requires_compiler
def test_code_that_is_compiled_while_it_is_recorded_is_not_left_out():
    """A record without it could look like one of another function, which is trusted."""
    x, double = torch.zeros(3), torch.compile(lambda x: x * 2)
    adds = [torch.compile(lambda x: x + 1), torch.compile(lambda x: x + 5)]
    runs = []

    def trusted():
        return (double(x),)

    def function():
        runs.append(x.clone())
        return (adds[0](double(x)),)

    for one in (trusted, function):
        graph = Graph(NO_WEIGHTS, 1)
        for number in range(6):
            x.fill_(number)
            (found,) = graph(one)
            if one is function:
                assert torch.equal(found, torch.full((3,), 2.0 * number + (1 if number == 0 else 5)))
                del adds[: len(adds) - 1]
    assert len(runs) == 4  # it is recorded at the third call, and compared at the fourth


@requires_compiler
def test_weights_that_lie_otherwise_in_memory_are_not_read_as_before():
    """A step recorded before is dropped, and compiled code is looked for anew. The operators refuse smaller weights."""
    module = random_model(tiny_config(hidden_size=64, intermediate_size=96, head_dim=16, num_layers=2))
    compiled = torch.compile(engine.EAGER.head, dynamic=True)  # a step without compiled code is not recorded
    stages = engine.EAGER._replace(head=compiled, replay=Graph)
    cache = new_cache(module, 1, 20)
    engine.prefill(module, torch.tensor([[5, 12, 44]]), cache, torch.tensor([3]), pop.PrunePlan.none(), 20, stages)
    snapshot = cache.snapshot()
    layer = module.layers[1]
    weight = layer.mlp.down_proj.weight
    whole = weight.data
    kinds = Kinds()
    kinds.take_snapshots(module.layers)
    for smaller in (whole.bfloat16(), torch.zeros(1), whole[:, :48].clone()):
        for _ in range(4):
            found = engine.decode(module, torch.tensor([3]), cache, stages)
            cache.move_to(*snapshot)
        assert cache.passes[DecodeStep].replay.record.calls
        assert_close(found[0], module(torch.tensor([[5, 12, 44, 3]]))[0, 3])
        kind = kinds.of(layer)
        weight.data = smaller
        with pytest.raises((RuntimeError, IndexError)):
            engine.decode(module, torch.tensor([3]), cache, stages)
        assert kinds.of(layer) != kind
        weight.data = whole
        assert kinds.of(layer) == kind
        cache.move_to(*snapshot)
    for _ in range(4):
        found = engine.decode(module, torch.tensor([3]), cache, stages)
        cache.move_to(*snapshot)
    weight.data = whole.T.contiguous().T  # other strides: the same values elsewhere
    assert kinds.of(layer) != kind
    assert torch.allclose(engine.decode(module, torch.tensor([3]), cache, stages), found, atol=1e-5)


@requires_compiler
def test_kernels_check_the_memory_of_their_tensors():
    x, weight = torch.ones(1, 64), torch.ones(5, 64)
    call = cpu.multiply_rows_call(torch.empty(1, 5), x, weight)
    call()
    weight.data = torch.ones(4, 64)
    q, keys, spans = torch.ones(2, 1, 4, 8), torch.ones(2, 13, 2, 8), torch.zeros(2, 1, 2, dtype=torch.int32)
    attend = cpu.decode_attention_call(torch.empty(2, 1, 32), q, keys, keys, spans, 0.4)
    attend()
    keys.untyped_storage().resize_(4 * 2 * 13 * 2 * 8 - 4 * 2 * 8 - 1)  # without the last spare slot, and a byte less
    for smaller in (call, attend):
        with pytest.raises(RuntimeError, match="smaller"):
            smaller()
