"""What images and videos bring to a batch of prompts, as data. `TEXT` stands for a batch without any.

A token that stands for a part of an image has its features in place of an embedding. Beyond that, families differ:

- look-ahead: in Gemma-3, the tokens of an image attend to each other in both directions;
- rotary positions by time, row and column, and DeepStack features added after the first layers: in Qwen3-VL.

Shape letters: layers.py.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Images:
    """Images and videos in a batch of prompts, tokens [B, T]. M of the tokens stand for parts of them.

    Features are on the model's device. Other tensors are on the CPU. None: there are none.
    """

    features: Tensor | None = None  # [M, D], the embeddings of these tokens
    feature_index: Tensor | None = None  # [B, T] int64, which of the M each token is, or -1 for text
    look_ahead: Tensor | None = None  # [B, T] int64, how many tokens after itself each attends to
    # [3, B, T] int64, rotary positions by time, row and column, zeros in the padding; None: those of text. Whatever
    # follows the prompt continues from the largest of them.
    rope_positions: Tensor | None = None
    deepstack: tuple[Tensor, ...] = ()  # for each of the first layers, features [M, D] to add to h after it

    def place(self, h: Tensor) -> Tensor:
        """Embeddings h [B, T, D] -> the same, with the images' features at their tokens."""
        if self.features is None:
            return h
        return self._at_image_tokens(h, self.features)

    def add_deepstack(self, h: Tensor, index: int) -> Tensor:
        """h [B, T, D] after layer `index` -> the same, plus the features that are added there."""
        if index >= len(self.deepstack):
            return h
        return h + self._at_image_tokens(torch.zeros_like(h), self.deepstack[index])

    def _at_image_tokens(self, h: Tensor, features: Tensor) -> Tensor:
        """h [B, T, D], with features [M, D] in place of the tokens that stand for images."""
        index = self.feature_index.to(h.device, non_blocking=True)
        return torch.where((index >= 0)[..., None], features[index.clamp(min=0)], h)

    def last_attended(self, positions: Tensor) -> Tensor | None:
        """Positions [B, T] -> the last position that each token attends to. None: its own, as in causal attention."""
        if self.look_ahead is None:
            return None
        return positions + self.look_ahead.to(positions.device)

    def rotary(self, index: Tensor) -> Tensor:
        """Indices [B, C] of tokens in their prompts -> rotary positions, [B, C], or [3, B, C] by axis."""
        if self.rope_positions is None:
            return index
        positions = self.rope_positions.to(index.device)
        T = positions.shape[2]
        inside = positions.gather(2, index.clamp(max=T - 1).expand(3, -1, -1))  # [3, B, C]
        following = index - T + 1 + positions.amax((0, 2))[:, None]  # [B, C]
        return inside.where(index < T, following)

    def rope_offset(self, lengths: Tensor) -> Tensor:
        """Prompt lengths [B] -> [B], the next rotary position after each prompt minus its length."""
        if self.rope_positions is None:
            return torch.zeros_like(lengths)
        return self.rope_positions.amax((0, 2)) + 1 - lengths

    def chunk_ends(self, begin: Tensor, end: Tensor) -> Tensor:
        """begin, end [B] of each row's chunk -> ends [B], moved back so that no image with look-ahead is cut."""
        if self.look_ahead is None:
            return end
        index = torch.arange(self.look_ahead.shape[1])
        may_end = (self.look_ahead == 0) & (index < end[:, None])  # [B, T], whether a chunk may end after this token
        return torch.where(may_end, index + 1, begin[:, None]).amax(1)

    def at(self, index: Tensor, valid: Tensor | bool = True) -> Images:
        """The Images of the tokens `index` [B, C], int64 on the CPU. TEXT if none of them stands for an image.

        Indices may go beyond a prompt. Those tokens are text, and so are tokens that are not `valid` [B, C]. `rotary`
        still takes indices in the prompts.
        """
        if self.feature_index is None:
            return self
        T = self.feature_index.shape[1]
        valid = valid & (index < T)
        inside = index.clamp(max=T - 1)
        feature_index = self.feature_index.gather(1, inside).where(valid, -1)
        if (feature_index < 0).all():
            return TEXT
        look_ahead = self.look_ahead
        if look_ahead is not None:
            look_ahead = look_ahead.gather(1, inside).where(valid, 0)
        return dataclasses.replace(self, feature_index=feature_index, look_ahead=look_ahead)


TEXT = Images()
