"""The Qwen3 family: the language models, from 0.6B to 235B, and Qwen3-VL, which sees, from 2B to 235B.

What differs from Llama (pop/models/llama.py, whose three moves of a layer are the same here): queries and keys are
normalised, head by head, before they are rotated. Projections have no biases. The largest sizes of both, 30B-A3B and
235B-A22B, have mixtures of experts for MLPs (pop/models/experts.py).

Qwen3-VL is the same language model with eyes (pop/models/vision/qwen3_vl.py), and differs in two things:

- positions have three axes: time, row and column (M-RoPE). Each rotated pair turns by one of them. On text they are
  equal, which is plain RoPE; `image_positions` says what they are on images and videos.
- DeepStack (Meng et al. 2024): behind each of its first layers, features of a layer of the vision tower are added at
  the tokens that stand for images.

Attribute names are the checkpoint's names. Shape letters: see layers.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import nn

from pop.errors import InputError
from pop.models.config import Qwen3Config, Qwen3VLConfig
from pop.models.experts import MixtureOfExperts
from pop.models.layers import (
    Embedding,
    Images,
    Linear,
    RMSNorm,
    Rope,
    Ropes,
    causal_attention,
    rope_frequencies,
    rope_tables,
    rotate,
)
from pop.models.vision.qwen3_vl import Grid, VisionTower


class Attention(nn.Module):
    def __init__(self, config: Qwen3Config):
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
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(D, inner, bias=False)
        self.up_proj = Linear(D, inner, bias=False)
        self.down_proj = Linear(inner, D, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    window = None  # a token attends all that is before it

    def __init__(self, config: Qwen3Config, index: int):
        super().__init__()
        is_sparse = config.experts is not None and index in config.experts.layers
        self.scale = config.head_dim**-0.5
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = (MixtureOfExperts if is_sparse else MLP)(config)

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
        """K's and V's projection with the norm's weight folded in: weight [2, K * E, D], bias [2, K * E] of zeros, in
        float64.

        projected(h) is then normalise(h) times the weight, for a norm without one: input_layernorm.normalise.
        """
        projections = (self.self_attn.k_proj, self.self_attn.v_proj)
        weight = torch.stack([projection.weight.double() for projection in projections])
        return weight * self.input_layernorm.weight.double(), weight.new_zeros(weight.shape[:2])

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
    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class Qwen3(nn.Module):
    """The whole language model. `forward` is the plain, unpruned pass; prefill and decode are in pop/engine/forward.py."""

    body = Decoder
    deepstack_layers = 0

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.config = config
        self.model = self.body(config)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def decoder(self) -> Decoder:
        return self.model

    @property
    def layers(self) -> nn.ModuleList:
        return self.decoder.layers

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [B, T] int -> h [B, T, D]."""
        return self.decoder.embed_tokens(tokens)

    def rope(self, positions: torch.Tensor) -> Ropes:
        """positions [B, T] int -> the cos and sin tables of its tokens, for the one kind of layer that there is."""
        frequencies = rope_frequencies(self.config.rope, self.config.head_dim, positions.device)
        return {None: rope_tables(positions, frequencies)}

    def head(self, h: torch.Tensor) -> torch.Tensor:
        """h [..., D] -> logits [..., V] float32."""
        head = self.decoder.embed_tokens.unembed if self.config.tie_embeddings else self.lm_head
        return head(self.decoder.norm(h)).float()

    def forward(self, tokens: torch.Tensor, images: Images | None = None) -> torch.Tensor:
        """tokens [B, T] int -> logits [B, T, V] float32 at every position. images: of a Qwen3VL."""
        h, rotary = self.embed(tokens), torch.arange(tokens.shape[1], device=tokens.device)[None]  # [1, T]
        if images is not None:
            h, rotary = images.place(h), images.rotary(rotary.expand(len(tokens), -1))  # [3, B, T]
        ropes = self.rope(rotary)
        for index, layer in enumerate(self.layers):
            q, k, v = layer.queries_keys_values(h, ropes[layer.window])
            h = layer.update(h, causal_attention(q, k, v, layer.scale, layer.window))
            if images is not None:
                h = images.deepen(h, index)
        return self.head(h)


class Parts(nn.Module):
    """Where the published names of Qwen3-VL begin: model.language_model and model.visual."""

    def __init__(self, config: Qwen3VLConfig):
        super().__init__()
        self.language_model = Decoder(config)
        self.visual = VisionTower(config.vision)


class Qwen3VL(Qwen3):
    """The language model and its eyes, `model.visual`. Without images it is a Qwen3."""

    body = Parts

    @property
    def deepstack_layers(self) -> int:
        """Behind how many of the first layers features of images are added to h."""
        return len(self.config.vision.deepstack)

    @property
    def decoder(self) -> Decoder:
        return self.model.language_model

    def rope(self, positions: torch.Tensor) -> Ropes:
        """positions [B, T] int, or [3, B, T] by time, row and column -> the cos and sin tables of its tokens."""
        if positions.dim() == 2:
            return super().rope(positions)
        frequencies = rope_frequencies(self.config.rope, self.config.head_dim, positions.device)
        axes = torch.zeros_like(frequencies, dtype=torch.int64)  # [E / 2], by which axis each pair turns
        for axis in (1, 2):  # interleaved: t h w t h w ..., and time for the rest
            axes[axis : 3 * self.config.mrope_sections[axis] : 3] = axis
        turns = positions[axes].movedim(0, -1).contiguous()  # [B, T, E/2]; compiled code is held to the strides
        angles = turns[:, :, None].float() * frequencies  # [B, T, 1, E/2]
        return {None: (angles.cos(), angles.sin())}


def image_positions(
    tokens: Sequence[int], config: Qwen3VLConfig, images: Sequence[Grid] = (), videos: Sequence[Grid] = ()
) -> tuple[torch.Tensor, int]:
    """Positions [3, T] int64 of one prompt's tokens by time, row and column, and the position of what follows it.

    tokens: ids, with a run of config.image_id for each image and one of config.video_id for each frame pair of a
    video, as long as the grid has merged patches. images, videos: their grids of patches, in the order in which they
    stand in the prompt.

    Text advances all three axes. An image or a frame pair stays at one time, spreads its rows and columns from there,
    and what is behind it goes on as if it were as many tokens long as its longer side. Raises InputError where runs
    and grids do not match.
    """
    merge = config.vision.merge_size
    left = {
        config.image_id: iter(images),
        config.video_id: (grid for grid in videos for _ in range(grid.frames)),
    }
    names = {config.image_id: "image", config.video_id: "video frame"}
    blocks, position = [], 0
    for kind, run in groupby(tokens, lambda token: token if token in left else None):
        length = len(list(run))
        if kind is None:
            blocks.append(position + torch.arange(length).expand(3, -1))
            position += length
            continue
        grid = next(left[kind], None)
        if grid is None:
            raise InputError(f"the prompt has tokens for more {names[kind]}s than are given; leave them out")
        rows, columns = grid.rows // merge, grid.columns // merge
        if length != rows * columns:
            raise InputError(
                f"the prompt has {length} tokens for {'an' if kind == config.image_id else 'a'} {names[kind]} of "
                f"{rows} x {columns} tokens; give it {rows * columns}"
            )
        index = torch.arange(length)
        blocks.append(position + torch.stack([torch.zeros_like(index), index // columns, index % columns]))
        position += max(rows, columns)
    if over := [names[kind] for kind in left if next(left[kind], None) is not None]:
        raise InputError(f"the prompt lacks the tokens of at least one {over[0]} that is given")
    return torch.cat(blocks, dim=1), position
