"""Replayed passes give what passes give that run as they are, and few of them serve prompts of many lengths."""

import copy
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.cases import assert_close, cases, new_cache, random_corrections, recorded_choices
from support.replay import Replay
from support.tiny import random_model, tiny_config

from pop import engine
from pop.engine import chunks, layer_pass
from pop.engine.decode_step import DecodeStep
from pop.engine.layer_pass import ReplayedPasses
from pop.engine.stages import Stages
from pop.models.images import Images
from pop.pruning.plan import PrunePlan

REPLAYED = Stages(replay=Replay, replayed_tokens=1000)
PLAN = PrunePlan((1, 2), full_depth_last=3)
SELECTING = PrunePlan((1, 2), full_depth_selected=0.5)
# These differ in their corrections only.
CALIBRATED = [PrunePlan((1, 2), 2, 1, random_corrections(tiny_config(), (1, 2), seed)) for seed in (1, 2)]
CLOSE = {"rtol": 0, "atol": 1e-5}


def prefill(module, num_tokens, cache, plan=PLAN, stages=REPLAYED):
    tokens = torch.arange(num_tokens)[None] % module.config.vocab_size
    return engine.prefill(module, tokens, cache, torch.tensor([num_tokens]), plan, 1000, stages)


@patch.object(chunks, "stepped", lambda size: -(-size // 4) * 4)  # so that short prompts have padding
@settings(max_examples=2 * settings().max_examples)
@given(cases(), st.lists(st.integers(0, 3), min_size=2, max_size=4), st.integers(0, 3), st.integers(0, 3))
def test_replayed_prompts_are_prefill(case, shortened, room, more):
    """Any family, plan and ragged rows; prompts of lengths near each other, one after the other in one cache."""
    module, plan, tokens, lengths, _ = case
    longest = int(lengths.max())
    chunk_size = longest + more
    caches = [new_cache(module, len(tokens), longest + room, chunk_size) for _ in range(2)]
    handed_out = []
    bands = {}
    for number, less in enumerate(shortened):
        tokens = tokens.roll(number + 1, 1)
        few = (lengths - less).clamp(min=1)
        results = []
        choices = []
        for cache, stages in zip(caches, (Stages(), REPLAYED), strict=True):
            cache.reset()
            with recorded_choices() as found:
                results.append(engine.prefill(module, tokens, cache, few, plan, chunk_size, stages))
            choices.append(found)
        assume(all(map(torch.equal, *choices)))  # rounding may decide between equal scores
        assert_close(results[1], results[0])
        for mine, others in zip(caches[1].keys + caches[1].values, caches[0].keys + caches[0].values, strict=True):
            assert_close(mine[:, :-1], others[:, :-1])  # the spare slot may differ
        assert_close(caches[1].previous_hidden, caches[0].previous_hidden)
        handed_out += [(tensor, tensor.clone()) for tensor in (results[1], caches[1].previous_hidden)]
        for key, ((chunk, full, h, _), _) in caches[1].passes[ReplayedPasses].kept.items():
            assert h.shape[1] <= min(longest + room, chunk_size)
            attention = (*chunk.attention.values(), *full.attention.values())
            found = [metadata.band.tolist() for metadata in attention if metadata.band is not None]
            assert found == bands.setdefault(key, found)  # which the host reads, so a graph has the first ones
    assert all(torch.equal(now, then) for now, then in handed_out)


@pytest.mark.parametrize(
    ("prompts", "slots", "count"),
    [
        ([(65, PLAN), (80, PLAN), (70, PLAN)], 200, 1),
        ([(80, PLAN), (81, PLAN)], 200, 2),
        ([(70, SELECTING), (72, SELECTING)], 72, 2),
        ([(9, plan) for plan in (PLAN, PrunePlan((0, 2), full_depth_last=3), *CALIBRATED, PLAN, *CALIBRATED)], 64, 4),
    ],
    ids=["65 to 80 tokens run as 80", "81 tokens do not", "two phases of a plan that selects", "one for each plan"],
)
def test_prompts_of_near_lengths_and_one_plan_share_a_pass(prompts, slots, count):
    """Of 70 tokens, the plan that selects runs 35 at full depth, and of 72 tokens 36."""
    module = random_model(tiny_config())
    cache, other = (new_cache(module, 1, slots) for _ in range(2))
    for num_tokens, plan in prompts:
        cache.reset()
        other.reset()
        expected = prefill(module, num_tokens, other, plan, Stages())
        torch.testing.assert_close(prefill(module, num_tokens, cache, plan), expected, **CLOSE)
    assert len(cache.passes[ReplayedPasses].kept) == count


def test_a_chunk_has_as_many_columns_as_tokens_at_full_depth():
    """The first row is too short for the plan. Its 37 tokens would go up to 40, but the cache has room for 39."""
    module = random_model(tiny_config())
    tokens = torch.randint(60, (2, 39), generator=torch.Generator().manual_seed(0))
    inputs = torch.tensor([37, 39]), PrunePlan((1, 2), full_depth_below=38), 1000
    caches = [new_cache(module, 2, 39) for _ in range(2)]
    found = engine.prefill(module, tokens, caches[0], *inputs, REPLAYED)
    expected = engine.prefill(module, tokens, caches[1], *inputs)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_a_cache_keeps_passes_of_the_latest_sizes(monkeypatch):
    monkeypatch.setattr(layer_pass, "MOST_REPLAYED", 2)
    module = random_model(tiny_config())
    cache = new_cache(module, 1)
    made, others = [], []

    def replay(module, what, other):
        others.append(other)
        made.append(Replay(module, what, other))
        return made[-1]

    stages = Stages(replay=replay, replayed_tokens=1000)
    for num_tokens in (5, 6, 5, 7):
        cache.reset()
        prefill(module, num_tokens, cache, stages=stages)
    h = [fixed[2] for fixed, _ in cache.passes[ReplayedPasses].kept.values()]
    assert [x.shape[1] for x in h] == [5, 7]
    assert others == [None, made[0], made[1]]  # each shares the memory of one before


@pytest.mark.parametrize(
    "options",
    [
        {"stages": REPLAYED._replace(replayed_tokens=8)},
        {"chunk_size": 8},
        {"images": Images(torch.zeros(1, 30), torch.tensor([[-1, 0, *[-1] * 7]]))},
        {"stages": Stages()},
    ],
    ids=["too many tokens", "several chunks", "images", "an engine without replay"],
)
def test_what_runs_as_it_is(options):
    module = random_model(tiny_config())
    cache = new_cache(module, 1)
    options = {"chunk_size": 99, "stages": REPLAYED} | options
    engine.prefill(module, torch.ones(1, 9, dtype=torch.int64), cache, torch.tensor([9]), PLAN, **options)
    assert ReplayedPasses not in cache.passes


def test_extend_and_a_prompt_after_tokens_run_as_they_are():
    module = random_model(tiny_config())
    cache = new_cache(module, 1)
    engine.extend(module, torch.ones(1, 17, dtype=torch.int64), cache, REPLAYED)
    prefill(module, 9, cache)
    assert ReplayedPasses not in cache.passes


def test_a_step_and_passes_serve_one_cache_as_long_as_its_tensors_stay():
    module = random_model(tiny_config())
    cache = new_cache(module, 2)
    tokens, lengths = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([3, 3])

    def kept(stages):
        cache.reset()
        engine.prefill(module, tokens, cache, lengths, PLAN, 9, stages)
        engine.decode(module, tokens[:, 0], cache, stages)
        return {*cache.passes.values()}

    first = kept(REPLAYED)
    assert {*cache.passes} == {DecodeStep, ReplayedPasses}
    assert kept(REPLAYED) == first
    assert copy.deepcopy(cache).passes == {}
    assert kept(REPLAYED._replace(replayed_tokens=999)).isdisjoint(first)
    cache.keep_rows(torch.tensor([1]))
    assert cache.passes == {}
