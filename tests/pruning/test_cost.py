"""The counts of FLOPs, against the published limits and against what torch counts while the engine runs."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import plans, random_corrections
from support.published_vl import published
from support.tiny import random_model, tiny_config, tiny_gemma3_config, tiny_qwen3_moe_config
from torch.utils.flop_counter import FlopCounterMode

from pop import engine
from pop.engine.cache import KVCache
from pop.models.config import Gemma3Config, LlamaConfig
from pop.pruning.cost import prefill_flops, rank_of, speedup_limit
from pop.pruning.plan import PrunePlan

LLAMA_8B = LlamaConfig(128_256, 4096, 14_336, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128)
SMOLLM2 = LlamaConfig(49_152, 576, 1536, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64)


def gemma3_12b(window: int) -> Gemma3Config:
    windows = tuple(None if n % 6 == 0 else window for n in range(1, 49))
    return Gemma3Config(262_208, 3840, 15_360, windows, num_heads=16, num_kv_heads=8)


@pytest.mark.parametrize(
    ("config", "pruned", "limit", "digits"),
    [
        (LLAMA_8B, 10, 1.430, 3),
        (LLAMA_8B, 16, 1.93, 2),
        (LLAMA_8B, 21, 2.71, 2),
        (SMOLLM2, 10, 1.47, 2),
        (SMOLLM2, 15, 1.91, 2),
        (SMOLLM2, 20, 2.74, 2),
        (published("30b-a3b"), 16, 1.48, 2),  # a pruned layer saves both attention and experts
        (gemma3_12b(window=2048), 16, 1.451, 3),  # the window holds the whole prompt
        (gemma3_12b(window=1024), 16, 1.450, 3),  # attention is a smaller part of what pruning saves
    ],
)
def test_limits_are_those_of_the_method_at_2048_tokens(config, pruned, limit, digits):
    plan = PrunePlan.deepest(config.num_layers, pruned / config.num_layers)
    assert len(plan.layers) == pruned
    assert round(speedup_limit(config, 2048, plan), digits) == limit


@pytest.mark.parametrize(
    "config", [tiny_config(), tiny_gemma3_config(), tiny_qwen3_moe_config()], ids=["llama", "gemma3", "experts"]
)
@given(st.sampled_from([1, 7, 40]), st.data())
def test_count_equals_what_torch_counts_in_the_engine(config, tokens, data):
    assert_counts_are_equal(config, tokens, data.draw(plans(config)))


@pytest.mark.parametrize("selected", [0.3, 1.0])
def test_corrections_before_and_after_the_selecting_layer_are_counted(selected):
    config = tiny_config()
    layers = (1, 3)
    plan = PrunePlan(layers, 2, 1, random_corrections(config, layers, 0, 7), selected, selecting_layer=2)
    assert_counts_are_equal(config, 20, plan)


def assert_counts_are_equal(config, tokens: int, plan: PrunePlan) -> None:
    """Matrix products as torch counts them; attention (torch counts the whole square) in closed form.

    The count places selected tokens in the middles of equal parts of the tokens among which they are selected.
    """
    cache = KVCache(config, 1, tokens, dtype=torch.float32, device=torch.device("cpu"))
    prompt = torch.ones(1, tokens, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        engine.prefill(random_model(config), prompt, cache, torch.tensor([tokens]), plan, 2048)
    counts = counter.get_flop_counts()["Global"]
    linear = sum(flops for op, flops in counts.items() if str(op) in ("aten.mm", "aten.addmm"))

    by_position = {*range(tokens)[: plan.full_depth_first], *range(tokens)[-plan.full_depth_last :]}
    if tokens < plan.full_depth_below:
        by_position = {*range(tokens)}
    others = sorted({*range(tokens)} - by_position)
    selected = set()
    attended = 0
    again = 0  # tokens of which the engine projects K and V a second time
    corrected = 0  # tokens whose K and V it corrects, and then replaces
    selection = 0
    if plan.layers and (count := int(len(others) * plan.full_depth_selected)):
        selected = {others[int((number + 0.5) * len(others) / count)] for number in range(count)}
        # The engine projects K and V for the selection, although the cache gets the same K, and V has no part in it.
        again += tokens + 16
        padding = 16 - min(16, tokens)  # queries, which the engine computes all the same
        linear -= padding * 2 * config.hidden_size * config.num_heads * config.head_dim
        selection = min(16, tokens) * tokens * 2 * config.num_heads * config.head_dim
    for layer, window in enumerate(config.windows):
        selects = plan.layers and layer > plan.selects_at
        positions = by_position | selected if selects else by_position
        attending = positions if layer in plan.layers else range(tokens)
        attended += sum(min(p + 1, window or tokens) for p in attending)
        # The engine projects K and V of full-depth rows twice, with the pruned tokens and at full depth. If no token is
        # left to prune, it runs the layers as if they were kept.
        if layer in plan.layers and len(positions) < tokens:
            again += len(positions)
            corrected += len(positions)
    rank = rank_of(plan)
    attention = attended * 2 * 2 * config.num_heads * config.head_dim
    twice = 2 * 2 * config.num_kv_heads * config.head_dim * (again * config.hidden_size + corrected * rank)
    found = prefill_flops(config, tokens, plan)
    assert found == linear - twice + attention + selection
    assert found == prefill_flops(config, tokens, dataclasses.replace(plan, corrections=None), rank=rank)


def test_nothing_to_gain():
    config = tiny_config()
    assert speedup_limit(config, 100, PrunePlan()) == 1
    assert speedup_limit(config, 1, PrunePlan(layers=(2, 3))) == 1  # the boundary token is the whole prompt
    assert speedup_limit(config, 9, PrunePlan(layers=(2, 3), full_depth_last=9)) == 1
    corrections = random_corrections(config, (2, 3), 0, 4)
    assert speedup_limit(config, 9, PrunePlan((2, 3), 9, 1, corrections)) == 1
