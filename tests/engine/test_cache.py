"""The KV cache: its size, and what remains of it after a reset, a rewind, a copy, and rows that leave."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support.cases import assert_close, by_position, cached_kv, cases, new_cache, prefill
from support.tiny import random_model, tiny_config, tiny_gemma3_config

import pop
from pop import engine
from pop.engine.cache import KVCache
from pop.pruning.plan import PrunePlan


def test_what_windows_save():
    """gemma3-12b at 32k tokens: eight of 48 layers hold all of them, the others 1,023 + 2,048."""
    windows = tuple(1024 if layer % 6 else None for layer in range(1, 49))
    config = tiny_gemma3_config(windows=windows, hidden_size=3840, num_heads=16, num_kv_heads=8, head_dim=256)
    size = KVCache.size_in_bytes(config, 1, 32_768, torch.bfloat16)
    everything = 2 * 48 * 32_769 * 8 * 256 * 2 + (48 + 1) * 3840 * 2
    assert size == 2 * (8 * 32_769 + 40 * 3_072) * 8 * 256 * 2 + (48 + 1) * 3840 * 2
    assert round(1 - size / everything, 2) == 0.76


def test_no_slot_after_a_rewind_is_taken_for_a_token_that_skipped_layers():
    """A decode step fills such slots, and leaves `skipped` as it is."""
    module = random_model(tiny_config(), seed=3)
    plan = PrunePlan((3, 4), full_depth_selected=0.5, selecting_layer=1)
    _, cache = prefill(module, torch.arange(30)[None], torch.tensor([30]), plan)
    assert (cache.skipped[0, :30] == 1).any()
    for length in range(29, -1, -1):
        cache.restore((torch.tensor([length]), *cache.snapshot()[1:]))
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


@given(cases())
def test_a_rewound_cache_continues_from_the_snapshot(case):
    """With sliding windows, a cache may be rewound by as many tokens as a chunk has.

    Without them, a turn that selects earlier tokens changes them, so a second one would select others.
    """
    module, plan, tokens, lengths, chunk = case
    if not any(module.config.windows):
        plan = by_position(plan)
    _, cache = prefill(module, tokens, lengths, plan, chunk)
    count = min(chunk, 3)
    added = lengths.clamp(max=count)
    snapshot = cache.snapshot()
    expected, _ = prefill(module, tokens[:, :count], added, plan, chunk, cache)  # the next turn
    cache.restore(snapshot)
    for _ in range(count):
        engine.decode(module, (tokens[:, 0] + 1) % module.config.vocab_size, cache)
    cache.restore(snapshot)
    assert all(torch.equal(now, before) for now, before in zip(cache.snapshot(), snapshot, strict=True))
    found, _ = prefill(module, tokens[:, :count], added, plan, chunk, cache)
    assert torch.equal(found, expected)


@given(cases())
def test_a_later_prompt_selects_among_the_tokens_of_a_copy(case):
    """As it does in the cache itself, although the copy has more slots and rows, and held other tokens."""
    module, plan, tokens, lengths, chunk = case
    assume(plan.full_depth_selected and plan.layers)
    _, cache = prefill(module, tokens[:1], lengths[:1], plan, chunk)
    later = tokens[:1].flip(1)
    count = torch.tensor([later.shape[1]])
    copies = new_cache(module, 2, slots=100, chunk=chunk)
    prefill(module, tokens[:1].repeat(2, 3), count.repeat(2) * 3, plan, chunk, copies)  # which the copy replaces
    copies.copy_from(cache)
    assert (copies.skipped[:, lengths[0] :] == -1).all()
    expected, _ = prefill(module, later, count, plan, chunk, cache)
    found, _ = prefill(module, later.repeat(2, 1), count.repeat(2), plan, chunk, copies)
    assert_close(found, expected.repeat(2, 1))


@pytest.mark.parametrize("config", [tiny_config(), tiny_gemma3_config()])
def test_a_cache_has_room_for_states_once_a_plan_selects(config):
    model = pop.Model(random_model(config, seed=3), config)
    cache = model.new_cache(2, 30)
    plan = PrunePlan((3, 4), full_depth_selected=0.3, selecting_layer=1)
    pruning_nothing = PrunePlan(full_depth_selected=0.3)
    for one, states in ((by_position(plan), False), (pruning_nothing, False), (plan, True)):
        model.prefill([range(9), range(9)], cache, plan=one)
        assert cache.nbytes == KVCache.size_in_bytes(config, 2, 30, model.dtype, states=states)
    assert cache.has_states != any(config.windows)


def test_states_that_do_not_fit_are_refused_before_the_cache_counts_tokens(monkeypatch):
    config = tiny_config()
    model = pop.Model(random_model(config, seed=3), config)
    cache = model.new_cache(1, 30)
    monkeypatch.setattr("pop.engine.cache.free_bytes", lambda device: 30 * 4 * config.hidden_size - 1)
    with pytest.raises(pop.CacheMemoryError, match="states.*1 x 30 tokens"):
        model.prefill([range(9)], cache, plan=PrunePlan((3, 4), full_depth_selected=0.3, selecting_layer=1))
    assert cache.intact and cache.lengths.tolist() == [0]


def test_spare_caches_give_way_to_states(monkeypatch):
    config = tiny_config()
    model = pop.Model(random_model(config, seed=3), config)
    cache = model.new_cache(1, 30)
    model.caches.most = 10**9
    model.caches.give(model.new_cache(1, 30))
    monkeypatch.setattr("pop.engine.cache.free_bytes", lambda device: 0 if model.caches._spare else 10**9)
    model.prefill([range(9)], cache, plan=PrunePlan((3, 4), full_depth_selected=0.3, selecting_layer=1))
    assert cache.has_states and not model.caches._spare


def test_a_later_prompt_selects_among_the_tokens_of_rows_that_stay():
    module = random_model(tiny_config(), seed=3)
    plan = PrunePlan((3, 4), full_depth_selected=0.3, selecting_layer=1)
    tokens = torch.randint(module.config.vocab_size, (3, 20), generator=torch.Generator().manual_seed(1))
    _, cache = prefill(module, tokens, torch.tensor([20, 7, 15]), plan)
    rows = torch.tensor([2, 0])
    fewer = copy.deepcopy(cache)
    fewer.keep_rows(rows)
    later = tokens.flip(1)
    expected, _ = prefill(module, later, torch.tensor([9, 9, 9]), plan, cache=cache)
    found, _ = prefill(module, later[rows], torch.tensor([9, 9]), plan, cache=fewer)
    assert_close(found, expected[rows])


def test_a_rewind_to_tokens_that_are_overwritten_is_refused():
    """Each window of 5 has 4 + 2 slots. Until they are full, nothing is overwritten."""
    config = tiny_gemma3_config()
    model = pop.Model(random_model(config), config, chunk_size=2, compile=False)
    cache = model.new_cache(1, 20)
    snapshots = []
    for token in range(1, 9):
        snapshots.append(cache.snapshot())  # of 0 to 7 tokens
        model.decode([token], cache)
        if token == 6:
            cache.restore(snapshots[1])
            cache.restore((torch.tensor([6]), *cache.snapshot()[1:]))
    with pytest.raises(pop.InputError, match=r"\[8\] tokens, not \[5\]"):
        cache.restore(snapshots[5])
    cache.restore(snapshots[6])
    cache.restore(snapshots[0])


@given(cases(), st.integers(1, 3), st.sampled_from([1, 4, 1000]))
def test_a_copied_row_continues_as_the_original(case, copies, other_chunk):
    """Into a cache of more rows and other rings. What no window reaches any more may be missing."""
    module, plan, tokens, lengths, chunk = case
    _, cache = prefill(module, tokens[:1], lengths[:1], plan, chunk)
    other = new_cache(module, copies, slots=40, chunk=other_chunk)
    other.copy_from(cache)
    for row in range(copies):
        assert torch.equal(cached_kv(module, other, row), cached_kv(module, cache, 0))
    expected = engine.decode(module, tokens[:1, 0], cache)
    assert_close(engine.decode(module, tokens[:1, 0].repeat(copies), other), expected.expand(copies, -1))
    assert_close(other.previous_hidden, cache.previous_hidden.expand(-1, copies, -1))


def test_rows_that_leave_the_cache_take_nothing_with_them():
    module = random_model(tiny_config(), seed=2)
    model = pop.Model(module, module.config)
    prompts = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    plan = dataclasses.replace(pop.PrunePlan.deepest(module.config.num_layers, 0.5), full_depth_last=2)
    cache, alone = model.new_cache(3, 8), model.new_cache(1, 8)
    model.prefill(prompts, cache, lengths=[3, 1, 2], plan=plan)
    size = cache.nbytes
    cache.keep_rows(torch.tensor([2, 0]))
    assert cache.nbytes * 3 == size * 2 and cache.lengths.tolist() == [2, 3]
    assert cache.keys[0].stride() == model.new_cache(2, 8).keys[0].stride()  # each head's slots stay contiguous
    model.prefill(prompts[2:, :2], alone, plan=plan)
    torch.testing.assert_close(cache.previous_hidden[:, :1], alone.previous_hidden)
    torch.testing.assert_close(model.decode([11, 12], cache)[:1], model.decode([11], alone))
