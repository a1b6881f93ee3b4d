"""Qwen3-VL, from 2B to 235B: the Qwen3 language model (qwen3.py) and a vision tower (vision/qwen3_vl.py).

It adds two things to Qwen3:

- M-RoPE: positions have three axes, which are time, row and column. Each rotated pair turns by one of them. On text the
  three axes are equal, which is plain RoPE. `image_positions` computes the positions of images and videos.
- DeepStack (Meng et al. 2024): after each of the first language layers, features from a layer of the vision tower are
  added to the image tokens.

Attribute names are the checkpoint's names. Shape letters: layers.py.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from pop.models import base
from pop.models.config import Qwen3VLConfig
from pop.models.layers import rope_tables
from pop.models.qwen3 import Qwen3
from pop.models.vision.qwen3_vl import Grid, VisionTower


class Qwen3VL(Qwen3):
    vision_blocks = "model.visual.blocks"

    def __init__(self, config: Qwen3VLConfig):
        super().__init__(config)
        halves = nn.Module()  # checkpoints call them model.language_model and model.visual
        halves.language_model = self.model
        halves.visual = VisionTower(config.vision)
        self.model = halves
        self.deepstack_layers = len(config.vision.deepstack)

    @property
    def decoder(self) -> base.Decoder:
        return self.model.language_model

    def image_features(self, pixels: Tensor, grids: Sequence[Grid]) -> tuple[Tensor, tuple]:
        """The features of all image tokens [M, D], and for each DeepStack layer [M, D]. See VisionTower.forward."""
        return self.model.visual(pixels, grids)

    def vision_block_inputs(self, N, P):
        vision = self.config.vision
        weight = self.model.visual.pos_embed.weight
        patches = weight.new_zeros(N, P, vision.hidden_size)
        cos = weight.new_zeros(P, 1, vision.head_dim // 2, dtype=torch.float32)
        return patches, cos, torch.zeros_like(cos)

    def rope(self, positions):
        if positions.dim() == 2:
            return super().rope(positions)
        frequencies = self.frequencies(self.config.rope, positions.device)
        axes = torch.zeros_like(frequencies, dtype=torch.int64)  # [E/2], the axis by which each pair turns
        for axis in (1, 2):  # interleaved: t h w t h w ..., and t for the rest
            axes[axis : 3 * self.config.mrope_sections[axis] : 3] = axis
        by_pair = positions[axes].movedim(0, -1).contiguous()  # [B, T, E/2]
        return {None: rope_tables(by_pair, frequencies)}


def image_positions(length: int, frames: Iterable[tuple[range, Grid]], merge_size: int) -> Tensor:
    """The rotary positions of a prompt of `length` tokens, by time, row and column: [3, T] int64.

    Text advances all three axes by one. An image or a frame pair has one time, and its rows and columns start at the
    current position. After it, positions continue as if it had as many tokens as its longer side.

    Args:
        length: T.
        frames: For each image and each frame pair of a video, where its tokens are, and its grid of patches.
        merge_size: How many patches are a side of the square that becomes one token.
    """
    steps = torch.ones(length, dtype=torch.int64, device="cpu")  # how far positions advance after each token
    offsets = steps.new_zeros(3, length)
    for run, grid in frames:
        tokens = slice(run.start, run.stop)
        columns = grid.columns // merge_size
        index = torch.arange(len(run), device="cpu")
        offsets[1, tokens] = index // columns
        offsets[2, tokens] = index % columns
        steps[tokens] = 0
        steps[run.stop - 1] = max(grid.rows // merge_size, columns)
    return steps.cumsum(0) - steps + offsets
