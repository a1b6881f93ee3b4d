"""Meta's layout: params.json, with constants for what it leaves open, and the tensor names in consolidated.NN.pth."""

import re
from dataclasses import replace

import torch

from pop.checkpoints.fields import Fields
from pop.errors import ConfigError
from pop.models.config import LlamaConfig, RopeConfig

# The factor of the scaled RoPE by (dim, n_layers): of Llama-3.1 and 3.3, then of Llama-3.2, which ties its head.
FACTORS = {(4096, 32): 8.0, (8192, 80): 8.0, (16384, 126): 8.0, (2048, 16): 32.0, (3072, 28): 32.0}
NAMES = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
}  # fmt: skip
INTERLEAVED = ("attention.wq.weight", "attention.wk.weight")  # RoPE rotates neighbouring rows of a head


def read_params(fields: Fields) -> LlamaConfig:
    """Read the params.json of Llama 3 or later. Older files lack vocab_size or rope_theta and are refused."""
    dim, layers = fields.integer("dim"), fields.integer("n_layers")
    num_heads, vocab_size = fields.integer("n_heads"), fields.integer("vocab_size")
    if dim % num_heads:
        raise ConfigError(f"dim ({dim}) is not a multiple of n_heads ({num_heads})")
    # A SwiGLU MLP has three matrices. At 2/3 of the width 4 * dim it is as large as a plain MLP with two.
    multiple = fields.integer("multiple_of", 256)
    width = int(fields.number("ffn_dim_multiplier", 1.0) * int(2 * (4 * dim) / 3))
    rope, max_positions = RopeConfig(fields.number("rope_theta")), 8192
    published = FACTORS.get((dim, layers))
    if fields.boolean("use_scaled_rope"):
        factor = fields.number("rope_scaling_factor", published)
        if factor is None:
            raise ConfigError(f"rope_scaling_factor is missing, and dim {dim} with n_layers {layers} is not published")
        rope, max_positions = replace(rope, kind="llama3", factor=factor), 131_072
    bos_id, eos_ids = (128_000, (128_001, 128_008, 128_009)) if vocab_size == 128_256 else (None, ())
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=dim,
        intermediate_size=-(-width // multiple) * multiple,
        num_layers=layers,
        num_heads=num_heads,
        num_kv_heads=fields.integer("n_kv_heads", num_heads),
        head_dim=dim // num_heads,
        max_positions=max_positions,
        norm_eps=fields.number("norm_eps", 1e-5),
        rope=rope,
        tie_embeddings=published == 32.0,
        dtype=torch.bfloat16,
        bos_id=bos_id,
        eos_ids=eos_ids,
    )


def parameter_name(name: str) -> str:
    """Our name of one of Meta's tensors. An unknown name stays as it is, so that it is reported as surplus."""
    match = re.fullmatch(r"(layers\.\d+\.|)(.+)\.weight", name)
    if not match or match[2] not in NAMES:
        return name
    return ("model." if match[1] else "") + match[1] + NAMES[match[2]] + ".weight"
