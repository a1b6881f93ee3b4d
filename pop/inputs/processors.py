"""What images and videos are to a model, from what a caller gives to what the engine takes: one class a family.

    an image or a video            ──prepared──►  Prepared: its pixels, and what stands for it in a prompt
    text that says where they are  ──pieces────►  texts and token ids between them
    tokens [B, T], Prepared        ──images────►  Images (pop/models/layers.py): features, and what comes with them

A family says which kinds it takes, how a text marks them, and what its tower makes of them. All else is shared.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import torch
import torch.nn.functional as F

from pop.engine import vision_layer
from pop.errors import InputError
from pop.inputs.images import Video, gemma_pixels, qwen_image, qwen_video
from pop.inputs.tokenizers import Piece
from pop.models.config import Gemma3Config, Qwen3VLConfig
from pop.models.layers import Images
from pop.models.qwen3_vl import image_positions
from pop.models.vision.qwen3_vl import Grid

IMAGES_AT_ONCE = 8  # in Gemma's vision tower


@dataclass(frozen=True)
class Prepared:
    """An image or a video, read and prepared. It may be given in place of what it was made of.

    kind: "image" or "video". pixels: as the family's tower takes them, float32 on the CPU.
    pieces: what stands for it in a prompt. grid: of its patches, in a family whose images differ in size.
    """

    kind: str
    pixels: torch.Tensor
    pieces: tuple[Piece, ...]
    grid: Grid | None = None

    @functools.cached_property
    def sha256(self) -> str:
        """Of its pixels."""
        return hashlib.sha256(self.pixels.numpy().tobytes()).hexdigest()


class Processor:
    """A family that takes text alone, and what the others share.

    marks: by kind, what a text says where one is. placeholders: by kind, the token that stands for what is seen.
    min_chunk_size: tokens that a chunk must be able to hold.
    """

    marks: ClassVar[dict[str, str]] = {}
    placeholders: dict[str, int] = {}  # noqa: RUF012 (each class has its own)
    min_chunk_size = 1

    def __init__(self, config):
        self.config = config

    def _prepare(self, kind: str, given) -> Prepared:
        raise NotImplementedError

    def prepare(self, kind: str, given) -> Prepared:
        """An image or a video, unless it has been prepared already."""
        return given if isinstance(given, Prepared) else self._prepare(kind, given)

    def images(
        self, module, rows: list[list[Prepared]], tokens: torch.Tensor, lengths: torch.Tensor, run=vision_layer
    ) -> Images | None:
        """What the rows' images and videos bring to tokens [B, T] of `lengths` [B]; None where there are none.

        run: how a layer of the tower is called, vision_layer or the same compiled. Raises InputError unless the tokens
        have the placeholders that they need, and no others.
        """
        return None

    def layer_call(self, module, N: int, P: int) -> tuple | None:
        """What `run` would be called with for N images of P patches each, with zeros for numbers; None: never."""
        return None

    def prepare_batch(self, images, videos, num_rows: int) -> list[list[Prepared]]:
        """The images, and then the videos, of each row of a batch, as a caller gives them (pop.Model.generate)."""
        rows = [[] for _ in range(num_rows)]
        for kind, given in (("image", images), ("video", videos)):
            if _is_nothing(given):
                continue
            if kind not in self.marks:
                takes = " and ".join(["text", *(f"{kind}s" for kind in self.marks)])
                raise InputError(
                    f"this model of the {self.config.family} family reads {takes} only; leave out the {kind}s"
                )
            for row, ones in zip(rows, _by_row(kind, given, num_rows), strict=True):
                row += [self.prepare(kind, one) for one in ones]
        return rows

    def replace_marks(self, text: str, seen: Sequence[Prepared], what: str) -> list[Piece]:
        """A text with what stands for its images and videos in the places of their marks; `what` names it in errors."""
        by_kind = {kind: [one for one in seen if one.kind == kind] for kind in self.marks}
        for kind, ones in by_kind.items():
            if (count := text.count(self.marks[kind])) != len(ones):
                raise InputError(
                    f"{len(ones)} {kind}s are given, but the {what} says {self.marks[kind]} {count} times; it must say "
                    f"so where each {kind} is"
                )
        left, kinds = {kind: iter(ones) for kind, ones in by_kind.items()}, {m: kind for kind, m in self.marks.items()}
        parts = re.split(f"({'|'.join(map(re.escape, kinds))})", text)
        return [piece for part in parts for piece in (next(left[kinds[part]]).pieces if part in kinds else (part,))]

    def locate(self, tokens: Sequence[int], seen: Sequence[Prepared]) -> list[range]:
        """Where in a prompt's tokens each of its images and videos is: from its first to its last placeholder."""
        left = {
            kind: iter([place for place, token in enumerate(tokens) if token == placeholder])
            for kind, placeholder in self.placeholders.items()
        }
        places = []
        for one in seen:
            placeholder = self.placeholders[one.kind]
            count = sum(ids.count(placeholder) for ids in one.pieces if not isinstance(ids, str))
            taken = list(islice(left[one.kind], count))
            if len(taken) < count:
                raise InputError(f"{one.kind}s are given that the prompt lacks tokens {placeholder} for; add them")
            places.append(range(taken[0], taken[-1] + 1))
        return places

    def check_text(self, tokens: Sequence[int], what: str) -> None:
        """Raise InputError where tokens that come without images or videos have placeholders for some."""
        for kind, token in self.placeholders.items():
            if token in tokens:
                raise InputError(f"the {what} has tokens {token}, which stand for {kind}s, but no {kind} comes with it")


