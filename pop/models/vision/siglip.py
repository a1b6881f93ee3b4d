"""Gemma-3's vision tower, SigLIP (Zhai et al. 2023), and the projector after it.

An image becomes a sequence of vectors as wide as the language model's embeddings, in three steps:

    h = tower(pixels)              # patches as tokens, through a transformer that attends in all directions
    h = pool(h)                    # each square of patches averaged: 4096 patches are 256 tokens
    h = projector(h)               # a norm, and one matrix into the language model's width

Attribute names are the checkpoint's names. Shape letters of this file:

    N images    S pixels a side     P patches an image     M tokens an image
    C width of the tower            H heads, E head width  D width of the language model
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pop.models.config import SiglipConfig
from pop.models.layers import GemmaRMSNorm


class Embeddings(nn.Module):
    """Each patch's pixels times one matrix (a convolution without overlap), plus a learned vector for its position."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        size = config.patch_size
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, kernel_size=size, stride=size)
        self.position_embedding = nn.Embedding(config.patches_per_side**2, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        # By default, cuDNN would round a float32 convolution to TF32, and plan for each number of images.
        matrix = self.patch_embedding
        patches = F.unfold(pixels, matrix.kernel_size, stride=matrix.stride)  # [N, values of a patch, P], row by row
        return F.linear(patches.transpose(1, 2), matrix.weight.flatten(1), matrix.bias) + self.position_embedding.weight


class Attention(nn.Module):
    """Every patch attends to every patch: no mask, no positions beyond the embedding's."""

    attention = staticmethod(F.scaled_dot_product_attention)  # a backend may replace it

    def __init__(self, config: SiglipConfig):
        super().__init__()
        C = config.hidden_size
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(C, C)
        self.k_proj = nn.Linear(C, C)
        self.v_proj = nn.Linear(C, C)
        self.out_proj = nn.Linear(C, C)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [N, P, C] -> [N, H, P, E]

    def forward(self, x: Tensor) -> Tensor:
        q = self.heads(self.q_proj(x))
        k = self.heads(self.k_proj(x))
        v = self.heads(self.v_proj(x))
        attended = self.attention(q, k, v)  # scores times E ** -0.5
        return self.out_proj(attended.transpose(1, 2).flatten(2))  # [N, P, C]


class EncoderLayer(nn.Module):
    def __init__(self, config: SiglipConfig):
        super().__init__()
        C = config.hidden_size
        inner = config.intermediate_size
        self.layer_norm1 = nn.LayerNorm(C, config.norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(C, config.norm_eps)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(C, inner), gelu=nn.GELU("tanh"), fc2=nn.Linear(inner, C)))

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.self_attn(self.layer_norm1(h))
        return h + self.mlp(self.layer_norm2(h))


class VisionModel(nn.Module):
    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [N, 3, S, S] from -1 to 1, in the weights' dtype -> a vector for each patch [N, P, C]."""
        h = self.embeddings(pixels)
        for layer in self.encoder["layers"]:
            h = layer(h)
        return self.post_layernorm(h)


class Projector(nn.Module):
    """From the tower's patches to tokens of a language model of width `hidden_size`."""

    def __init__(self, config: SiglipConfig, hidden_size: int):
        super().__init__()
        tokens = config.tokens_per_side
        block = config.patches_per_side // tokens
        self.grid = (tokens, block, tokens, block)  # of patches: row, row in it, column, column in it
        self.mm_soft_emb_norm = GemmaRMSNorm(config.hidden_size, config.norm_eps)
        # Stored as [in, out], unlike nn.Linear, and applied as x @ weight.
        self.mm_input_projection_weight = nn.Parameter(torch.zeros(config.hidden_size, hidden_size))  # [C, D]

    def forward(self, patches: Tensor) -> Tensor:
        """patches [N, P, C] -> tokens [N, M, D] in place of embeddings, but not scaled by sqrt(D)."""
        blocks = patches.unflatten(1, self.grid)
        means = blocks.mean((2, 4)).flatten(1, 2)  # of square blocks of patches, row by row: [N, M, C]
        return self.mm_soft_emb_norm(means) @ self.mm_input_projection_weight
