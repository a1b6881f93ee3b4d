"""Checkpoints in Meta's layout."""

import json
from pathlib import Path

import torch
from support.tiny import random_weights, tiny_config

from pop.models import build
from pop.models.config import LlamaConfig

# Without a bias, with whole heads in each half, all sizes even: what two tensor-parallel ranks can share.
META = {"vocab_size": 68, "hidden_size": 60, "num_heads": 6, "num_kv_heads": 2, "head_dim": 10}


META_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
# The axes along which ranks share the matrices.
BY_ROWS = ("wq", "wk", "wv", "w1", "w3", "output", "tok_embeddings")
BY_COLUMNS = ("wo", "w2")


def meta_name(name: str) -> str:
    ours = next(ours for ours in META_NAMES if name.endswith(f"{ours}.weight"))
    return name.replace(ours, META_NAMES[ours]).removeprefix("model.")


def meta_weights(config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Random weights under Meta's names."""
    with torch.device("meta"):
        module = build(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    return {meta_name(name): weight for name, weight in random_weights(shapes, seed=0).items()}


def write_meta(folder: Path, weights: dict[str, torch.Tensor], ranks: int = 1) -> None:
    for rank in range(ranks):
        part = {}
        for name, weight in weights.items():
            kind = name.split(".")[-2]
            axis = 0 if kind in BY_ROWS else 1 if kind in BY_COLUMNS else None
            part[name] = weight.clone() if axis is None else weight.chunk(ranks, axis)[rank].clone()
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")


def write_params(folder: Path, config: LlamaConfig) -> None:
    """Write the params.json of a config with META's sizes. Its MLP width is one multiple of `multiple_of`."""
    fields = {
        "dim": config.hidden_size,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": config.intermediate_size,
        "ffn_dim_multiplier": 0.25,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope.base,
    }
    (folder / "params.json").write_text(json.dumps(fields))


def from_meta(folder: Path, ranks: int = 1, **overrides):
    config = tiny_config(**{**META, **overrides})
    weights = meta_weights(config)
    folder.mkdir(exist_ok=True)
    write_meta(folder, weights, ranks)
    write_params(folder, config)
    return config, weights
