"""Gemma-3's images: each is a square of fixed size, and M tokens that attend to each other in both directions.

Pixels equal those of the reference's image processor, which resizes bytes and rounds. Resizing floats would differ.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pop.inputs.images import load_image, normalise
from pop.inputs.processors import Limits, Prepared, Processor
from pop.models.config import Gemma3Config
from pop.models.images import Images

IMAGES_AT_ONCE = 8  # in the vision tower


def gemma_pixels(image, size: int) -> Tensor:
    """Return an image as the vision tower's input, [1, 3, size, size] float32. For `image`, see `load_image`."""
    resized = F.interpolate(load_image(image)[None], (size, size), mode="bilinear", antialias=True)
    return normalise(resized)


class GemmaProcessor(Processor):
    """Lays out an image as two line breaks, its tokens, and two line breaks."""

    def __init__(self, config: Gemma3Config, limits: dict[str, Limits]):
        super().__init__(config, limits)
        self.marks = {"image": "<start_of_image>"}
        self.min_chunk_size = config.vision.tokens_per_image
        self.placeholders = {"image": config.image_id}

    def _prepare(self, kind, given, limits):
        config = self.config
        pixels = gemma_pixels(given.image, config.vision.image_size)  # [1, 3, S, S]
        placeholders = [config.image_id] * config.vision.tokens_per_image
        ids = [config.boi_id, *placeholders, config.eoi_id]
        return Prepared(kind, pixels, ("\n\n", ids, "\n\n"))

    def _placed(self, module, media, frames, lengths, feature_index):
        M = self.config.vision.tokens_per_image
        weight = next(module.parameters())
        pixels = torch.cat([one.pixels for one in media])  # [N, 3, S, S]
        parts = pixels.split(IMAGES_AT_ONCE)
        features = [module.image_features(part.to(weight, non_blocking=True)) for part in parts]  # [images, M, D] each
        look_ahead = (M - 1 - feature_index % M).where(feature_index >= 0, 0)
        return Images(torch.cat(features).flatten(0, 1), feature_index, look_ahead)  # features [N * M, D]
