"""What must hold for prefill-only pruning, whatever the model, the plan, the batch and the chunks.

The first test holds the reference (pop/pruning/reference.py) to the paper, and the next two check what it does beyond
that. The others run the engine, which tests/engine/test_forward.py holds to the reference. All use float32 and tiny
random models with awkward sizes.
"""

import dataclasses

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support.cases import (
    NONE,
    assert_close,
    batches,
    cached_kv,
    cases,
    models,
    plain,
    plans,
    prefill,
    random_corrections,
)
from support.naive_method import scores_at_selecting_layer, token_by_token
from support.tiny import random_model, tiny_config

from pop.pruning import reference
from pop.pruning.plan import PrunePlan

pytestmark = pytest.mark.usefixtures("small_query_blocks", "short_averages")


@given(models(), st.data())
def test_the_reference_is_the_paper_read_literally(module, data):
    """The prompt without its last w tokens is encoded pruned, and these w are decoded at full depth, token by token.

    The first tokens of a plan with sinks run at full depth, and so do those that it selects, and short prompts.
    """
    plan = data.draw(plans(module.config))
    tokens, _ = data.draw(batches(module.config.vocab_size, max_rows=1))
    n = tokens.shape[1]
    pruned = range(plan.full_depth_first, n - plan.full_depth_last) if n >= plan.full_depth_below else range(0)
    full_depth = reference.full_depth_tokens(n, n, plan).tolist()
    assert full_depth == [position not in pruned for position in range(n)]
    selected = reference.selected_tokens(module, tokens[0], plan)
    chosen = [False] * n if selected is None else selected.tolist()
    assert sum(chosen) == (int(len(pruned) * plan.full_depth_selected + 1e-9) if plan.layers else 0)
    assert all(position in pruned for position in range(n) if chosen[position])
    plans_of_tokens = [plan if position in pruned else NONE for position in range(n)]
    ends = [plan.selects_at + 1 if is_chosen else module.config.num_layers for is_chosen in chosen]
    logits, _ = token_by_token(module, tokens[0], plans_of_tokens, ends)
    assert_close(reference.prefill(module, tokens[0], plan), logits[-1])


def test_corrections_may_have_another_dtype_than_the_module():
    """Those of plans that ship are bfloat16."""
    module = random_model(tiny_config(), seed=1)
    half = random_corrections(module.config, (1, 3), 1).to(torch.device("cpu"), torch.bfloat16)
    plans = [PrunePlan((1, 3), 1, 1, one) for one in (half, half.to(torch.device("cpu"), torch.float32))]
    found, expected = (reference.prefill(module, torch.arange(20), plan) for plan in plans)
    assert torch.equal(found, expected)


@given(models(), st.data())
def test_scores_are_the_attention_of_the_last_tokens(module, data):
    """At the selecting layer, in a pass in which no token has been selected yet."""
    tokens, _ = data.draw(batches(module.config.vocab_size, max_rows=1))
    plan, n = data.draw(plans(module.config)), tokens.shape[1]
    assume(plan.layers and plan.selects_at >= 0)
    full_depth = reference.full_depth_tokens(n, n, plan)
    expected = scores_at_selecting_layer(module, tokens[0], full_depth, plan)
    torch.testing.assert_close(reference.attention_scores(module, tokens[0], plan), expected)


# Where pruning changes nothing


@pytest.mark.parametrize(
    "why",
    ["no layer is pruned", "a prompt of one token", "full depth for all tokens", "the pruned layers write nothing"],
)
@given(case=cases())
def test_what_prunes_nothing_is_the_plain_forward_pass(why, case):
    module, plan, tokens, lengths, chunk = case
    if why == "no layer is pruned":
        plan = plain(plan, layers=())
    elif why == "a prompt of one token":
        lengths = torch.ones_like(lengths)
    elif why == "full depth for all tokens":
        plan = dataclasses.replace(plan, full_depth_last=tokens.shape[1])
    else:
        plan = plain(plan)
        for index in plan.layers:
            for name, parameter in module.layers[index].named_parameters():
                if "o_proj" in name or "down_proj" in name:  # an MLP's, or all experts'
                    parameter.data.zero_()
    logits, _ = prefill(module, tokens, lengths, plan, chunk)
    assert_close(logits, module(tokens)[torch.arange(len(tokens)), lengths - 1].detach())


@given(cases())
def test_pruning_only_the_last_layer_changes_nothing(case):
    """Its K and V are projected from the very state that the full model has there."""
    module, plan, tokens, lengths, chunk = case
    plan = plain(plan, layers=(module.config.num_layers - 1,))
    logits, cache = prefill(module, tokens, lengths, plan, chunk)
    full_logits, full_cache = prefill(module, tokens, lengths, NONE, chunk)
    assert_close(logits, full_logits)
    for row in range(len(tokens)):
        assert_close(cached_kv(module, cache, row), cached_kv(module, full_cache, row))


@given(cases())
def test_the_boundary_token_enters_the_first_pruned_layer_as_in_the_full_model(case):
    """Bit for bit: below that layer nothing has been skipped."""
    module, plan, tokens, lengths, chunk = case
    if not plan.layers:
        plan = plain(plan, layers=(module.config.num_layers // 2,))
    _, pruned = prefill(module, tokens, lengths, plan, chunk)
    _, full = prefill(module, tokens, lengths, NONE, chunk)
    first = plan.layers[0]
    assert torch.equal(pruned.previous_hidden[first], full.previous_hidden[first])  # [B, D]
