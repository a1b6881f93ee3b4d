"""The Llama family: Llama-3.1, Llama-3.2 and what shares their architecture, such as SmolLM2.

A decoder layer is written in three moves, so that whoever drives the model can stop after the first or put a
cache between them:

    q, k, v = layer.queries_keys_values(h, rope)     # norm, projections, rotary positions
    attended = attention(q, k, v)                    # over the prompt itself, or over a cache
    h = layer.update(h, attended)                    # the residual updates: attention's output, then the MLP

A *pruned* layer does a part of the first move and nothing else: `layer.keys_values(h, rope)`.

Attribute names are the checkpoint's names. Shape letters: see layers.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pop.models.config import LlamaConfig
from pop.models.layers import (
    Embedding,
    Linear,
    RMSNorm,
    Rope,
    Ropes,
    causal_attention,
    rope_frequencies,
    rope_tables,
    rotate,
)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        D, bias = config.hidden_size, config.attention_bias
        self.q_proj = Linear(D, config.num_heads * config.head_dim, bias=bias)
        self.k_proj = Linear(D, config.num_kv_heads * config.head_dim, bias=bias)
        self.v_proj = Linear(D, config.num_kv_heads * config.head_dim, bias=bias)
        self.o_proj = Linear(config.num_heads * config.head_dim, D, bias=bias)

    def queries(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # [B, T, H, E]
        return rotate(q, rope)

    def keys_values(self, x: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        return self.place(self.k_proj(x), self.v_proj(x), rope)

    def place(self, k: torch.Tensor, v: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        k = k.unflatten(-1, (-1, self.head_dim))  # [B, T, K, E]
        v = v.unflatten(-1, (-1, self.head_dim))  # [B, T, K, E]
        return rotate(k, rope), v


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(D, inner, bias=bias)
        self.up_proj = Linear(D, inner, bias=bias)
        self.down_proj = Linear(inner, D, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    window = None  # a token attends all that is before it

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.scale = config.head_dim**-0.5
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def keys_values(self, h: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        """h [B, T, D] -> k, v [B, T, K, E]: all that a pruned layer computes."""
        return self.self_attn.keys_values(self.input_layernorm(h), rope)

    def projected(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """h [B, T, D] -> k, v [B, T, K * E] as projected: no heads, no positions yet."""
        x = self.input_layernorm(h)
        return self.self_attn.k_proj(x), self.self_attn.v_proj(x)

    def placed(self, k: torch.Tensor, v: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        """Projected k, v [B, T, K * E] -> k, v [B, T, K, E] as the cache holds them, keys rotated."""
        return self.self_attn.place(k, v, rope)

    def folded_projections(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K's and V's projection with the norm's weight folded in: weight [2, K * E, D], bias [2, K * E], in float64.

        projected(h) is then normalise(h) times these, for a norm without a weight: input_layernorm.normalise.
        """
        projections = (self.self_attn.k_proj, self.self_attn.v_proj)
        weight = torch.stack([projection.weight.double() for projection in projections])
        zero = weight.new_zeros(weight.shape[1])
        biases = [zero if projection.bias is None else projection.bias.double() for projection in projections]
        return weight * self.input_layernorm.weight.double(), torch.stack(biases)

    def queries_keys_values(self, h: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """h [B, T, D] -> q [B, T, H, E], k and v [B, T, K, E]."""
        x = self.input_layernorm(h)
        return self.self_attn.queries(x, rope), *self.self_attn.keys_values(x, rope)

    def attention_update(self, attended: torch.Tensor) -> torch.Tensor:
        """What the tokens attended [B, T, H * E] -> what it adds to h [B, T, D]."""
        return self.self_attn.o_proj(attended)

    def mlp_update(self, h: torch.Tensor) -> torch.Tensor:
        """h [B, T, D], attention's update included -> what the MLP adds to it [B, T, D]."""
        return self.mlp(self.post_attention_layernorm(h))

    def update(self, h: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """h [B, T, D] and what its tokens attended [B, T, H * E] -> the next h [B, T, D]."""
        h = h + self.attention_update(attended)
        return h + self.mlp_update(h)


class Decoder(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class Llama(nn.Module):
    """The whole language model. `forward` is the plain, unpruned pass; prefill and decode are in pop/engine/forward.py."""

    deepstack_layers = 0  # see Qwen3VL

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.layers

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [B, T] int -> h [B, T, D]."""
        return self.model.embed_tokens(tokens)

    def rope(self, positions: torch.Tensor) -> Ropes:
        """positions [B, T] int -> the cos and sin tables of its tokens, for the one kind of layer that there is."""
        frequencies = rope_frequencies(self.config.rope, self.config.head_dim, positions.device)
        return {None: rope_tables(positions, frequencies)}

    def head(self, h: torch.Tensor) -> torch.Tensor:
        """h [..., D] -> logits [..., V] float32."""
        head = self.model.embed_tokens.unembed if self.config.tie_embeddings else self.lm_head
        return head(self.model.norm(h)).float()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [B, T] int -> logits [B, T, V] float32 at every position."""
        h = self.embed(tokens)
        ropes = self.rope(torch.arange(tokens.shape[1], device=tokens.device)[None])
        for layer in self.layers:
            q, k, v = layer.queries_keys_values(h, ropes[layer.window])
            h = layer.update(h, causal_attention(q, k, v, layer.scale, layer.window))
        return self.head(h)
