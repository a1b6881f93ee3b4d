"""Prefill, decode and extend compute what pop/pruning/reference.py computes, for any plan, batch, padding and chunks.

Where two ways to compute a thing must agree, the engine is also compared with itself. All in float32 on tiny random
models with awkward sizes. Batches with images: test_forward_images.py.
"""

import sys
import weakref

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.cases import (
    NONE,
    assert_close,
    batches,
    by_reference,
    cached_kv,
    cases,
    hidden_by_reference,
    in_windows,
    models,
    new_cache,
    plans,
    prefill,
    prefill_with_choice,
    random_corrections,
    stack_layers,
)
from support.naive_method import token_by_token
from support.tiny import random_model, tiny_config, tiny_gemma3_config

from pop import engine
from pop.engine import stages
from pop.pruning.plan import PrunePlan

pytestmark = pytest.mark.usefixtures("small_query_blocks")

# Against the reference


@settings(max_examples=6 * settings().max_examples)
@given(cases(), st.integers(0, 5), st.integers(0, 5))
def test_prefill_and_decode_are_the_reference(case, steps, layer):
    """Logits, cache and the state that entered a layer, for any plan, window, batch, padding and chunking."""
    module, plan, tokens, lengths, chunk = case
    logits, cache, chosen = prefill_with_choice(module, tokens, lengths, plan, chunk)
    assert cache.lengths.tolist() == lengths.tolist()
    layer %= len(module.layers)
    hidden = cache.previous_hidden[layer]  # [B, D], before decode replaces it
    answer = torch.randint(module.config.vocab_size, (len(tokens), steps), generator=torch.Generator().manual_seed(1))
    logits = torch.stack([logits, *(engine.decode(module, token, cache) for token in answer.T)], dim=1)
    for row, n in enumerate(lengths.tolist()):
        whole = torch.cat((tokens[row, :n], answer[row]))
        expected, kv = by_reference(module, whole, plan, n, chosen[row])
        assert_close(logits[row], expected[n - 1 :])
        assert_close(cached_kv(module, cache, row), in_windows(module, stack_layers(kv)))
        entering = hidden_by_reference(module, whole[:n], plan, n, chosen[row], layer)
        assert_close(hidden[row], entering[-1])


@given(models(), st.data())
def test_a_conversation_may_change_its_plan_with_every_turn(module, data):
    """Prompt, answer, prompt, answer: each prompt has its own plan and attends what the others left in the cache.

    Plans are plain, calibrated, or empty. Logits, K and V are those of running the tokens one by one, where each token
    knows the plan of its turn only. Before a turn, the tokens of earlier turns that it selects run once more.
    """
    rows = data.draw(st.integers(1, 2))
    cache = new_cache(module, rows, chunk=data.draw(st.sampled_from([4, 1000])))
    own = data.draw(plans(module.config))
    said = [torch.zeros(0, dtype=torch.int64) for _ in range(rows)]  # each row's tokens, [N]
    applied = [[] for _ in range(rows)]  # each token's plan, its turn's or NONE, and the layer that ends it
    predicted = [{} for _ in range(rows)]  # logits [V] by position
    again = [{} for _ in range(rows)]  # by a turn's first position: the selecting layer, and earlier tokens

    def append(row, tokens, plans, logits):
        """Note a row's new tokens [M] and their plans; logits [R, V] are those at the last R of them."""
        said[row] = torch.cat((said[row], tokens))
        applied[row] += plans
        predicted[row] |= zip(range(len(said[row]) - len(logits), len(said[row])), logits, strict=True)

    for _ in range(data.draw(st.integers(2, 4))):
        plan = data.draw(st.one_of(st.just(own), st.just(NONE), plans(module.config)))
        width, random = data.draw(st.integers(1, 8)), torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
        lengths = torch.tensor(data.draw(st.lists(st.integers(1, width), min_size=rows, max_size=rows)))
        turn = torch.randint(module.config.vocab_size, (rows, width), generator=random)
        chunk = data.draw(st.sampled_from([1, 3, 1000]))
        goes_on = data.draw(st.booleans())  # the next turn is the same prompt
        if goes_on:
            engine.prefill(module, turn, cache, lengths, plan, chunk, is_last_part=False)
            logits = torch.zeros(rows, 0)
            chosen = torch.zeros(rows, int(lengths.max()), dtype=torch.bool)
        else:
            logits, _, chosen = prefill_with_choice(module, turn, lengths, plan, chunk, cache)
        for row, m in enumerate(lengths.tolist()):
            held_before = len(said[row])
            N = chosen.shape[1] - int(lengths.max())  # earlier tokens, up to the turn
            earlier = [held_before - N + column for column in range(N) if chosen[row, column]]
            if earlier:
                again[row][held_before] = plan.selects_at, earlier
            full_depth = [held_before + i < plan.full_depth_first or i >= m - plan.full_depth_last for i in range(m)]
            if goes_on:
                full_depth = [held_before + i < plan.full_depth_first for i in range(m)]
            elif held_before + m < plan.full_depth_below:
                full_depth = [True] * m
            ends = [plan.selects_at + 1 if selected else module.config.num_layers for selected in chosen[row, N:][:m]]
            used = [(NONE if full else plan, end) for full, end in zip(full_depth, ends, strict=True)]
            found = logits[:0] if goes_on else logits[row : row + 1]
            append(row, turn[row, :m], used, found)
        answer = torch.randint(module.config.vocab_size, (rows, data.draw(st.integers(0, 3))), generator=random)
        for step in answer.T:
            logits = engine.decode(module, step, cache)
            for row in range(rows):
                append(row, step[row : row + 1], [(NONE, 0)], logits[row : row + 1])

    for row in range(rows):
        assert cache.lengths[row] == len(said[row])
        expected, kv = token_by_token(module, said[row], *zip(*applied[row], strict=True), again[row])
        for position, found in predicted[row].items():
            assert_close(found, expected[position], f"row {row}, position {position}, logits at {[*predicted[row]]}:")
        assert_close(cached_kv(module, cache, row), in_windows(module, kv), f"row {row}, keys and values:")


