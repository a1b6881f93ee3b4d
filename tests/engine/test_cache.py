"""The KV cache: its size, and what remains of it after a reset, a copy, and rows that leave."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import assert_close, by_position, cached_kv, cases, new_cache, prefill
from support.tiny import random_model, tiny_config, tiny_gemma3_config, tiny_model

import pop
from pop import engine
from pop.engine.cache import KVCache
from pop.pruning.plan import PrunePlan

SELECTING = PrunePlan((3, 4), full_depth_selected=0.3, selecting_layer=1)


def test_no_slot_after_a_rewind_is_taken_for_a_token_that_skipped_layers():
    """A decode step fills such slots, and leaves `skipped` as it is."""
    module = random_model(tiny_config(), seed=3)
    _, cache = prefill(module, torch.arange(30)[None], torch.tensor([30]), SELECTING)
    assert (cache.skipped[0, :30] == 1).any()
    for length in range(29, -1, -1):
        cache.move_to(torch.tensor([length]), *cache.snapshot()[1:])
        assert (cache.skipped[:, length:] == -1).all()


@given(cases())
def test_a_reset_cache_is_a_new_cache(case):
    module, plan, tokens, lengths, chunk = case
    expected, _ = prefill(module, tokens, lengths, plan, chunk)
    cache = new_cache(module, len(tokens), chunk=chunk)
    empty = cache.lengths
    prefill(module, tokens.flip(1), torch.full_like(lengths, tokens.shape[1]), plan, chunk, cache)
    cache.rope_offsets = cache.rope_offsets + 3  # as after images
    cache.reset()
    assert cache.lengths.tolist() == empty.tolist() == [0] * len(tokens)
    assert not cache.previous_hidden.any() and not cache.rope_offsets.any()
    logits, _ = prefill(module, tokens, lengths, plan, chunk, cache)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("config", [tiny_config(), tiny_gemma3_config()])
def test_a_cache_has_room_for_states_once_a_plan_selects(config):
    """Its size is known before. A layer with a window has a ring of a few slots."""
    model = tiny_model(config, seed=3, chunk_size=4)
    cache = model.new_cache(2, 30)
    pruning_nothing = PrunePlan(full_depth_selected=0.3)
    for one, states in ((by_position(SELECTING), False), (pruning_nothing, False), (SELECTING, True)):
        model.prefill([range(9), range(9)], cache, plan=one)
        assert cache.nbytes == KVCache.size_in_bytes(config, 2, 30, model.dtype, chunk_size=4, states=states)
    assert cache.has_states != any(config.windows)


def test_states_that_do_not_fit_are_refused_before_the_cache_counts_tokens(monkeypatch):
    model = tiny_model(tiny_config(), seed=3)
    cache = model.new_cache(1, 30)
    monkeypatch.setattr("pop.engine.cache.free_bytes", lambda device: 30 * 4 * model.config.hidden_size - 1)
    with pytest.raises(pop.CacheMemoryError, match="states.*1 x 30 tokens"):
        model.prefill([range(9)], cache, plan=SELECTING)
    assert cache.intact and cache.lengths.tolist() == [0]


def test_memory_that_fails_in_the_allocation_is_refused_as_well(monkeypatch):
    def zeros(*_, **__):
        raise RuntimeError("out of memory")

    model = tiny_model(tiny_config(), seed=3)
    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(pop.CacheMemoryError, match="a KV cache of 1 x 30 tokens, more than cpu could allocate"):
        model.new_cache(1, 30)


def test_spare_caches_give_way_to_states(monkeypatch):
    model = tiny_model(tiny_config(), seed=3)
    cache = model.new_cache(1, 30)
    model.caches.most = 10**9
    model.caches.give(model.new_cache(1, 30))
    monkeypatch.setattr("pop.engine.cache.free_bytes", lambda device: 0 if model.caches._spare else 10**9)
    model.prefill([range(9)], cache, plan=SELECTING)
    assert cache.has_states and not model.caches._spare


def test_rows_that_leave_free_their_memory_and_a_later_prompt_selects_among_the_others():
    """So many that the later prompt selects tokens of the earlier one."""
    plan = dataclasses.replace(SELECTING, full_depth_selected=0.9)
    module = random_model(tiny_config(), seed=3)
    tokens = torch.randint(module.config.vocab_size, (3, 20), generator=torch.Generator().manual_seed(1))
    _, cache = prefill(module, tokens, torch.tensor([20, 7, 15]), plan)
    rows = torch.tensor([2, 0])
    fewer = copy.deepcopy(cache)
    fewer.keep_rows(rows)
    assert fewer.nbytes * 3 == cache.nbytes * 2
    assert fewer.keys[0].stride() == new_cache(module, 2).keys[0].stride()  # each head's slots stay contiguous
    later = tokens.flip(1)
    expected, _ = prefill(module, later, torch.tensor([9, 9, 9]), plan, cache=cache)
    found, _ = prefill(module, later[rows], torch.tensor([9, 9]), plan, cache=fewer)
    assert_close(found, expected[rows])


def test_tokens_that_skipped_layers_are_forgotten_by_a_copy_of_a_shorter_row():
    module = random_model(tiny_config(), seed=3)
    caches = [prefill(module, torch.arange(n)[None], torch.tensor([n]), SELECTING)[1] for n in (20, 7)]
    assert (caches[0].skipped[:, 7:] >= 0).any()
    caches[0].copy_from(caches[1])
    assert (caches[0].skipped[:, 7:] == -1).all()


@given(cases(), st.integers(1, 3), st.sampled_from([1, 4, 1000]))
def test_a_copied_row_continues_as_the_original(case, copies, other_chunk):
    """Into a cache of more rows, more slots and other rings, which held other tokens. A later prompt selects alike.

    What no window reaches any more may be missing.
    """
    module, plan, tokens, lengths, chunk = case
    _, cache = prefill(module, tokens[:1], lengths[:1], plan, chunk)
    later = tokens[:1].flip(1)
    count = torch.tensor([later.shape[1]])
    other = new_cache(module, copies, slots=100, chunk=other_chunk)
    prefill(module, tokens[:1].repeat(copies, 2), count.repeat(copies) * 2, plan, chunk, other)
    other.copy_from(cache)
    assert (other.skipped[:, lengths[0] :] == -1).all()
    for row in range(copies):
        assert torch.equal(cached_kv(module, other, row), cached_kv(module, cache, 0))
    expected = engine.decode(module, tokens[:1, 0], cache)
    assert_close(engine.decode(module, tokens[:1, 0].repeat(copies), other), expected.expand(copies, -1))
    assert_close(other.previous_hidden, cache.previous_hidden.expand(-1, copies, -1))
    expected, _ = prefill(module, later, count, plan, chunk, cache)
    found, _ = prefill(module, later.repeat(copies, 1), count.repeat(copies), plan, chunk, other)
    assert_close(found, expected.expand(copies, -1))


def test_a_cache_of_a_model_of_another_width_is_refused():
    """Qwen3-0.6B and 1.7B have as many layers and heads, of the same width."""
    model, wider = (tiny_model(tiny_config(hidden_size=size)) for size in (30, 60))
    for call, tokens in ((model.decode, [1]), (model.extend, [[1, 2]]), (model.prefill, [[1, 2]])):
        with pytest.raises(pop.InputError, match="made for another model"):
            call(tokens, wider.new_cache(1, 20))


def test_a_device_may_be_named():
    assert KVCache(tiny_config(), 1, 4, dtype=torch.float32, device="cpu").device == torch.device("cpu")
