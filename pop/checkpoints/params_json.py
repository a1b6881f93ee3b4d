"""From Meta's params.json to a config (pop/models/config.py), with what it leaves open. See pop/checkpoints/config_json.py."""

from dataclasses import replace

import torch

from pop.checkpoints.fields import Fields
from pop.errors import ConfigError
from pop.models.config import LlamaConfig, RopeConfig

# What params.json leaves open, by (dim, n_layers): the factor of the scaled RoPE (8 in Llama 3.1 and 3.3, 32
# in Llama 3.2 1B and 3B), and whether the head is tied to the embedding (in Llama 3.2 1B and 3B it is).
META_SIZES = {(4096, 32): (8.0, False), (8192, 80): (8.0, False), (16384, 126): (8.0, False),
              (2048, 16): (32.0, True), (3072, 28): (32.0, True)}  # fmt: skip
LLAMA3_VOCABULARY = 128_256


def read_meta(fields: Fields) -> LlamaConfig:
    """Llama 3 and later (older files state neither vocab_size nor rope_theta, and are refused for that)."""
    dim, num_layers = fields.integer("dim"), fields.integer("n_layers", most=2**12)
    num_heads, vocab_size = fields.integer("n_heads", most=2**12), fields.integer("vocab_size")
    if dim % num_heads:
        raise ConfigError(f"dim ({dim}) is not a multiple of n_heads ({num_heads})")
    # SwiGLU's three matrices get 2/3 of the width 4 * dim that a plain MLP's two have, times the multiplier.
    multiple = fields.integer("multiple_of", 256)
    width = int(fields.number("ffn_dim_multiplier", 1.0) * int(2 * (4 * dim) / 3))
    rope, max_positions = RopeConfig(fields.number("rope_theta")), 8192
    factor, tied = META_SIZES.get((dim, num_layers), (None, False))
    if fields.boolean("use_scaled_rope"):
        factor = fields.number("rope_scaling_factor", factor)
        if factor is None:
            raise ConfigError(f"use_scaled_rope needs a rope_scaling_factor, as dim {dim} with n_layers "
                              f"{num_layers} is no published size")  # fmt: skip
        rope, max_positions = replace(rope, kind="llama3", factor=factor), 131_072
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=dim,
        intermediate_size=-(-width // multiple) * multiple,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.integer("n_kv_heads", num_heads),
        head_dim=dim // num_heads,
        max_positions=max_positions,
        norm_eps=fields.number("norm_eps", 1e-5),
        rope=rope,
        tie_embeddings=tied,
        dtype=torch.bfloat16,
        bos_id=128_000 if vocab_size == LLAMA3_VOCABULARY else None,
        eos_ids=(128_001, 128_008, 128_009) if vocab_size == LLAMA3_VOCABULARY else (),
    )
    fields.finish()
    return config