class GemmaProcessor(Processor):
    """An image is a square of fixed size, and M tokens that attend each other in both directions.

    A PanAndScan is several of these: the whole, and its crops.
    """

    marks: ClassVar = {"image": "<start_of_image>"}

    def __init__(self, config: Gemma3Config):
        super().__init__(config)
        self.min_chunk_size = config.vision.tokens_per_image
        self.placeholders = {"image": config.image_id}

    def _prepare(self, kind, given):
        config = self.config
        pixels = gemma_pixels(given, config.vision.image_size)  # [1 + crops, 3, S, S]
        ids = [config.boi_id, *[config.image_id] * config.vision.tokens_per_image, config.eoi_id]
        one = ("\n\n", ids, "\n\n")
        if len(pixels) == 1:
            return Prepared(kind, pixels, one)
        crops = [piece for _ in pixels[1:] for piece in (" ", *one)]
        about = "Here is the original image ", " and here are some crops to help you see better"
        return Prepared(kind, pixels, (about[0], *one, about[1], *crops))

    def images(self, module, rows, tokens, lengths, run=vision_layer):
        M, image_id = self.config.vision.tokens_per_image, self.config.image_id
        is_image = (tokens == image_id).cpu() & (torch.arange(tokens.shape[1]) < lengths[:, None])  # [B, T]
        numbers = is_image.flatten().cumsum(0).view_as(is_image) - 1
        for row, (seen, count) in enumerate(zip(rows, is_image.sum(1).tolist(), strict=True)):
            views = sum(len(one.pixels) for one in seen)
            if count != M * views:
                raise InputError(
                    f"row {row} has {views} images, crops counted, but {count} tokens {image_id} for images, of {M} "
                    "each; give each image its tokens in the prompt, and the other way round"
                )
        begins = is_image & ~F.pad(is_image, (1, -1))  # where a run of them does
        if not torch.equal(begins, is_image & (numbers % M == 0)):
            raise InputError(f"the tokens {image_id} of each image must be {M} side by side, with others around them")
        if not is_image.any():
            return None
        weight = next(module.parameters())
        pixels = torch.cat([one.pixels for seen in rows for one in seen])  # [N, 3, S, S]
        features = torch.cat([module.image_features(piece.to(weight), run) for piece in pixels.split(IMAGES_AT_ONCE)])
        ahead = (M - 1 - numbers % M).where(is_image, 0)
        return Images(features.flatten(0, 1), numbers.where(is_image, -1), ahead)  # features [N, M, D] -> [N * M, D]

    def layer_call(self, module, N, P):
        h = next(module.parameters()).new_zeros(N, P, self.config.vision.hidden_size)
        return module.vision_tower.vision_model.encoder.layers[0], h


