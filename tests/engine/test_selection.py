"""Which tokens a plan selects is what pop/pruning/reference.py selects, and callers may give their own tokens.

That the selected tokens run at full depth, exactly, is in test_forward.py and test_forward_images.py.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.cases import (
    NONE,
    assert_close,
    batches,
    by_layer,
    by_position,
    cases,
    held,
    new_cache,
    prefill,
    prefill_with_choice,
    recorded_choices,
    seen,
    stacked,
)
from support.meta_device import META
from support.naive_method import selection_scores
from support.tiny import random_model, tiny_config, tiny_gemma3_config, tiny_qwen3_vl_config

from pop import engine
from pop.models import build
from pop.models.images import Images
from pop.pruning import reference
from pop.pruning.plan import PrunePlan

pytestmark = pytest.mark.usefixtures("small_query_blocks", "short_averages")


def assert_chosen(chosen, scores, others, plan):
    """`chosen` [T] are those of the `others` [T] with the largest scores [T]. Scores equal to 1e-5 are in any order."""
    count = plan.num_selected(int(others.sum()))
    assert chosen.sum() == count and not (chosen & ~others).any()
    if 0 < count < others.sum():
        assert scores[chosen].min() >= scores[others & ~chosen].max() - 1e-5 * scores.max()


def selecting(plan, last_layer):
    """The plan, which now selects tokens."""
    if not plan.layers:
        plan = dataclasses.replace(plan, layers=(last_layer,), corrections=None, selecting_layer=None)
    share, last = plan.full_depth_selected or 0.3, plan.full_depth_last % 40  # 40 is more than a prompt has
    return dataclasses.replace(plan, full_depth_selected=share, full_depth_last=max(1, last))


@given(cases())
def test_the_choice_is_the_references(case):
    """For any plan, batch, padding and chunks. Given by the caller, the same tokens have the same effect.

    Tokens given by the caller run at full depth in all layers.
    """
    module, plan, tokens, lengths, chunk = case
    plan = selecting(plan, module.config.num_layers - 1)
    logits, cache, chosen = prefill_with_choice(module, tokens, lengths, plan, chunk)
    if plan.selects_at <= plan.layers[0]:
        expected, other = prefill(module, tokens, lengths, by_position(plan), full_depth=chosen)
        assert_close(logits, expected)
        assert_close(cache.previous_hidden, other.previous_hidden)
    for row, n in enumerate(lengths.tolist()):
        scores = reference.attention_scores(module, tokens[row, :n], plan)
        others = ~reference.full_depth_tokens(n, n, by_position(plan))
        assert_chosen(chosen[row, :n], scores, others, plan)
        assert not chosen[row, n:].any()
        if plan.selects_at <= plan.layers[0]:
            assert_close(held(module, cache, row), held(module, other, row))


@given(cases(), st.data())
def test_a_later_prompt_selects_among_its_own_tokens(case, data):
    """Its last tokens choose, and what the cache holds counts neither as a choice nor in the softmax."""
    module, plan, tokens, lengths, chunk = case
    plan = dataclasses.replace(selecting(plan, module.config.num_layers - 1), full_depth_first=1)
    _, cache, before = prefill_with_choice(module, tokens, lengths, plan, chunk)
    turn, added = data.draw(batches(module.config.vocab_size, max_rows=1))
    turn, added = turn.expand(len(tokens), -1), added.expand(len(tokens))
    _, _, chosen = prefill_with_choice(module, turn, added, plan, chunk, cache)
    for row, (n, m) in enumerate(zip(lengths.tolist(), added.tolist(), strict=True)):
        whole, entering = torch.cat((tokens[row, :n], turn[row, :m])), []
        others = torch.arange(m) < m - plan.full_depth_last
        full_depth = torch.cat((reference.full_depth_tokens(n, n, by_position(plan)), ~others))
        full_depth = by_layer(plan, full_depth, F.pad(before[row, :n], (0, m)))
        reference.forward(module, whole, full_depth, plan, entering=entering)
        assert_chosen(chosen[row, :m], selection_scores(entering, plan.selects_at, begin=n), others, plan)


def test_rotary_positions_of_images_count():
    """Qwen3-VL: the scores take the positions of patches, and the states with their features."""
    module, plan = random_model(tiny_qwen3_vl_config(), seed=2), PrunePlan((3, 4), full_depth_selected=0.25)
    drawn = torch.Generator().manual_seed(1)
    tokens, numbers = torch.randint(60, (1, 40), generator=drawn), torch.full((1, 40), -1)
    numbers[0, 5:25] = torch.arange(20)
    features, *deepstack = torch.randn(3, 20, 30, generator=drawn)
    positions = torch.randint(40, (3, 1, 40), generator=drawn)
    images = Images(features, numbers, rope_positions=positions, deepstack=tuple(deepstack))
    for chunk in (7, 100):
        with recorded_choices() as found:
            cache = new_cache(module, 1)
            engine.prefill(module, tokens, cache, torch.tensor([40]), plan, chunk, images=images)
        scores = reference.attention_scores(module, tokens[0], plan, images)
        assert_chosen(found[0][0], scores, torch.arange(40) < 39, plan)


@given(cases(), st.data())
def test_given_tokens_run_at_full_depth(case, data):
    """Any of them, besides those of the plan. The plan selects among the rest."""
    module, plan, tokens, lengths, chunk = case
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    given_tokens = torch.rand(tokens.shape, generator=random) < data.draw(st.sampled_from([0.1, 0.5, 1.0]))
    with recorded_choices() as found:
        logits, cache = prefill(module, tokens, lengths, plan, chunk, full_depth=given_tokens)
    for row, n in enumerate(lengths.tolist()):
        full_depth = reference.full_depth_tokens(n, n, by_position(plan)) | given_tokens[row, :n]
        if found:
            entering = []
            reference.forward(module, tokens[row, :n], full_depth, plan, entering=entering)
            assert_chosen(found[0][row, :n], selection_scores(entering, plan.selects_at), ~full_depth, plan)
            full_depth = by_layer(plan, full_depth, found[0][row, :n])
        expected, kv = reference.forward(module, tokens[row, :n], full_depth, plan)
        assert_close(logits[row], expected[-1])
        assert_close(held(module, cache, row), seen(module, stacked(kv)))


@given(cases())
def test_without_a_boundary_nothing_is_selected(case):
    """The tokens that would choose are in a later call."""
    module, plan, tokens, lengths, chunk = case
    caches = [new_cache(module, len(tokens), chunk=chunk) for _ in range(2)]
    for cache, one in zip(caches, (plan, by_position(plan)), strict=True):
        engine.prefill(module, tokens, cache, lengths, one, chunk, boundary=False)
    for row in range(len(tokens)):
        assert torch.equal(*(held(module, cache, row) for cache in caches))


@pytest.mark.parametrize("config", [tiny_config(), tiny_gemma3_config()])
def test_nothing_waits_for_the_device(config):
    """Reading a tensor on the meta device would raise, because it has no values."""
    with META:
        module = build(config)
    tokens, lengths = torch.zeros(2, 30, dtype=torch.int64), torch.tensor([30, 12])
    late = PrunePlan((2, 4), 2, 1, full_depth_selected=0.2, selecting_layer=3)
    for plan in (late, dataclasses.replace(late, selecting_layer=None), PrunePlan((0,), full_depth_selected=1.0), NONE):
        cache = engine.cache.KVCache(config, 2, 40, dtype=torch.float32, device=META)
        logits = engine.prefill(module, tokens, cache, lengths, plan, 64)
        assert logits.shape == (2, config.vocab_size)


def test_a_row_that_overflows_leaves_the_other_rows_choice_alone():
    module, plan = random_model(tiny_config(), seed=3), PrunePlan((1, 3), full_depth_selected=0.4)
    module.model.embed_tokens.weight.data[7] = torch.nan
    tokens, lengths = torch.arange(10, 50).view(2, 20), torch.tensor([20, 15])
    _, _, expected = prefill_with_choice(module, tokens, lengths, plan)
    tokens[0, 11], tokens[1, 15:] = 7, 7  # a token of the first row, and padding of the second
    logits, _, chosen = prefill_with_choice(module, tokens, lengths, plan)
    assert torch.equal(chosen[1], expected[1]) and chosen.sum(1).tolist() == expected.sum(1).tolist()
    assert logits.isfinite().all(1).tolist() == [False, True]
