"""The contract between models and the rest of `pop`: a layer that can be pruned, and a model made of such layers.

    h ──► queries_keys_values ──► attend ──► attention_update ──► h + ... ──► mlp_update ──► h + ...
                  │
                  └── keys_values: all that a pruned layer computes

The reference and the engine call `PrunableLayer` and `PrunableModel`. A model of another code base subclasses them
(tools/examples/nano_gpt.py). `DecoderLayer` and `DecoderModel` are what the families of this folder have in common.
Attribute names are the checkpoint's names. Shape letters: layers.py.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pop.models.config import RopeConfig
from pop.models.images import TEXT, Images
from pop.models.layers import (
    Embedding,
    KeysValues,
    RMSNorm,
    Rope,
    Ropes,
    causal_attention,
    masked_attention,
    rope_frequencies,
    rope_tables,
    rotate,
)

# attend(layer, q [B, T, H, E], k [B, T, K, E], v [B, T, K, E]) -> [B, T, H * E]
Attend = Callable[["PrunableLayer", Tensor, Tensor, Tensor], Tensor]


class PrunableLayer(nn.Module):
    """A decoder layer in parts, so that a caller can stop after the first part, or put a cache between two of them.

    Attributes:
        window: how many tokens a token attends to, itself included. None: itself and all tokens before it.
        scale: multiplies q k^T.
        cache_attention: a backend's attention over a cache. None: the engine's.
        multiply: multiplies by a matrix of a calibrated plan. A backend may replace it.
    """

    window: int | None = None
    scale: float
    cache_attention: Callable[..., Tensor] | None = None
    multiply: Callable[..., Tensor] = staticmethod(F.linear)

    def queries_keys_values(self, h: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """h [B, T, D] -> q [B, T, H, E], k and v [B, T, K, E], with rotary positions applied."""
        raise NotImplementedError

    def keys_values(self, h: Tensor, rope: Rope) -> KeysValues:
        """h [B, T, D] -> k and v [B, T, K, E]: all that a pruned layer computes."""
        return self.queries_keys_values(h, rope)[1:]

    def attention_update(self, attended: Tensor) -> Tensor:
        """The output of attention [B, T, H * E] -> what it adds to h [B, T, D]."""
        raise NotImplementedError

    def mlp_update(self, h: Tensor) -> Tensor:
        """h [B, T, D], attention's update included -> what the MLP adds to it [B, T, D]."""
        raise NotImplementedError

    def forward(self, h: Tensor, rope: Rope, attend: Attend) -> Tensor:
        """The whole layer: h [B, T, D] -> h [B, T, D]. `attend` attends to the prompt itself, or a cache."""
        q, k, v = self.queries_keys_values(h, rope)
        h = h + self.attention_update(attend(self, q, k, v))
        return h + self.mlp_update(h)


class PrunableModel(nn.Module):
    """A decoder that prefill can prune.

    Attributes:
        config: has the sizes that a KV cache reads: num_layers, windows, hidden_size, num_kv_heads and head_dim.
        layers: L of them.
        deepstack_layers: how many layers, from the first one, are followed by an addition of image features to h.
        vision_blocks: the name of the submodule that lists the vision tower's layers. None: there is no tower. With a
            tower, `vision_block_inputs(N, P)` returns zeros in the shapes that such a layer takes for N images of P
            patches.
        causal_attention: the attention of the plain pass. A backend may replace it.
        masked_attention: that of full-depth tokens in calibration. A backend may replace it.
        largest_of_processes: if several processes share the model's heads, this gives the maxima of tensors that each
            process has computed from its own heads.
    """

    config: object
    layers: Sequence[PrunableLayer]
    deepstack_layers: int = 0
    vision_blocks: str | None = None
    causal_attention = staticmethod(causal_attention)
    masked_attention = staticmethod(masked_attention)
    largest_of_processes = staticmethod(lambda x: x)

    @property
    def tower(self) -> Sequence[nn.Module]:
        """The layers of the vision tower. Empty without a tower."""
        if self.vision_blocks is None:
            return ()
        return self.get_submodule(self.vision_blocks)

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] int -> h [B, T, D]."""
        raise NotImplementedError

    def rope(self, positions: Tensor) -> Ropes:
        """positions [B, T] int, or [3, B, T] by axis -> for each window of the layers, their `rope` argument."""
        return {layer.window: () for layer in self.layers}

    def head(self, h: Tensor) -> Tensor:
        """h [..., D] after the last layer -> logits [..., V] float32."""
        raise NotImplementedError

    def forward(self, tokens: Tensor, images: Images = TEXT) -> Tensor:
        """The plain, unpruned pass, without a cache: logits [B, T, V] float32 at every position.

        Args:
            tokens: prompts of one length, [B, T] int.
            images: the images of the prompts.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)  # [B, T]
        last_attended = images.last_attended(positions)
        ropes = self.rope(images.rotary(positions))

        def attend(layer, q, k, v):
            return self.causal_attention(q, k, v, layer.scale, layer.window, last_attended)

        h = images.place(self.embed(tokens))
        for index, layer in enumerate(self.layers):
            h = layer(h, ropes[layer.window], attend)
            h = images.add_deepstack(h, index)
        return self.head(h)