class QwenProcessor(Processor):
    """Images and videos keep their shape; all tokens are causal, and placed by time, row and column."""

    marks: ClassVar = {
        "image": "<|vision_start|><|image_pad|><|vision_end|>",
        "video": "<|vision_start|><|video_pad|><|vision_end|>",
    }

    def __init__(self, config: Qwen3VLConfig):
        super().__init__(config)
        self.placeholders = {"image": config.image_id, "video": config.video_id}

    def _prepare(self, kind, given):
        config, is_video = self.config, kind == "video"
        patches = (qwen_video if is_video else qwen_image)(given, config.vision)
        count = patches.grid.rows * patches.grid.columns // config.vision.merge_size**2
        ids = [config.start_id, *[self.placeholders[kind]] * count, config.end_id]
        pieces = [ids]
        if is_video:
            # Each frame pair is an image behind the time when it is seen, as text, and all are in one more pair.
            pairs = [piece for time in patches.times for piece in (f"<{time:.1f} seconds>", ids)]
            pieces = [[config.start_id], *pairs, [config.end_id]]
        return Prepared(kind, patches.pixels, tuple(pieces), patches.grid)

    def images(self, module, rows, tokens, lengths, run=vision_layer):
        tokens = tokens.cpu()
        positions = torch.zeros(3, *tokens.shape, dtype=torch.int64)
        for row, (seen, length) in enumerate(zip(rows, lengths.tolist(), strict=True)):
            grids = {kind: [one.grid for one in seen if one.kind == kind] for kind in self.marks}
            try:
                of_row = tokens[row, :length].tolist()
                positions[:, row, :length], _ = image_positions(of_row, self.config, grids["image"], grids["video"])
            except InputError as error:
                raise InputError(f"row {row}: {error}") from None
        if not any(rows):
            return None
        numbers, seen, count = torch.full_like(tokens, -1), [], 0
        for kind, token in self.placeholders.items():  # all images, then all videos
            seen += [one for row in rows for one in row if one.kind == kind]
            places = (tokens == token) & (torch.arange(tokens.shape[1]) < lengths[:, None])  # [B, T]
            numbers[places] = torch.arange(count, count := count + int(places.sum()))
        pixels = torch.cat([one.pixels for one in seen])
        features, deepstack = module.model.visual(pixels, [one.grid for one in seen], run)
        return Images(features, numbers, positions=positions, deepstack=deepstack)

    def layer_call(self, module, N, P):
        vision, weight = self.config.vision, next(module.parameters())
        tables = (weight.new_zeros(P, 1, vision.head_dim // 2, dtype=torch.float32) for _ in range(2))
        return module.model.visual.blocks[0], weight.new_zeros(N, P, vision.hidden_size), *tables


def processor_of(config) -> Processor:
    """How the model of this config sees."""
    if getattr(config, "vision", None) is None:
        return Processor(config)
    return {"gemma3": GemmaProcessor, "qwen3_vl": QwenProcessor}[config.family](config)


def as_list(kind: str, given) -> list:
    """Images, or videos, as a caller gives them; None: there are none."""
    if not isinstance(given, list | tuple | None):
        raise InputError(f"{kind}s is a {type(given).__name__}; give a list of {kind}s, or for a batch a list of lists")
    return list(given or ())


def _by_row(kind: str, given, num_rows: int) -> list[list]:
    """A list for each row; those of a single row may come without the list around them."""
    given = as_list(kind, given)
    is_row = [isinstance(one, list | tuple | None) and not (kind == "video" and _is_frames(one)) for one in given]
    if num_rows == 1 and not any(is_row):
        return [given]
    if len(given) != num_rows or not all(is_row):
        files = ", with video files as pop.Video(path)" if kind == "video" else ""  # paths in a list are frames
        raise InputError(f"{kind}s must be a list of {num_rows} lists, one for each prompt of the batch{files}")
    return [list(row or ()) for row in given]


def _is_frames(one) -> bool:
    """Whether a list is one video, of images, and not several videos."""
    if not one:
        return False
    first = one[0]
    return not isinstance(first, list | tuple | Video | Prepared) and getattr(first, "ndim", 3) == 3


def _is_nothing(given) -> bool:
    return given is None or (isinstance(given, list | tuple) and all(map(_is_nothing, given)))
