"""Qwen3-VL's vision tower: a transformer for images of any size, and the mergers after it.

Images and videos become vectors as wide as the language model's embeddings, in four steps:

    h = patch_embed(patches) + positions     # each patch, two frames deep, is a token
    h = block(h), ...                        # attention within one frame pair, rotary positions by row and column
    features = merger(h)                     # each square of 2 x 2 patches becomes one token of the language model
    deepstack = [merger(h of a block), ...]  # the same after a few of the blocks

Patches attend to all patches of the same frame pair. Consecutive frame pairs of one size form a batch, whichever images
and videos they come from. No mask is needed, and attention costs P^2 for each frame pair.

Attribute names are the checkpoint's names. Shape letters of this file:

    N frame pairs of one size   P patches each     M = P / merge_size ** 2 tokens each
    C width of the tower        H heads            E head width          D width of the language model
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pop.models.config import Qwen3VisionConfig, RopeConfig
from pop.models.layers import Rope, rope_frequencies, rotate

NORM_EPS = 1e-6  # no config states it
PATCHES_AT_ONCE = 2**14  # bounds the memory for activations


class Grid(NamedTuple):
    """An image's or a video's patches: frame pairs (an image has one), rows and columns."""

    frames: int
    rows: int
    columns: int


class Attention(nn.Module):
    """Every patch attends to every patch of its frame pair."""

    attention = staticmethod(F.scaled_dot_product_attention)  # a backend may replace it

    def __init__(self, config: Qwen3VisionConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        """x [N, P, C] -> [N, P, C]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # [N, P, H, E] each
        q = rotate(q.float(), rope).to(x.dtype)  # in float32, as in transformers
        k = rotate(k.float(), rope).to(x.dtype)
        attended = self.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # scores times E ** -0.5
        return self.proj(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: Qwen3VisionConfig):
        super().__init__()
        C = config.hidden_size
        inner = config.intermediate_size
        self.norm1 = nn.LayerNorm(C, NORM_EPS)
        self.norm2 = nn.LayerNorm(C, NORM_EPS)
        self.attn = Attention(config)
        self.mlp = nn.Sequential(
            OrderedDict(linear_fc1=nn.Linear(C, inner), gelu=nn.GELU("tanh"), linear_fc2=nn.Linear(inner, C))
        )

    def forward(self, h: Tensor, *rope: Tensor) -> Tensor:
        h = h + self.attn(self.norm1(h), rope)
        return h + self.mlp(self.norm2(h))


class Merger(nn.Module):
    """Squares of neighbouring patches, through a small network into the language model's width.

    The norm is over the whole square (norm_merged), or patch by patch.
    """

    def __init__(self, config: Qwen3VisionConfig, norm_merged: bool):
        super().__init__()
        size = config.merge_size**2 * config.hidden_size
        self.norm = nn.LayerNorm(size if norm_merged else config.hidden_size, NORM_EPS)
        self.linear_fc1 = nn.Linear(size, size)
        self.linear_fc2 = nn.Linear(size, config.out_size)

    def forward(self, h: Tensor) -> Tensor:
        """h [N, P, C] -> [N, M, D]. Patches come square by square, so those to merge are neighbours."""
        N = len(h)
        h = self.norm(h.reshape(N, -1, *self.norm.normalized_shape))  # [N, P, C], or [N, M, values of a square]
        h = h.reshape(N, -1, self.linear_fc1.in_features)  # [N, M, values of a square]
        return self.linear_fc2(F.gelu(self.linear_fc1(h)))


class VisionTower(nn.Module):
    def __init__(self, config: Qwen3VisionConfig):
        super().__init__()
        self.config = config
        size = (config.frames, config.patch_size, config.patch_size)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, config.hidden_size, kernel_size=size, stride=size)})
        self.pos_embed = nn.Embedding(config.position_side**2, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.merger = Merger(config, norm_merged=False)
        self.deepstack_merger_list = nn.ModuleList(Merger(config, norm_merged=True) for _ in config.deepstack)

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """patches [-1, values of a patch] of all images -> features [-1, D] of all tokens, and each DeepStack layer's.

        Patches are ordered by image, by frame pair, and by square of merge_size x merge_size patches, as
        pop/inputs/qwen3_vl.py prepares them. There is one grid for each image or video, in the same order.
        """
        features = []
        end = 0
        for (rows, columns), run in groupby(grids, key=lambda grid: (grid.rows, grid.columns)):
            P = rows * columns
            begin = end
            end += P * sum(grid.frames for grid in run)
            pairs = patches[begin:end].unflatten(0, (-1, P))  # [N, P, ...]
            for batch in pairs.split(max(1, PATCHES_AT_ONCE // P)):
                batch = batch.to(self.pos_embed.weight, non_blocking=True)
                features.append(self.frame_pairs(batch, rows, columns).flatten(1, 2))
        features, *deepstack = torch.cat(features, dim=1)  # [M of all, D] each
        return features, tuple(deepstack)

    def frame_pairs(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """patches [N, P, ...] of N frame pairs of rows x columns patches -> [1 + DeepStack's layers, N, M, D]."""
        proj = self.patch_embed["proj"]  # a convolution without overlap: a patch's pixels times one matrix
        h = F.linear(patches, proj.weight.flatten(1), proj.bias)  # [N, P, C]
        h = h + self.positions(rows, columns).to(h.dtype)
        angles = self.angles(rows, columns)
        rope = angles.cos(), angles.sin()
        deepstack = []
        for index, block in enumerate(self.blocks):
            h = block(h, *rope)
            if index in self.config.deepstack:
                merger = self.deepstack_merger_list[len(deepstack)]
                deepstack.append(merger(h))
        return torch.stack([self.merger(h), *deepstack])

    def by_square(self, table: Tensor) -> Tensor:
        """A table [rows, columns, ...] in the patches' order [P, ...]."""
        merge = self.config.merge_size
        squares = table.unflatten(1, (-1, merge)).unflatten(0, (-1, merge))  # row, row in it, column, column in it, ...
        return squares.transpose(1, 2).flatten(0, 3)

    def positions(self, rows: int, columns: int) -> Tensor:
        """The table of learned positions, interpolated to rows x columns patches, corners aligned: [P, C] float32."""
        side = self.config.position_side
        table = self.pos_embed.weight.float().T.unflatten(1, (side, side))  # [C, side, side]
        grid = F.interpolate(table[None], (rows, columns), mode="bilinear", align_corners=True)
        return self.by_square(grid[0].permute(1, 2, 0))

    def angles(self, rows: int, columns: int) -> Tensor:
        """The angles of a head's pairs, half by the row and half by the column: [P, 1, E / 2] float32."""
        device = self.pos_embed.weight.device
        frequencies = rope_frequencies(RopeConfig(), self.config.head_dim // 2, device)  # [E / 4]
        patch = self.by_square(torch.arange(rows * columns, device=device).view(rows, columns))  # [P], row by row
        place = torch.stack([patch // columns, patch % columns], dim=-1)  # [P, 2]
        return (place[..., None] * frequencies).flatten(1)[:, None]