class DecoderLayer(PrunableLayer):
    """A layer with norms, attention and an MLP. Families that normalise at other places override methods.

    Subclasses make its parts: input_layernorm, self_attn, post_attention_layernorm and mlp. Calibrated plans
    (pop/calibration) need the methods from `normalised` on.
    """

    def queries_keys_values(self, h, rope):
        attention = self.self_attn
        x = self.input_layernorm(h)
        q = attention.q_norm(attention.heads(attention.q_proj(x)))  # [B, T, H, E]
        k, v = self.finished_keys_values(attention.k_proj(x), attention.v_proj(x), rope)
        return rotate(q, rope), k, v

    def keys_values(self, h, rope):
        return self.finished_keys_values(*self.projected(h), rope)

    def attention_update(self, attended):
        return self.self_attn.o_proj(attended)

    def mlp_update(self, h):
        return self.mlp(self.post_attention_layernorm(h))

    def normalised(self, h: Tensor) -> Tensor:
        """h [..., D] / rms(h), without a weight: the state that a calibrated plan reads."""
        return self.input_layernorm.normalise(h)

    def projected(self, h: Tensor) -> KeysValues:
        """h [B, T, D], not normalised -> k and v [B, T, K * E] before k's norm and rotation. Plans correct these."""
        x = self.input_layernorm(h)
        return self.self_attn.k_proj(x), self.self_attn.v_proj(x)

    def finished_keys_values(self, k: Tensor, v: Tensor, rope: Rope) -> KeysValues:
        """Projected k and v [B, T, K * E] -> k and v [B, T, K, E], as the cache holds them."""
        attention = self.self_attn
        k = attention.k_norm(attention.heads(k))
        return rotate(k, rope), attention.heads(v)


class Decoder(nn.Module):
    """The embedding, the layers and the last norm. `layer` and `norm` are the family's classes."""

    def __init__(self, config, layer: type[DecoderLayer], norm: type[RMSNorm]):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layer(config, index) for index in range(config.num_layers))
        self.norm = norm(config.hidden_size, config.norm_eps)


class DecoderModel(PrunableModel):
    """A language model with rotary positions, and a head that may be tied to the embedding.

    Layers without a window rotate by the config's `rope`, and others by its `local_rope`. The Decoder is `model`. A
    family whose checkpoints have it elsewhere moves it there, and overrides `decoder`.

    Attributes:
        layer_class: of the decoder's layers.
        norm_class: of the norm after them.
    """

    layer_class: type[DecoderLayer]
    norm_class: type[RMSNorm] = RMSNorm

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config, self.layer_class, self.norm_class)
        self._frequencies: dict[tuple, Tensor] = {}
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def decoder(self) -> Decoder:
        return self.model

    @property
    def layers(self) -> nn.ModuleList:
        return self.decoder.layers

    def embed(self, tokens):
        return self.decoder.embed_tokens(tokens)

    def frequencies(self, rope: RopeConfig, device: torch.device) -> Tensor:
        """`rope_frequencies` [E/2], computed once for each device: a captured CUDA graph keeps their address."""
        key = (rope, device)
        if key not in self._frequencies:
            # With setdefault, two threads end up with the same tensor.
            self._frequencies.setdefault(key, rope_frequencies(rope, self.config.head_dim, device))
        return self._frequencies[key]

    def rope(self, positions):
        ropes = {}
        for window in set(self.config.windows):
            rope_config = self.config.rope if window is None else self.config.local_rope
            frequencies = self.frequencies(rope_config, positions.device)
            ropes[window] = rope_tables(positions[..., None], frequencies)
        return ropes

    def head(self, h):
        h = self.decoder.norm(h)
        if self.config.tie_embeddings:
            return self.decoder.embed_tokens.unembed(h).float()
        return self.lm_head(h).float()
