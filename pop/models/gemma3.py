"""The Gemma-3 family, from 270M to 27B. From 4B on it also reads images (vision/siglip.py).

It differs from Llama (llama.py) in these points:

- Five of six layers are *local*: a token attends only to a sliding window. In the other, *global* layers it attends to
  all tokens before it. Each kind has its own rotary frequencies.
- A layer has four norms, because the outputs of attention and of the MLP are also normalised before they are added.
  Norms multiply by 1 + weight.
- Queries and keys are normalised head by head before they are rotated.
- Embeddings are multiplied by sqrt(D). They also serve as the output head.
- The tokens of an image attend to each other in both directions.

Attribute names are the checkpoint's names. Shape letters: layers.py.
"""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from pop.models import base, layers
from pop.models.config import Gemma3Config
from pop.models.layers import Attention, GemmaRMSNorm
from pop.models.vision.siglip import Projector, VisionModel


class MLP(layers.MLP):
    """GeGLU (Shazeer 2020), with the tanh approximation of GELU."""

    def activation(self, x):
        return F.gelu(x, approximate="tanh")


class DecoderLayer(base.DecoderLayer):
    def __init__(self, config: Gemma3Config, index: int):
        super().__init__()
        self.window = config.windows[index]
        self.scale = config.query_pre_attn_scalar**-0.5
        self.input_layernorm = GemmaRMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, norm=GemmaRMSNorm)
        self.post_attention_layernorm = GemmaRMSNorm(config.hidden_size, config.norm_eps)
        self.pre_feedforward_layernorm = GemmaRMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)
        self.post_feedforward_layernorm = GemmaRMSNorm(config.hidden_size, config.norm_eps)

    def attention_update(self, attended):
        return self.post_attention_layernorm(self.self_attn.o_proj(attended))

    def mlp_update(self, h):
        return self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(h)))


class Gemma3(base.DecoderModel):
    """The language model. If the config has a vision tower, also the tower and the projector after it."""

    layer_class = DecoderLayer
    norm_class = GemmaRMSNorm

    def __init__(self, config: Gemma3Config):
        super().__init__(config)
        if config.vision is None:
            return
        self.vision_blocks = "vision_tower.vision_model.encoder.layers"
        self.vision_tower = nn.Sequential(OrderedDict(vision_model=VisionModel(config.vision)))
        self.multi_modal_projector = Projector(config.vision, config.hidden_size)
        self.language_model = nn.Module()  # checkpoints with a tower name the decoder language_model.model
        self.language_model.model = self.model
        del self.model

    @property
    def decoder(self) -> base.Decoder:
        if self.config.vision is None:
            return self.model
        return self.language_model.model

    def embed(self, tokens):
        h = super().embed(tokens)
        return h * h.new_full((), self.config.hidden_size**0.5)  # the factor is rounded to the weights' dtype

    def image_features(self, pixels: Tensor) -> Tensor:
        """pixels [N, 3, size, size] from -1 to 1, in the weights' dtype -> embeddings of image tokens [N, M, D]."""
        return self.multi_modal_projector(self.vision_tower(pixels))

    def vision_block_inputs(self, N, P):
        weight = self.multi_modal_projector.mm_input_projection_weight
        return (weight.new_zeros(N, P, self.config.vision.hidden_size),)