@given(models(), st.data())
def test_a_later_prompt_can_bring_all_earlier_tokens_to_full_depth(module, data):
    """A plan that prunes no layer before the selecting one, and selects everything, leaves the full model's cache."""
    num_layers = module.config.num_layers
    assume(num_layers > 1)
    first = data.draw(st.integers(1, num_layers - 1))
    plan = PrunePlan(tuple(range(first, num_layers)), full_depth_selected=1.0)
    tokens, lengths = data.draw(batches(module.config.vocab_size))
    turn = tokens.flip(1)[:, :3]
    added = torch.full_like(lengths, turn.shape[1])
    chunk = data.draw(st.sampled_from([1, 5, 1000]))
    caches = []
    for one in (plan, NONE):
        cache = new_cache(module, len(tokens), chunk=chunk)
        engine.prefill(module, tokens, cache, lengths, one, chunk, is_last_part=False)
        logits, _ = prefill(module, turn, added, one, chunk, cache)
        caches.append((cache, logits))
    (cache, logits), (full, expected) = caches
    if not cache.has_windows:
        assert_close(logits, expected)
        for row in range(len(tokens)):
            assert_close(cached_kv(module, cache, row), cached_kv(module, full, row))
            assert (cache.skipped == -1).all()


def test_a_code_takes_the_state_of_a_token_before_it_that_runs_again(short_averages):
    """The last token of a prompt that goes on is selected later. The next one, which is pruned, has it in its codes.

    Another token is selected with it, and one between them is not, so tokens that are not consecutive run again.
    """
    module = random_model(tiny_config(num_layers=5), seed=1)
    plan = PrunePlan((2, 4), 1, 1, random_corrections(module.config, (2, 4), 1), 0.5, selecting_layer=1)
    for seed in range(99):
        tokens = torch.randint(module.config.vocab_size, (1, 12), generator=torch.Generator().manual_seed(seed))
        cache = new_cache(module, 1)
        engine.prefill(module, tokens[:, :6], cache, torch.tensor([6]), plan, 99, is_last_part=False)
        logits, _, chosen = prefill_with_choice(module, tokens[:, 6:], torch.tensor([6]), plan, cache=cache)
        earlier = chosen[0, :6].nonzero()[:, 0].tolist()
        if chosen[0, 5] and not chosen[0, 6] and len(earlier) < 6 - earlier[0]:
            break
    else:
        pytest.fail("no seed gives this choice")
    ends = [5] * 6 + [2 if selected else 5 for selected in chosen[0, 6:]]
    plans_of_tokens = [NONE, *[plan] * 10, NONE]
    expected, kv = token_by_token(module, tokens[0], plans_of_tokens, ends, {6: (1, earlier)})
    assert_close(logits[0], expected[-1])
    assert_close(cached_kv(module, cache, 0), kv)


# Against itself


@given(cases())
def test_extend_is_decode_in_one_go(case):
    """Also of more tokens than the cache takes at once."""
    module, plan, tokens, lengths, chunk = case
    answer = torch.randint(module.config.vocab_size, (len(tokens), 4), generator=torch.Generator().manual_seed(2))
    _, cache = prefill(module, tokens, lengths, plan, chunk)
    stepwise = torch.stack([engine.decode(module, token, cache) for token in answer.T], dim=1)
    _, other = prefill(module, tokens, lengths, plan, chunk)
    assert_close(engine.extend(module, answer, other), stepwise)
    assert_close(other.previous_hidden, cache.previous_hidden)
    for row in range(len(tokens)):
        assert_close(cached_kv(module, other, row), cached_kv(module, cache, row))


