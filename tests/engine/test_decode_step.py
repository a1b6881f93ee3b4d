"""The decode step on fixed memory gives what `decode` gives, and hands out no tensor that it overwrites."""

import gc
import weakref

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support.cases import cases, new_cache
from support.replay import Replay
from support.tiny import random_model, tiny_config

from pop import engine
from pop.backends import accelerate, cpu_graph
from pop.backends.cpu_graph import Graph, _Record
from pop.engine.decode_step import DecodeStep
from pop.engine.layer_pass import ReplayedPasses
from pop.engine.stages import Stages
from pop.pruning.plan import PrunePlan

REPLAYED = Stages(replay=Replay)
RECORDED = Stages(replay=Graph)
CLOSE = {"rtol": 0, "atol": 1e-5}


def assert_same_state(cache, other, live):
    """The same lengths, and for the rows `live` the same hidden states, keys and values, up to rounding errors."""
    assert torch.equal(cache.lengths, other.lengths) and torch.equal(cache.rope_offsets, other.rope_offsets)
    torch.testing.assert_close(cache.previous_hidden[:, live], other.previous_hidden[:, live], **CLOSE)
    for mine, others in zip(cache.keys + cache.values, other.keys + other.values, strict=True):
        torch.testing.assert_close(mine[live, :-1], others[live, :-1], **CLOSE)  # the spare slot may differ


@pytest.fixture
def all_is_recorded(monkeypatch):
    """Also code that is not compiled. That of these models reads no numbers."""

    class Record(_Record):
        def __init__(self):
            super().__init__()
            self.compiled.append(None)

    monkeypatch.setattr(cpu_graph, "_Record", Record)


@pytest.mark.usefixtures("all_is_recorded")
@given(cases(), st.data())
def test_recorded_steps_are_decode(case, data):
    """Any family, plan and ragged rows; rows fill up, and rows leave; a snapshot is restored in the middle.

    Steps that are replayed as by a CUDA graph are in test_any_order.py and test_cuda.py.
    """
    module, plan, tokens, lengths, chunk_size = case
    assume(getattr(module.config, "experts", None) is None)  # whose loop reads numbers
    slots = int(lengths.max()) + data.draw(st.integers(1, 12), "room")
    caches = [new_cache(module, len(tokens), slots, chunk=chunk_size) for _ in range(2)]
    stages = (Stages(), RECORDED)
    for cache, of_cache in zip(caches, stages, strict=True):
        logits = engine.prefill(module, tokens, cache, lengths, plan, chunk_size, of_cache)
        cache.rope_offsets = torch.arange(len(tokens))  # as after images
    handed_out = [(logits, logits.clone())]
    rewind = min(chunk_size, 3)
    random = torch.Generator().manual_seed(0)
    snapshots = []
    for number in range(8):
        token = torch.randint(module.config.vocab_size, (caches[0].batch_size,), generator=random)
        snapshots.append([cache.snapshot() for cache in caches])
        expected, found = (
            engine.decode(module, token, cache, of_cache) for cache, of_cache in zip(caches, stages, strict=True)
        )
        live = caches[0].lengths <= slots
        torch.testing.assert_close(found[live], expected[live], **CLOSE)
        assert_same_state(caches[1], caches[0], live)
        handed_out += [(tensor, tensor.clone()) for tensor in (found, caches[1].previous_hidden)]
        if number == 3:
            for cache, snapshot in zip(caches, snapshots[-rewind], strict=True):
                cache.move_to(*snapshot)
        if number == 5 and len(live) > 1:
            kept = torch.tensor([len(live) - 1, 0])
            for cache in caches:
                cache.keep_rows(kept)
            snapshots.clear()
    assert all(torch.equal(now, then) for now, then in handed_out)


@pytest.mark.usefixtures("all_is_recorded")
def test_recorded_products_read_the_memory_that_weights_have_now():
    """kernels.cpp gets addresses. Assigning `data` frees the old memory, between two steps."""
    module = random_model(tiny_config(hidden_size=64, intermediate_size=96, head_dim=16, num_heads=4, num_kv_heads=2))
    accelerate(module)
    caches = {stages: new_cache(module, 2) for stages in (RECORDED, Stages())}
    for number in range(6):
        if number == 4:
            for weight in module.parameters():
                weight.data = weight.data * 1.5
        token = torch.tensor([3 + number, 9 * number])
        recorded, expected = (engine.decode(module, token, cache, stages) for stages, cache in caches.items())
        torch.testing.assert_close(recorded, expected, **CLOSE)


def test_a_dropped_cache_is_freed_at_once():
    """On a GPU, its memory must not wait for the garbage collector."""
    module = random_model(tiny_config())
    cache = new_cache(module, 1)
    stages = REPLAYED._replace(replayed_tokens=9)
    engine.prefill(module, torch.tensor([[1, 2]]), cache, torch.tensor([2]), PrunePlan((1,)), 9, stages)
    engine.decode(module, torch.tensor([3]), cache, stages)
    assert {*cache.passes} == {DecodeStep, ReplayedPasses}
    keys = weakref.ref(cache.keys[0])
    gc.disable()
    try:
        del cache
        assert keys() is None
    finally:
        gc.enable()


def test_a_step_that_failed_midway_is_laid_out_anew():
    module, fails = random_model(tiny_config()), []

    class Failing(Replay):
        def __call__(self, step):
            outputs = super().__call__(step)
            if fails:
                raise RuntimeError(fails.pop())
            return outputs

    stages, token = Stages(replay=Failing), torch.tensor([3])
    caches = new_cache(module, 1), new_cache(module, 1)
    engine.decode(module, token, caches[0], stages)
    engine.decode(module, token, caches[1])
    fails.append("no memory")
    with pytest.raises(RuntimeError, match="no memory"):
        engine.decode(module, token, caches[0], stages)
    found, expected = engine.decode(module, token, caches[0], stages), engine.decode(module, token, caches[1])
    torch.testing.assert_close(found, expected, **CLOSE)
