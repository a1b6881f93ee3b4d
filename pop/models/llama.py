"""The Llama family: Llama-3.1, Llama-3.2 and models of the same architecture, such as SmolLM2.

Each layer updates the residual stream h in two steps:

    h = h + o_proj(attention(q, k, v))      # q, k, v: projections of norm(h), q and k rotated by their positions
    h = h + down(silu(gate(x)) * up(x))     # x: norm(h), by post_attention_layernorm

The base classes (base.py) run these steps. They also split them, so that a pruned layer computes only k and v. A family
file says which parts make up a layer. Attribute names are the checkpoint's names. Shape letters: layers.py.
"""

from pop.models import base
from pop.models.config import LlamaConfig
from pop.models.layers import MLP, Attention, RMSNorm


class DecoderLayer(base.DecoderLayer):
    def __init__(self, config: LlamaConfig, index: int):
        super().__init__()
        self.scale = config.head_dim**-0.5
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)


class Llama(base.DecoderModel):
    layer_class = DecoderLayer