@given(cases(), st.sampled_from([1e4, -1e4, 1e-30]))
def test_padding_and_stale_slots_do_not_matter(case, garbage):
    module, plan, tokens, lengths, chunk = case
    expected, clean = prefill(module, tokens, lengths, plan, chunk)
    padding = torch.arange(tokens.shape[1]) >= lengths[:, None]
    dirty = new_cache(module, len(tokens))
    for x in (*dirty.keys, *dirty.values):
        x.fill_(garbage)
    logits, _ = prefill(module, torch.where(padding, (tokens + 1) % 7, tokens), lengths, plan, chunk, dirty)
    assert_close(logits, expected)
    next_token = tokens[:, 0]
    for row, n in enumerate(lengths.tolist()):
        for x in (*dirty.keys, *dirty.values):
            x[row, n:] = garbage
    assert_close(engine.decode(module, next_token, dirty), engine.decode(module, next_token, clean))


def test_a_row_may_fill_its_cache_and_is_left_alone_then():
    """Padding of a shorter turn and a token after the last slot go to the spare slot, not over a full row's tokens."""
    module = random_model(tiny_gemma3_config(), seed=3)
    plan = PrunePlan(layers=(2, 4))
    first, turn = torch.arange(10)[None].repeat(2, 1), torch.arange(20, 26)[None].repeat(2, 1)
    cache = new_cache(module, 2, slots=8)
    prefill(module, first, torch.tensor([7, 2]), plan, cache=cache)
    logits, _ = prefill(module, turn, torch.tensor([1, 5]), plan, cache=cache)
    assert cache.lengths.tolist() == [8, 7]
    for row, (n, m) in enumerate([(7, 1), (2, 5)]):
        alone = new_cache(module, 1, slots=8)
        prefill(module, first[row : row + 1], torch.tensor([n]), plan, cache=alone)
        expected, _ = prefill(module, turn[row : row + 1], torch.tensor([m]), plan, cache=alone)
        assert_close(logits[row], expected[0])
        assert_close(cached_kv(module, cache, row), cached_kv(module, alone, 0))
    before = [x[0, :8].clone() for x in (*cache.keys, *cache.values)]
    stepped = engine.decode(module, torch.tensor([1, 1]), cache)[1]
    assert all(torch.equal(x[0, :8], y) for x, y in zip((*cache.keys, *cache.values), before, strict=True))
    assert_close(stepped, engine.decode(module, torch.tensor([1]), alone)[0])


# Faults stay where they are


def test_a_token_that_overflows_harms_no_other_row_and_no_later_use_of_the_cache():
    """Masked slots have attention weight 0, but 0 * NaN is NaN: NaN must not reach a slot that others read."""
    module = random_model(tiny_config(), seed=3)
    module.model.embed_tokens.weight.data[7] = torch.nan
    tokens, lengths = torch.tensor([[1, 2, 3, 4, 5], [7, 7, 7, 7, 7], [6, 7, 7, 7, 7]]), torch.tensor([5, 5, 1])
    plan = PrunePlan(layers=(1, 3))
    logits, cache = prefill(module, tokens, lengths, plan)
    assert logits.isfinite().all(1).tolist() == [True, False, True]
    logits = engine.decode(module, torch.tensor([1, 1, 1]), cache)
    assert logits.isfinite().all(1).tolist() == [True, False, True]
    cache.reset()
    lengths = torch.tensor([5, 1, 2])
    logits, _ = prefill(module, tokens.clamp(max=6), lengths, plan, cache=cache)
    assert logits.isfinite().all()
    assert engine.decode(module, torch.tensor([1, 1, 1]), cache).isfinite().all()


def test_a_failed_call_adds_no_tokens():
    """That the cache works again after failures anywhere: tests/test_failures.py."""
    module = random_model(tiny_config(), seed=3)
    _, cache = prefill(module, torch.tensor([[1, 2, 3]]), torch.tensor([3]), NONE)
    module.head = lambda h: 1 / 0
    for call in (
        lambda: prefill(module, torch.tensor([[4]]), torch.tensor([1]), NONE, cache=cache),
        lambda: engine.decode(module, torch.tensor([4]), cache),
        lambda: engine.extend(module, torch.tensor([[4]]), cache),
    ):
        with pytest.raises(ZeroDivisionError):
            call()
        assert cache.lengths.tolist() == [3]


def test_states_are_freed_as_soon_as_the_next_ones_exist():
    """How many states [B, C, D] each kept layer finds: none, or the one that has left the layer before.

    Of a plan that selects, all three chunks of the first phase, and the first chunk of the second. Before Python 3.11,
    a call holds its arguments until it returns, so one more state lives.
    """
    module = random_model(tiny_config(num_layers=5))
    plan = PrunePlan((4,), full_depth_selected=0.5, selecting_layer=2)
    states, found = [], []

    def full_layer(layer, h, *rest):
        if layer is module.layers[4]:
            return stages.full_layer(layer, h, *rest)
        found.append(sum(state() is not None for state in states))
        states.append(weakref.ref(h))
        after = stages.full_layer(layer, h, *rest)
        states.append(weakref.ref(after))
        return after

    prompt = torch.ones(1, 9, dtype=torch.int64), new_cache(module, 1), torch.tensor([9])
    engine.prefill(module, *prompt, plan, 3, stages.Stages(full_layer=full_layer))
    assert found[:8] == [0, 1 if sys.version_info >= (3, 11) else 2] * 4
