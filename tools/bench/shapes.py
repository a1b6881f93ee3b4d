"""Known shapes, and the bytes that a model of a given shape reads and holds.

Shape letters are those of pop/models/layers.py; I is the width inside the MLP.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right

import torch

from pop import models
from pop.engine.attention import QUERY_BLOCK
from pop.engine.cache import CHUNK_SIZE, KVCache
from pop.errors import InputError
from pop.system.memory import free_bytes

# Bytes of the matrix that measures the bandwidth: far more than a CPU's cache holds, and 1 ms of a GPU's reads.
BIG = 2**28
BIG_ON_GPU = 2**32

# The config.json of each known shape, as in the Hugging Face layout: --shape NAME needs no file.
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHAPES = {
    "llama3.1-8b": {
        "model_type": "llama", "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131_072, "rope_theta": 500_000.0, "tie_word_embeddings": False,
        "rope_scaling": {**_LLAMA3, "original_max_position_embeddings": 8192}, "dtype": "bfloat16",
    },
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192, "rope_theta": 100_000.0, "tie_word_embeddings": True, "dtype": "bfloat16",
    },
    "qwen3-vl-8b": {
        "model_type": "qwen3_vl", "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen3_vl_text", "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 12_288,
            "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "rms_norm_eps": 1e-6, "max_position_embeddings": 262_144, "rope_theta": 5_000_000.0, "dtype": "bfloat16",
            "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
        },
        "vision_config": {
            "model_type": "qwen3_vl", "hidden_size": 1152, "intermediate_size": 4304, "depth": 27, "num_heads": 16,
            "out_hidden_size": 4096, "num_position_embeddings": 2304, "patch_size": 16,
            "deepstack_visual_indexes": [8, 16, 24],
        },
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 40_960, "rope_theta": 1_000_000.0,
        "tie_word_embeddings": False, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "dtype": "bfloat16",
    },
    "gemma3-12b": {
        "model_type": "gemma3_text", "vocab_size": 262_208, "hidden_size": 3840, "intermediate_size": 15_360,
        "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "max_position_embeddings": 131_072,
        "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0, "sliding_window": 1024,
        "sliding_window_pattern": 6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "dtype": "bfloat16",
    },
}  # fmt: skip


# ---- Bytes, counted from shapes ----


def weight_bytes(config, dtype: torch.dtype) -> int:
    """Bytes of all weights."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in models.build(config).parameters()) * dtype.itemsize


def decode_bytes(config, filled: int, dtype: torch.dtype) -> int:
    """Bytes that one decode step of one row must read when `filled` slots of the cache are filled."""
    slots = sum(min(filled, window or filled) for window in config.windows)
    total = weight_bytes(config, dtype) + slots * 2 * config.num_kv_heads * config.head_dim * dtype.itemsize
    if not config.tie_embeddings:
        total -= (config.vocab_size - 1) * config.hidden_size * dtype.itemsize  # it reads one row of the embedding
    return total


def prefill_memory(config, num_tokens: int, dtype: torch.dtype, widened: bool = False) -> int:
    """Bytes at the peak of a full prefill of one prompt into a cache of its size: weights, cache and activations.

    The activations are those of a chunk of C tokens in one layer:

        everywhere      h before and after attention's update, the normalised h, q, and the attended values
        in the MLP      gate, up and their product
        in attention    k, v, the keys and values of a window in order, and the mask of one block of queries, in bytes
                        and in the model's dtype. A mask is needed if the chunk is not the first or exceeds a window.

    The larger of the last two counts, because they do not exist at the same time.

    Args:
        config: the model's config.
        num_tokens: the length of the prompt.
        dtype: the dtype of weights, cache and activations.
        widened: whether products run in float32. Then the largest product also has its weights, its input and its
            output in float32.
    """
    D = config.hidden_size
    inner = config.intermediate_size
    H = config.num_heads
    K = config.num_kv_heads
    E = config.head_dim
    C = min(num_tokens, CHUNK_SIZE)
    size = dtype.itemsize

    everywhere = C * (3 * D + 2 * H * E) * size
    mlp = C * 3 * inner * size
    if widened:
        mlp += 4 * (D * inner + C * (D + inner))

    has_later_chunks = num_tokens > C
    in_order = 0  # keys of a window, of a later chunk
    masked = 0  # keys of a block of queries, in a chunk that needs a mask
    for window in set(config.windows):
        keys = min(num_tokens, (window or num_tokens) - 1 + C)  # that a chunk may attend to
        if has_later_chunks and window:
            in_order = max(in_order, keys)
        if has_later_chunks or (window and window < C):
            masked = max(masked, keys)
    attention = (C + in_order) * 2 * K * E * size + min(C, QUERY_BLOCK) * masked * (1 + size)

    cache = KVCache.size_in_bytes(config, 1, num_tokens, dtype)
    return weight_bytes(config, dtype) + cache + everywhere + max(mlp, attention)


def bandwidth_bytes(device: torch.device) -> int:
    """Bytes of the matrix that measures the bandwidth. If a GPU lacks memory, the matrix is smaller."""
    if device.type != "cuda":
        return BIG
    half = free_bytes(device) // 2
    return max(BIG, min(BIG_ON_GPU, 2 ** (half.bit_length() - 1)))


def fitting_layers(config, num_tokens: int, dtype: torch.dtype, free: int) -> int:
    """The largest number of layers, at most all, that fits into nine tenths of `free` bytes.

    This counts weights, cache, activations, the corrections of a calibrated plan, and the matrix that measures the
    bandwidth. Raises InputError if not even one layer fits.
    """

    def needed(layers: int) -> int:
        shorter = shortened(config, layers)
        D = config.hidden_size
        rank = D // 2
        corrections = layers * 2 * config.num_kv_heads * config.head_dim * rank + 2 * D * rank
        return prefill_memory(shorter, num_tokens, dtype, True) + corrections * dtype.itemsize + BIG

    fitting = bisect_right(range(1, config.num_layers + 1), 0.9 * free, key=needed)
    if not fitting:
        raise InputError(
            f"one layer of the shape needs {needed(1):,} bytes, but {free:,} are free; take a smaller --shape"
        )
    return fitting


def shortened(config, layers: int):
    """The config with the first `layers` layers only."""
    changed = {"windows": config.windows[:layers]} if any(config.windows) else {"num_layers": layers}
    return dataclasses.replace(config, **changed)
