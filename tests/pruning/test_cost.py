"""The counts of FLOPs and reads, against the published limits and against what torch counts while the engine runs."""

import dataclasses
import math

import pytest
import torch
from support.cases import random_corrections
from support.published_vl import published
from support.tiny import (
    random_model,
    tiny_config,
    tiny_gemma3_config,
    tiny_gemma3_vl_config,
    tiny_qwen3_moe_config,
    tiny_qwen3_vl_config,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from pop import engine
from pop.engine.cache import KVCache
from pop.models.config import Gemma3Config, LlamaConfig
from pop.models.vision.qwen3_vl import Grid
from pop.pruning.corrections import Corrections
from pop.pruning.cost import Machine, prefill_flops, prefill_seconds, speedup_limit
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
        (gemma3_12b(window=2048), 16, 1.451, 3),  # the window holds the whole prompt
        (gemma3_12b(window=1024), 16, 1.470, 3),  # pruned local layers project half the tokens
    ],
)
def test_limits_are_those_of_the_method_at_2048_tokens(config, pruned, limit, digits):
    plan = PrunePlan.deepest(config.num_layers, pruned / config.num_layers)
    assert len(plan.layers) == pruned
    assert round(speedup_limit(config, 2048, plan), digits) == limit


@pytest.mark.parametrize(
    "config", [tiny_config(), tiny_gemma3_config(), tiny_qwen3_moe_config()], ids=["llama", "gemma3", "experts"]
)
@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
@pytest.mark.parametrize(
    "plan",
    [
        PrunePlan(),
        PrunePlan(layers=(3, 4)),
        PrunePlan(layers=(0, 2), full_depth_last=5),
        PrunePlan(layers=(1, 2, 3), full_depth_last=4, full_depth_first=6),
        PrunePlan(layers=range(5), full_depth_last=60, full_depth_first=2),
        PrunePlan(layers=(2, 4), full_depth_last=3, full_depth_selected=0.25),
        PrunePlan(layers=(1, 3), full_depth_first=1, full_depth_selected=1.0),
        PrunePlan(layers=(0, 3), full_depth_last=3, full_depth_selected=0.25, selecting_layer=2),
        PrunePlan(layers=(0, 2, 3), full_depth_first=1, full_depth_selected=0.5, selecting_layer=1),
        PrunePlan(layers=(3, 4), full_depth_selected=0.25, selecting_layer=1),
    ],
)
def test_count_equals_what_torch_counts_in_the_engine(config, tokens, plan):
    """Matrix products as torch counts them; attention (torch counts the whole square) in closed form.

    Selected tokens are counted in the middles of as many equal parts of the tokens among which they are.
    """
    module = random_model(config)
    cache = KVCache(config, 1, tokens, dtype=torch.float32, device=torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        engine.prefill(module, torch.ones(1, tokens, dtype=torch.int64), cache, torch.tensor([tokens]), plan, 2048)
    counts = counter.get_flop_counts()["Global"]
    linear = sum(flops for op, flops in counts.items() if str(op) in ("aten.mm", "aten.addmm"))

    by_position = {*range(tokens)[: plan.full_depth_first], *range(tokens)[-plan.full_depth_last :]}
    selected, attended, again, selection = set(), 0, 0, 0
    others = sorted({*range(tokens)} - by_position)
    if count := int(len(others) * plan.full_depth_selected):
        selected = {others[int((number + 0.5) * len(others) / count)] for number in range(count)}
        # The engine projects K and V for the selection, although the cache gets the same K, and V has no part in it.
        again += tokens + min(16, tokens)
        selection = min(16, tokens) * tokens * 2 * config.num_heads * config.head_dim
    for layer, window in enumerate(config.windows):
        selects = plan.layers and layer >= plan.selects_at
        positions = by_position | selected if selects else by_position
        attending = positions if layer in plan.layers else range(tokens)
        attended += sum(min(p + 1, window or tokens) for p in attending)
        # The engine projects K and V of full-depth rows twice, with the pruned tokens and at full depth. If no token is
        # left to prune, it runs the layers as if they were kept.
        if layer in plan.layers and len(positions) < tokens:
            begin = 0 if window is None or (count and selects) else tokens - plan.full_depth_last - window + 1
            again += sum(p >= begin for p in positions)
    attention = attended * 2 * 2 * config.num_heads * config.head_dim
    again *= 2 * 2 * config.hidden_size * config.num_kv_heads * config.head_dim
    assert prefill_flops(config, tokens, plan) == linear - again + attention + selection


def test_refit_projections_need_other_keys_for_the_selection():
    """Half of SmolLM2, with a tenth of the tokens at full depth by choice."""
    weight = torch.zeros(15, 2, 3 * 64, 576)
    plan = PrunePlan(range(15, 30), 1, 1, Corrections(range(15, 30), weight, weight[..., 0], "", 1))
    plain, refit = (dataclasses.replace(plan, full_depth_selected=0.1, **one) for one in ({"projections": None}, {}))
    difference = prefill_flops(SMOLLM2, 1024, refit) - prefill_flops(SMOLLM2, 1024, plain)
    assert difference == 2 * 1024 * 576 * 3 * 64
    assert [round(speedup_limit(SMOLLM2, 1024, one), 2) for one in (plan, plain, refit)] == [1.89, 1.74, 1.74]


@pytest.mark.parametrize("layers", [(3, 4), (0, 2, 3)])
@pytest.mark.parametrize("taps", [1, 2])
@pytest.mark.parametrize("rank", [None, 7])
@pytest.mark.parametrize("seed", range(3))  # which decides after how many groups h is updated
def test_a_refit_costs_what_torch_counts_in_the_engine(layers, taps, rank, seed):
    """Beside plain pruning. The engine also refits K and V of the three full-depth tokens, which it then replaces."""
    config, T = tiny_config(), 20
    module, counted = random_model(config), []
    plan = PrunePlan(layers, 2, 1, random_corrections(config, layers, seed, taps, rank))
    for one in (plan, dataclasses.replace(plan, corrections=None)):
        cache = KVCache(config, 1, T, dtype=torch.float32, device=torch.device("cpu"))
        with FlopCounterMode(display=False) as counter:
            engine.prefill(module, torch.ones(1, T, dtype=torch.int64), cache, torch.tensor([T]), one, 2048)
        counted.append(counter.get_total_flops() - prefill_flops(config, T, one))
    KV = 2 * config.num_kv_heads * config.head_dim
    more = 7 if rank else (taps - 1) * config.hidden_size  # inputs of each of these, beside the layer's own
    assert counted[0] - counted[1] == 2 * 3 * KV * more * len(layers)


@pytest.mark.parametrize("share", [0.3, 1.0])  # with 1.0, nothing is pruned from the selecting layer on
def test_a_refit_below_the_selecting_layer_costs_what_torch_counts(share):
    config, layers, counted = tiny_config(), (0, 3), []
    module, refit = random_model(config), random_corrections(config, layers, -1, 2, 7)
    plan = PrunePlan(layers, 2, 1, refit, share, selecting_layer=2)
    for one in (plan, dataclasses.replace(plan, corrections=None)):
        cache = KVCache(config, 1, 20, dtype=torch.float32, device=torch.device("cpu"))
        with FlopCounterMode(display=False) as counter:
            engine.prefill(module, torch.ones(1, 20, dtype=torch.int64), cache, torch.tensor([20]), one, 2048)
        counted.append(counter.get_total_flops() - prefill_flops(config, 20, one))
    again = {0.3: 3 + 3 + 5, 1.0: 3}[share]  # full-depth tokens that the engine also refits, in both layers
    assert counted[0] - counted[1] == 2 * again * 2 * config.num_kv_heads * config.head_dim * 7


def test_nothing_to_gain():
    config = tiny_config()
    assert speedup_limit(config, 100, PrunePlan()) == 1
    assert speedup_limit(config, 1, PrunePlan(layers=(2, 3))) == 1  # the boundary token is the whole prompt
    assert speedup_limit(config, 9, PrunePlan(layers=(2, 3), full_depth_last=9)) == 1
    refit = random_corrections(config, (2, 3), 0, 2, rank=4)
    assert speedup_limit(config, 9, PrunePlan((2, 3), 9, 1, refit)) == 1


# Memory reads

READS = Machine(flops_per_s=math.inf, bytes_per_s=1, itemsize=1)  # its seconds are the numbers that are read


def llama_8b_by_hand(tokens: int, vocabulary: int) -> float:
    """T(none) / T(10 of 32 layers) of Llama-3.1-8B in bfloat16 on an H100: 640 TFLOP/s and 3.0 TB/s."""
    weights, kv = 2 * 4096 * (4096 + 1024) + 3 * 4096 * 14_336, 2 * 4096 * 1024
    kept = (2 * tokens * weights + 2 * 4096 * tokens * (tokens + 1)) / 640e12  # more than the time of its reads
    pruned = 2 * tokens * kv / 640e12 + 2 * (weights + 2048 * tokens) / 3e12  # all tokens' k and v, and the last token
    head = 2 * 4096 * vocabulary / 3e12
    return (32 * kept + head) / (22 * kept + 10 * pruned + head)


@pytest.mark.parametrize(
    ("tokens", "layers_only", "limit"), [(512, 1.21, 1.20), (2048, 1.37, 1.36), (4096, 1.40, 1.40), (8192, 1.42, 1.42)]
)
def test_a_gpu_reads_the_pruned_layers_for_one_token(tokens, layers_only, limit):
    """0.44 GB for each pruned layer bound the speedup, although the arithmetic allows 1.43x at any length."""
    plan, h100 = PrunePlan.deepest(32, 10 / 32), Machine(flops_per_s=640e12, bytes_per_s=3.0e12)
    counted = speedup_limit(LLAMA_8B, tokens, plan, machine=h100)
    assert counted == pytest.approx(llama_8b_by_hand(tokens, LLAMA_8B.vocab_size), rel=1e-4)
    assert round(counted, 2) == limit
    without_head = dataclasses.replace(LLAMA_8B, vocab_size=1)  # the head's 1.05 GB are read by every plan
    assert round(speedup_limit(without_head, tokens, plan, machine=h100), 2) == layers_only
    assert round(speedup_limit(LLAMA_8B, tokens, plan), 2) == 1.43


class WeightsRead(TorchFunctionMode):
    """Counts the numbers of each matrix, at each product that it is in."""

    total = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.total += args[1].numel() if function is torch.nn.functional.linear else 0
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("chunk", [1, 7, 16, 100])
@pytest.mark.parametrize("config", [tiny_config(), tiny_gemma3_config()], ids=["llama", "gemma3"])
@pytest.mark.parametrize(("layers", "last", "first", "taps"), [
    ((), 1, 0, 0), ((3, 4), 1, 0, 0), ((0, 2), 5, 3, 0), ((0, 2), 1, 1, 1), ((1, 2, 3), 2, 1, 2),
])  # fmt: skip
def test_reads_are_the_matrices_of_the_products_in_the_engine(config, chunk, layers, last, first, taps):
    tokens, KE = 40, config.num_kv_heads * config.head_dim
    weight = torch.zeros(len(layers), 2, KE, max(1, taps) * config.hidden_size)
    refit = Corrections(layers, weight, weight[..., 0], "", taps) if taps else None
    plan = PrunePlan(layers, last, first, refit)
    cache = KVCache(config, 1, tokens, dtype=torch.float32, device=torch.device("cpu"))
    prompt = torch.ones(1, tokens, dtype=torch.int64)
    with WeightsRead() as counter:
        engine.prefill(random_model(config), prompt, cache, torch.tensor([tokens]), plan, chunk)

    attended = 0  # positions whose K and V are read, by a set for each layer and chunk
    for begin in range(0, tokens, chunk):
        everyone = range(tokens)[begin : begin + chunk]
        for layer, window in enumerate(config.windows):
            attending = [p for p in everyone if layer not in layers or p < first or p >= tokens - last]
            attended += len({key for p in attending for key in range(max(0, p - (window or tokens) + 1), p + 1)})
    counted = prefill_seconds(config, tokens, plan, READS._replace(chunk_size=chunk))
    assert counted == counter.total + 2 * KE * attended


@pytest.mark.parametrize("tokens", [1, 2, 3, 40])
def test_few_tokens_read_few_experts(tokens):
    """3 of 7 experts a token, 30 x 14 each, in three of five layers."""
    config = tiny_qwen3_moe_config()
    less = tiny_qwen3_moe_config(experts=dataclasses.replace(config.experts, layers=()))
    difference = prefill_seconds(config, tokens, PrunePlan(), READS) - prefill_seconds(less, tokens, PrunePlan(), READS)
    assert difference == 3 * (30 * 7 + min(7, 3 * tokens) * 3 * 30 * 14 - 3 * 30 * 44)


def test_a_tower_is_read_once():
    config = tiny_qwen3_vl_config()
    tower = random_model(config).model.visual
    matrices = sum(
        weight.numel() for name, weight in tower.named_parameters() if weight.dim() > 1 and "pos" not in name
    )
    text, image = (prefill_seconds(config, 40, PrunePlan(), READS, patches) for patches in ((), [24, 16]))
    assert image - text == matrices


# Images


def vision_flops(config, patches):
    """What images add to a prompt."""
    text, whole = (prefill_flops(config, 9, PrunePlan.none(), shown) for shown in ((), patches))
    return whole - text


def test_the_tower_is_counted_as_torch_counts_it():
    """Images of two sizes and a video of three frame pairs. Frame pairs do not attend each other."""
    config = tiny_qwen3_vl_config()
    tower = random_model(config).model.visual
    grids = [Grid(1, 4, 6), Grid(1, 2, 8), Grid(3, 4, 6)]
    patches = [24, 16, 24, 24, 24]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tower(torch.zeros(sum(patches), config.vision.patch_values), grids)
    assert counter.get_total_flops() == vision_flops(config, patches)


def test_gemmas_tower_is_counted_as_torch_counts_it():
    config = tiny_gemma3_vl_config()
    module = random_model(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module.image_features(torch.zeros(2, 3, 28, 28))
    assert counter.get_total_flops() == vision_flops(config, [16, 16])


def test_the_tower_caps_what_pruning_gains():
    """A third of Qwen3-VL-8B is pruned. A text gains 1.47x, and a prompt with an image of 640 x 480 pixels less."""
    config, plan = published("8b"), PrunePlan.deepest(36, 1 / 3)
    text, patches = speedup_limit(config, 366, plan), [1200]
    assert round(text, 2) == 1.47
    share = vision_flops(config, patches) / prefill_flops(config, 366, PrunePlan.none(), patches)
    assert round(share, 2) == 0.20
    limit = speedup_limit(config, 366, plan, patches)
    assert limit == pytest.approx(1 / (share + (1 - share) / text)) and round(limit, 2) == 1.34
