"""The OLMo-2 family, from 1B to 32B (OLMo team 2024).

It differs from Llama (llama.py) in where it normalises. Attention and the MLP read h itself, and their outputs are
normalised before they are added:

    h = h + norm(o_proj(attention(q, k, v)))     # q, k, v: projections of h
    h = h + norm(down(silu(gate(h)) * up(h)))

Queries and keys are normalised before they are rotated, each over all heads together.

Attribute names are the checkpoint's names. Shape letters: layers.py.
"""

from torch import nn

from pop.models import base, layers
from pop.models.config import Olmo2Config
from pop.models.layers import MLP, Attention


class RMSNorm(layers.RMSNorm):
    """x / rms(x) * weight, all in float32."""

    def forward(self, x):
        return (self.weight.float() * self.normalise(x.float())).to(x.dtype)


class HeadsNorm(RMSNorm):
    """RMSNorm over all heads of a token: x [B, T, heads, E] -> the same shape. `dim` is heads * E."""

    def forward(self, x):
        return super().forward(x.flatten(2)).view_as(x)


class DecoderLayer(base.DecoderLayer):
    def __init__(self, config: Olmo2Config, index: int):
        super().__init__()
        self.scale = config.head_dim**-0.5
        self.input_layernorm = nn.Identity()  # attention reads h itself
        self.self_attn = Attention(config)
        self.self_attn.q_norm = HeadsNorm(config.num_heads * config.head_dim, config.norm_eps)
        self.self_attn.k_norm = HeadsNorm(config.num_kv_heads * config.head_dim, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def attention_update(self, attended):
        return self.post_attention_layernorm(self.self_attn.o_proj(attended))

    def mlp_update(self, h):
        return self.post_feedforward_layernorm(self.mlp(h))

    def normalised(self, h):
        return self.post_attention_layernorm.normalise(h)  # without its weight: any norm of this width would do


class Olmo2(base.DecoderModel):
    layer_class = DecoderLayer
    norm_class = RMSNorm
