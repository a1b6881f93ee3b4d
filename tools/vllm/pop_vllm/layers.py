"""What parts of vLLM's layers compute. Llama, Qwen3 and Gemma3 name their parts alike.

Shape letters: pop/models/layers.py; N is the number of tokens.
"""

import torch.nn.functional as F
from torch import Tensor


def normalised(h: Tensor, layer) -> Tensor:
    """h [N, D] / rms(h), without the weight of the layer's first norm."""
    return F.rms_norm(h.float(), h.shape[-1:], eps=layer.input_layernorm.variance_epsilon).to(h.dtype)


def by_head(x: Tensor, attention, norm: str = "") -> Tensor:
    """x [N, heads * E] -> [N, heads, E], normalised if the family has a norm of that name."""
    x = x.unflatten(-1, (-1, attention.head_dim))  # [N, heads, E]
    return getattr(attention, norm)(x.contiguous()) if hasattr(attention, norm) else x


def cached(attention, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Projected k and v [N, K * E] as the cache holds them, [N, K, E] each."""
    k = by_head(k, attention, "k_norm").flatten(-2)
    k, _ = attention.rotary_emb(positions, k.contiguous(), None)
    return by_head(k, attention), by_head(v, attention)


def queries_keys(layer, h: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """q [N, H, E] and k [N, K, E] of h [N, D], rotated."""
    attention = layer.self_attn
    projected, _ = attention.qkv_proj(layer.input_layernorm(h))
    q, k, _ = projected.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
    q = by_head(q, attention, "q_norm").flatten(-2)
    k = by_head(k, attention, "k_norm").flatten(-2)
    q, k = attention.rotary_emb(positions, q.contiguous(), k.contiguous())
    return by_head(q, attention), by_head(k, attention)
