"""The Gemma-3 family, from 270M to 27B: the language model, and with it, from 4B on, a vision tower (siglip.py).

What differs from Llama (pop/models/llama.py, whose three moves of a layer are the same here):

- five layers of six are *local*: a token attends itself and the window - 1 tokens before it. The *global* ones attend
  everything. Each kind has rotary frequencies of its own.
- a branch's output is normalised, too, before it is added: a layer has four norms. Norms multiply by 1 + weight.
- queries and keys are normalised, head by head, before they are rotated.
- embeddings are multiplied by sqrt(D), and serve as the output head as well.
- an image is M tokens, whose embeddings are the vision tower's. They attend each other in both directions.

Attribute names are the checkpoint's names. Shape letters: see layers.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from pop.models import layers
from pop.models.config import Gemma3Config
from pop.models.layers import (
    Embedding,
    Images,
    Linear,
    Rope,
    Ropes,
    causal_attention,
    rope_frequencies,
    rope_tables,
    rotate,
)
from pop.models.vision.siglip import EncoderLayer, Projector, VisionTower


class RMSNorm(layers.RMSNorm):
    """x / rms(x) * (1 + weight), all in float32; Llama's casts before it multiplies."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., dim] -> the same shape and dtype."""
        return (self.normalise(x.float()) * (1 + self.weight.float())).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: Gemma3Config):
        super().__init__()
        self.head_dim = config.head_dim
        D, E = config.hidden_size, config.head_dim
        self.q_proj = Linear(D, config.num_heads * E, bias=False)
        self.k_proj = Linear(D, config.num_kv_heads * E, bias=False)
        self.v_proj = Linear(D, config.num_kv_heads * E, bias=False)
        self.o_proj = Linear(config.num_heads * E, D, bias=False)
        self.q_norm = RMSNorm(E, config.norm_eps)
        self.k_norm = RMSNorm(E, config.norm_eps)

    def queries(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # [B, T, H, E]
        return rotate(self.q_norm(q), rope)

    def keys_values(self, x: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        return self.place(self.k_proj(x), self.v_proj(x), rope)

    def place(self, k: torch.Tensor, v: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        k = k.unflatten(-1, (-1, self.head_dim))  # [B, T, K, E]
        v = v.unflatten(-1, (-1, self.head_dim))  # [B, T, K, E]
        return rotate(self.k_norm(k), rope), v


class MLP(nn.Module):
    """GeGLU (Shazeer 2020): down(gelu(gate(x)) * up(x)), with the tanh approximation of GELU."""

    def __init__(self, config: Gemma3Config):
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(D, inner, bias=False)
        self.up_proj = Linear(D, inner, bias=False)
        self.down_proj = Linear(inner, D, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: Gemma3Config, window: int | None):
        super().__init__()
        self.window = window  # of a local layer; None: the layer is global
        self.scale = config.query_pre_attn_scalar**-0.5
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def keys_values(self, h: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        """h [B, T, D] -> k, v [B, T, K, E]: all that a pruned layer computes."""
        return self.self_attn.keys_values(self.input_layernorm(h), rope)

    def projected(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """h [B, T, D] -> k, v [B, T, K * E] as projected: no heads, no norm, no positions yet."""
        x = self.input_layernorm(h)
        return self.self_attn.k_proj(x), self.self_attn.v_proj(x)

    def placed(self, k: torch.Tensor, v: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        """Projected k, v [B, T, K * E] -> k, v [B, T, K, E] as the cache holds them, keys normalised and rotated."""
        return self.self_attn.place(k, v, rope)

    def folded_projections(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K's and V's projection with the norm's 1 + weight folded in: weight [2, K * E, D], bias [2, K * E] of zeros,
        in float64.

        projected(h) is then normalise(h) times the weight, for a norm without one: input_layernorm.normalise.
        """
        projections = (self.self_attn.k_proj, self.self_attn.v_proj)
        weight = torch.stack([projection.weight.double() for projection in projections])
        return weight * (1 + self.input_layernorm.weight.double()), weight.new_zeros(weight.shape[:2])

    def queries_keys_values(self, h: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """h [B, T, D] -> q [B, T, H, E], k and v [B, T, K, E]."""
        x = self.input_layernorm(h)
        return self.self_attn.queries(x, rope), *self.self_attn.keys_values(x, rope)

    def attention_update(self, attended: torch.Tensor) -> torch.Tensor:
        """What the tokens attended [B, T, H * E] -> what it adds to h [B, T, D]."""
        return self.post_attention_layernorm(self.self_attn.o_proj(attended))

    def mlp_update(self, h: torch.Tensor) -> torch.Tensor:
        """h [B, T, D], attention's update included -> what the MLP adds to it [B, T, D]."""
        return self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(h)))

    def update(self, h: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """h [B, T, D] and what its tokens attended [B, T, H * E] -> the next h [B, T, D]."""
        h = h + self.attention_update(attended)
        return h + self.mlp_update(h)


class Decoder(nn.Module):
    def __init__(self, config: Gemma3Config):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, window) for window in config.windows)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class Gemma3(nn.Module):
    """The whole language model. `forward` is the plain, unpruned pass; prefill and decode are in pop/engine/forward.py."""

    deepstack_layers = 0  # see Qwen3VL

    def __init__(self, config: Gemma3Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.layers

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [B, T] int -> h [B, T, D]."""
        h = self.model.embed_tokens(tokens)
        return h * h.new_full((), self.config.hidden_size**0.5)  # the factor is rounded to the weights' dtype

    def rope(self, positions: torch.Tensor) -> Ropes:
        """positions [B, T] int -> the cos and sin tables of its tokens, for each kind of layer."""
        config = self.config

        def tables(rope):
            return rope_tables(positions, rope_frequencies(rope, config.head_dim, positions.device))

        return {window: tables(config.rope if window is None else config.local_rope) for window in set(config.windows)}

    def head(self, h: torch.Tensor) -> torch.Tensor:
        """h [..., D] -> logits [..., V] float32."""
        return self.model.embed_tokens.unembed(self.model.norm(h)).float()

    def forward(self, tokens: torch.Tensor, images: Images | None = None) -> torch.Tensor:
        """tokens [B, T] int -> logits [B, T, V] float32 at every position."""
        h, positions, reach = self.embed(tokens), torch.arange(tokens.shape[1], device=tokens.device)[None], None
        if images is not None:
            h, reach = images.place(h), images.reach(positions)  # [B, T, D] and [B, T]
        ropes = self.rope(positions)
        for layer in self.layers:
            q, k, v = layer.queries_keys_values(h, ropes[layer.window])
            h = layer.update(h, causal_attention(q, k, v, layer.scale, layer.window, reach))
        return self.head(h)


class Gemma3WithImages(nn.Module):
    """The language model, the vision tower, and what brings them together."""

    deepstack_layers = 0

    def __init__(self, config: Gemma3Config):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config.vision)
        self.multi_modal_projector = Projector(config.vision, config.hidden_size)
        self.language_model = Gemma3(config)

    @property
    def layers(self) -> nn.ModuleList:
        return self.language_model.layers

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.language_model.embed(tokens)

    def rope(self, positions: torch.Tensor) -> Ropes:
        return self.language_model.rope(positions)

    def head(self, h: torch.Tensor) -> torch.Tensor:
        return self.language_model.head(h)

    def image_features(self, pixels: torch.Tensor, run: Callable = EncoderLayer.__call__) -> torch.Tensor:
        """pixels [N, 3, S, S] from -1 to 1, in the weights' dtype -> what the language model reads, [N, M, D].

        run: how a layer of the tower is called.
        """
        return self.multi_modal_projector(self.vision_tower(pixels, run))

    def forward(self, tokens: torch.Tensor, images: Images | None = None) -> torch.Tensor:
        """tokens [B, T] int -> logits [B, T, V] float32 at every position."""
        return self.language_model(tokens, images)


def build(config: Gemma3Config) -> nn.Module:
    return Gemma3(config) if config.vision is None else Gemma3WithImages(config)
