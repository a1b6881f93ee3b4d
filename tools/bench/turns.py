"""The turns of a round: the machine's peak and bandwidth, the parts of a prefill, and `pop` itself.

Those of other libraries are in rivals.py.
"""

from __future__ import annotations

from functools import partial
from statistics import median

import torch

import pop
from pop.engine.chunks import Chunk, Prompts, chunk_bounds
from pop.engine.modes import engine_modes
from pop.models.images import TEXT
from tools.bench.rounds import Turn, device_seconds, seconds
from tools.bench.shapes import bandwidth_bytes
from tools.common import timed


def peak_turn(device: torch.device, dtype: torch.dtype) -> Turn:
    """FLOPs per second of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.randn(n, n, device=device).to(dtype)
    return lambda: {"flops_per_s": 2 * n**3 / device_seconds(lambda: a @ b, device, 3)}


def bandwidth_turn(device: torch.device) -> Turn:
    """Bytes per second of memory: the fastest of a sum, a matrix-vector product, and a copy from half to half."""
    size = bandwidth_bytes(device)
    big = torch.ones(2, size // 8 // 4096, 4096, device=device)
    vector = torch.ones(4096, device=device)
    moves = (lambda: big.sum(), lambda: big.view(-1, 4096) @ vector, lambda: big[0].copy_(big[1]))
    return lambda: {"bytes_per_s": size / min(device_seconds(move, device, 3) for move in moves)}


def attention_turn(model: pop.Model, num_tokens: int) -> Turn:
    """Seconds of the attention of all layers in a full prefill, over the same chunks as in the engine."""
    config = model.config
    q = torch.randn(1, num_tokens, config.num_heads, config.head_dim, device=model.device).to(model.dtype)
    cache = model.new_cache(1, num_tokens)
    prompts = Prompts(
        tokens=torch.zeros(1, num_tokens, dtype=torch.int64),
        lengths=torch.tensor([num_tokens]),
        images=TEXT,
        full_depth=torch.zeros(1, num_tokens, dtype=torch.bool),
    )
    chunks = []
    for begin, end in chunk_bounds(prompts, cache.chunk_size):
        chunk = Chunk.of(model.module, cache, prompts, (begin, end))
        chunks.append((q[:, begin:end], chunk.attention))

    def attend():
        for queries, attention in chunks:
            for index, layer in enumerate(model.module.layers):
                keys = cache.keys[index]
                values = cache.values[index]
                layer.cache_attention(queries, keys, values, attention[layer.window], layer.scale)

    return lambda: {"attention_s": seconds(attend, model.device)}


def tower_turn(model: pop.Model, prompt: list[int], images: list) -> Turn:
    """Seconds from prepared images to the features that the language model receives."""
    tokens = torch.tensor([prompt], device=model.device)
    lengths = torch.tensor([len(prompt)])
    media = model.vision.prepare_batch([images], None, 1)
    call = partial(engine_modes()(model.vision.images), model._stages.vision_module, media, tokens, lengths)
    return lambda: {"tower_s": seconds(call, model.device)}


def pop_turn(
    model: pop.Model, prompt: list[int], cache: pop.KVCache, plan: pop.PrunePlan, steps: int, images: list
) -> Turn:
    """TTFT in seconds and, if steps is above 0, the median seconds of a decode step."""

    def turn():
        cache.reset()
        ttft, steps_s = timed(
            lambda: int(model.prefill([prompt], cache, images=[images], plan=plan).argmax()),
            lambda token: int(model.decode([token], cache).argmax()),
            steps,
        )
        if not steps:
            return {"ttft_s": ttft}
        return {"ttft_s": ttft, "step_s": median(steps_s)}

    return turn
