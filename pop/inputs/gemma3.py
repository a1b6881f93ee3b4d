"""Gemma-3's images: each is a square of fixed size, and M tokens that attend each other in both directions.

Pixels equal those of the reference's image processor, which resizes bytes and rounds. Resizing floats would differ.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from pop.errors import InputError, check_count
from pop.inputs.images import load_image, normalise
from pop.inputs.processors import Prepared, Processor
from pop.models.config import Gemma3Config, ImageConfig
from pop.models.images import TEXT, Images

IMAGES_AT_ONCE = 8  # in the vision tower
PUBLISHED = ImageConfig()


@dataclass(frozen=True, eq=False)
class PanAndScan:
    """An image that Gemma-3 gets as a whole and, if it is elongated, also in crops along its longer side.

    The number of crops is the ratio of the sides, rounded, but at least 2 and within the limits below.
    """

    image: object  # as in `load_image`
    min_crop_size: int = 256  # pixels of a side; an image that is too small for two crops is not cropped
    max_crops: int = 4
    min_ratio: float = 1.2  # of the longer side to the shorter one; an image below it is not cropped

    def __post_init__(self):
        check_count("min_crop_size", self.min_crop_size)
        check_count("max_crops", self.max_crops)
        if not isinstance(self.min_ratio, (int, float)) or not self.min_ratio >= 1:
            raise InputError(f"min_ratio is {self.min_ratio!r}; it must be a number of at least 1")


def gemma_pixels(image, size: int, config: ImageConfig = PUBLISHED) -> torch.Tensor:
    """Return an image, and then the crops of a PanAndScan, as [1 + crops, 3, size, size] float32."""
    options = image if isinstance(image, PanAndScan) else PanAndScan(image, min_ratio=float("inf"))  # no crops
    whole = load_image(options.image)
    views = [whole, *_crops(whole, options)]
    resized = [F.interpolate(view[None], (size, size), mode="bilinear", antialias=True) for view in views]
    return normalise(torch.cat(resized), config)


def _crops(image: torch.Tensor, options: PanAndScan) -> tuple[torch.Tensor, ...]:
    """Split image [3, H, W] into its crops. The last one may be a few pixels smaller than the others."""
    height, width = image.shape[1:]
    axis, long, short = (2, width, height) if width >= height else (1, height, width)
    count = min(int(long / short + 0.5), long // options.min_crop_size)
    length = -(-long // min(max(count, 2), options.max_crops))  # rounded up
    if long / short < options.min_ratio or min(length, short) < options.min_crop_size:
        return ()
    return image.split(length, axis)


class GemmaProcessor(Processor):
    """Lays out an image as two line breaks, its tokens, and two line breaks. A PanAndScan has several such images."""

    published: ClassVar = {"image": PUBLISHED}

    def __init__(self, config: Gemma3Config, preparation: dict[str, ImageConfig]):
        super().__init__(config, preparation)
        self.marks = {"image": "<start_of_image>"}
        self.min_chunk_size = config.vision.tokens_per_image
        self.placeholders = {"image": config.image_id}

    def _prepare(self, kind, given, preparation):
        config = self.config
        pixels = gemma_pixels(given, config.vision.image_size, preparation)  # [1 + crops, 3, S, S]
        ids = [config.boi_id, *[config.image_id] * config.vision.tokens_per_image, config.eoi_id]
        pieces = one = ("\n\n", ids, "\n\n")
        if len(pixels) > 1:
            pieces = ("Here is the original image ", *one, " and here are some crops to help you see better")
            pieces += (" ", *one) * (len(pixels) - 1)
        return Prepared(kind, pixels, pieces)

    def images(self, module, rows, tokens, lengths):
        M, image_id = self.config.vision.tokens_per_image, self.config.image_id
        is_image = (tokens == image_id).cpu() & (torch.arange(tokens.shape[1]) < lengths[:, None])  # [B, T]
        for row, (media, count) in enumerate(zip(rows, is_image.sum(1).tolist(), strict=True)):
            num_images = sum(len(one.pixels) for one in media)
            if count != M * num_images:
                raise InputError(f"row {row} has {count} tokens {image_id}, but its {num_images} images need {M} each")
        feature_index = is_image.flatten().cumsum(0).view_as(is_image) - 1
        first = is_image & ~F.pad(is_image, (1, -1))  # image tokens after another token
        if not torch.equal(first, is_image & (feature_index % M == 0)):
            raise InputError(f"the {M} tokens {image_id} of each image must be adjacent, between other tokens")
        if not is_image.any():
            return TEXT
        weight = next(module.parameters())
        pixels = torch.cat([one.pixels for media in rows for one in media])  # [N, 3, S, S]
        parts = (part.to(weight, non_blocking=True) for part in pixels.split(IMAGES_AT_ONCE))
        features = torch.cat([*map(module.image_features, parts)])
        look_ahead = (M - 1 - feature_index % M).where(is_image, 0)
        return Images(features.flatten(0, 1), feature_index.where(is_image, -1), look_ahead)  # features [N * M, D]
