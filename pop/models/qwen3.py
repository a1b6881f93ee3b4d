"""The Qwen3 family of language models, from 0.6B to 235B.

It differs from Llama (llama.py) in two points. Queries and keys are normalised head by head before they are rotated.
In the sizes 30B-A3B and 235B-A22B, all layers have a mixture of experts (experts.py) in place of the MLP.

Attribute names are the checkpoint's names. Shape letters: layers.py.
"""

from pop.models import base
from pop.models.config import Qwen3Config
from pop.models.experts import MixtureOfExperts
from pop.models.layers import MLP, Attention, RMSNorm


class DecoderLayer(base.DecoderLayer):
    def __init__(self, config: Qwen3Config, index: int):
        super().__init__()
        self.scale = config.head_dim**-0.5
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, norm=RMSNorm)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config) if config.experts is None else MixtureOfExperts(config)


class Qwen3(base.DecoderModel):
    layer_class = DecoderLayer
