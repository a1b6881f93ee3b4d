"""The roofline of tools/bench: seconds by hand, and reads against what the engine multiplies with."""

import dataclasses
import math

import pytest
import torch
from support.cases import random_corrections
from support.tiny import random_model, tiny_config, tiny_gemma3_config, tiny_qwen3_moe_config
from support.torch_calls import calls_of

from pop import cost, engine
from pop.engine.cache import KVCache
from pop.models.config import LlamaConfig
from pop.pruning.plan import PrunePlan
from tools.bench.roofline import Machine, prefill_seconds, speedup_limit

LLAMA_8B = LlamaConfig(128_256, 4096, 14_336, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128)
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
    counted = speedup_limit(LLAMA_8B, tokens, plan, h100)
    assert counted == pytest.approx(llama_8b_by_hand(tokens, LLAMA_8B.vocab_size), rel=1e-4)
    assert round(counted, 2) == limit
    without_head = dataclasses.replace(LLAMA_8B, vocab_size=1)  # the head's 1.05 GB are read by every plan
    assert round(speedup_limit(without_head, tokens, plan, h100), 2) == layers_only
    assert round(cost.speedup_limit(LLAMA_8B, tokens, plan), 2) == 1.43


@pytest.mark.parametrize("chunk", [7, 16, 100])
@pytest.mark.parametrize("config", [tiny_config(), tiny_gemma3_config()], ids=["llama", "gemma3"])
@pytest.mark.parametrize(("layers", "last", "first", "corrected"), [
    ((), 1, 0, False), ((0, 2), 5, 3, False), ((1, 2, 3), 2, 1, True),
])  # fmt: skip
def test_reads_are_the_matrices_of_the_products_in_the_engine(config, chunk, layers, last, first, corrected):
    tokens = 40
    KE = config.num_kv_heads * config.head_dim
    corrections = random_corrections(config, layers, -1, 7) if corrected else None
    plan = PrunePlan(layers, last, first, corrections)
    cache = KVCache(config, 1, tokens, dtype=torch.float32, device=torch.device("cpu"))
    prompt = torch.ones(1, tokens, dtype=torch.int64)
    arguments = (random_model(config), prompt, cache, torch.tensor([tokens]), plan, chunk)
    _, called = calls_of(engine.prefill, *arguments)
    read = sum(args[1].numel() for function, args, _ in called if function is torch.nn.functional.linear)

    attended = 0  # positions whose K and V are read, by a set for each layer and chunk
    for begin in range(0, tokens, chunk):
        everyone = range(tokens)[begin : begin + chunk]
        for layer, window in enumerate(config.windows):
            attending = [p for p in everyone if layer not in layers or p < first or p >= tokens - last]
            attended += len({key for p in attending for key in range(max(0, p - (window or tokens) + 1), p + 1)})
    counted = prefill_seconds(config, tokens, plan, READS._replace(chunk_size=chunk))
    assert counted == read + 2 * KE * attended


@pytest.mark.parametrize("tokens", [1, 2, 3, 40])
def test_few_tokens_read_few_experts(tokens):
    """3 of 7 experts a token, 30 x 14 each, in five layers."""
    config = tiny_qwen3_moe_config()
    less = tiny_qwen3_moe_config(experts=None)
    difference = prefill_seconds(config, tokens, PrunePlan(), READS) - prefill_seconds(less, tokens, PrunePlan(), READS)
    assert difference == 5 * (30 * 7 + min(7, 3 * tokens) * 3 * 30 * 14 - 3 * 30 * 44)
