"""Images and videos: from what a caller gives to what a model takes. Each family has a Processor.

Its `prepare` turns an image or a video into pixels and the pieces of a prompt that stand for it. Its `images` runs the
vision tower. The families are in gemma3.py and qwen3_vl.py. Another one needs a file and a line in `processor_of`.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from math import inf

from torch import Tensor

from pop.errors import InputError, check_count
from pop.inputs.images import Image
from pop.inputs.tokenizers import Piece
from pop.inputs.video_files import Video
from pop.models.images import TEXT, Images
from pop.models.vision.qwen3_vl import Grid

Limits = tuple[int, int] | None  # the fewest and the most pixels after resizing; None: the images have one size


@dataclass(frozen=True)
class Prepared:
    """A prepared image or video. Callers may give it again in place of the original."""

    kind: str  # "image" or "video"
    pixels: Tensor  # the vision tower's input, float32 on the CPU
    pieces: tuple[Piece, ...]  # the texts and token ids that replace it in a prompt
    grid: Grid | None = None  # its size in patches, if the family's images differ in size

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.pixels.numpy().tobytes()).hexdigest()


class Processor:
    """What all families share. The class itself serves families that take text only.

    `limits` are those of each kind. A kind that it lacks has the published ones.
    """

    def __init__(self, config, limits: dict[str, Limits]):
        self.config = config
        self.limits = dict(limits)
        self.marks: dict[str, str] = {}  # for each kind, the text that marks its place in a prompt
        self.placeholders: dict[str, int] = {}  # for each kind, the token id that stands for its parts
        self.min_chunk_size = 1  # the fewest tokens that prefill may run at once

    def prepare(self, kind: str, given) -> Prepared:
        """Read and prepare an image or a video, unless it is prepared already."""
        if kind not in self.marks:
            takes = " and ".join(["text", *(f"{taken}s" for taken in self.marks)])
            raise InputError(f"this {self.config.family} model takes {takes} only; leave out the {kind}s")
        if isinstance(given, Prepared):
            return given
        limits = self.limits.get(kind)
        if isinstance(given, Image | Video):
            limits = self.limited(kind, given.min_pixels, given.max_pixels)
        if isinstance(given, Image):
            given = given.image
        return self._prepare(kind, given, limits)

    def limited(self, kind: str, min_pixels: int | None, max_pixels: int | None) -> Limits:
        """Return other limits of a kind. None keeps a limit, unless the other contradicts it."""
        limits = self.limits.get(kind)
        if min_pixels is None and max_pixels is None:
            return limits
        if limits is None:
            raise InputError(
                f"the {self.config.family} family cannot choose its images' size; leave out min_pixels and max_pixels"
            )
        least, most = limits
        if max_pixels is not None:
            most = check_count("max_pixels", max_pixels)
            least = min(least, most)
        if min_pixels is not None:
            least = check_count("min_pixels", min_pixels, most=inf if max_pixels is None else most)
            most = max(least, most)
        return least, most

    @property
    def how_to_shorten(self) -> str:
        """What to do about a prompt that is too long."""
        if not self.marks:
            return "shorten the prompt"
        return "shorten the prompt, give fewer images or videos, or lower max_pixels"

    def images(self, module, rows: list[list[Prepared]], tokens: Tensor, lengths: Tensor) -> Images:
        """Run the vision tower of `module` on the images and videos of each batch row. Without any, return TEXT.

        Raises InputError if tokens [B, T], without the padding after `lengths` [B], have more or fewer placeholders.
        """
        return TEXT

    def prepare_batch(self, images, videos, num_rows: int) -> list[list[Prepared]]:
        """Return each row's images and then its videos, prepared from the forms that `pop.Model.generate` accepts."""
        rows = [[] for _ in range(num_rows)]
        for kind, given in (("image", images), ("video", videos)):
            for row, media in zip(rows, _by_row(kind, given, num_rows), strict=True):
                row += [self.prepare(kind, one) for one in media]
        return rows

    def split_at_marks(
        self, text: str, media: Sequence[Prepared], marks: dict[str, str], what: str
    ) -> list[str | Prepared]:
        """Split a text at the marks of each kind, and put `media` there, in order. `what` names the text in errors."""
        parts = re.split(f"({'|'.join(map(re.escape, marks.values()))})", text)
        left = {}
        for kind, mark in marks.items():
            of_kind = [one for one in media if one.kind == kind]
            count = parts.count(mark)
            if count != len(of_kind):
                raise InputError(
                    f"{len(of_kind)} {kind}s are given, but the {what} has {self.marks[kind]} {count} times"
                )
            left[mark] = iter(of_kind)
        return [next(left[part]) if part in left else part for part in parts]

    def replace_marks(self, text: str, media: Sequence[Prepared], what: str) -> list[Piece]:
        """Replace a text's marks by the pieces of `media`."""
        pieces = []
        for part in self.split_at_marks(text, media, self.marks, what):
            pieces += [part] if isinstance(part, str) else part.pieces
        return pieces

    def locate(self, tokens: Sequence[int], media: Sequence[Prepared]) -> list[range]:
        """Return where each image and video is in a prompt's tokens: from its first to its last placeholder."""
        left = {
            kind: iter([index for index, token in enumerate(tokens) if token == placeholder])
            for kind, placeholder in self.placeholders.items()
        }
        ranges = []
        for one in media:
            placeholder = self.placeholders[one.kind]
            count = sum(piece.count(placeholder) for piece in one.pieces if isinstance(piece, list))
            found = list(islice(left[one.kind], count))
            if len(found) < count:
                raise InputError(f"{one.kind}s are given for which the prompt lacks tokens {placeholder}; add them")
            ranges.append(range(found[0], found[-1] + 1))
        return ranges


TEXT_ONLY = Processor(None, {})


def processor_of(config, limits=None, min_pixels: int | None = None, max_pixels: int | None = None) -> Processor:
    """Return the processor of a model with this config. Images keep to the last two limits. Arguments as above."""
    from pop.inputs.gemma3 import GemmaProcessor  # here, because these files import this one
    from pop.inputs.qwen3_vl import QwenProcessor

    family = Processor
    if getattr(config, "vision", None) is not None:
        family = {"gemma3": GemmaProcessor, "qwen3_vl": QwenProcessor}[config.family]
    processor = family(config, limits or {})
    processor.limits["image"] = processor.limited("image", min_pixels, max_pixels)
    return processor


def _by_row(kind: str, given, num_rows: int) -> list[list]:
    """Return a list for each batch row. A single row may come without the list around it."""
    if not isinstance(given, list | tuple | None):
        raise InputError(f"{kind}s is a {type(given).__name__}; give a list of {kind}s, or for a batch a list of lists")
    given = list(given or [()] * num_rows)
    is_row = [_is_row(kind, one) for one in given]
    if num_rows == 1 and not any(is_row):
        return [given]
    if len(given) != num_rows or not all(is_row):
        raise InputError(f"{kind}s must be a list of {num_rows} lists, one for each prompt of the batch")
    return [list(row or ()) for row in given]


def _is_row(kind: str, one) -> bool:
    """Whether an element is the list of a batch row. A list of arrays or tensors of three dimensions is one video."""
    if not isinstance(one, list | tuple | None):
        return False
    return not (kind == "video" and one and getattr(one[0], "ndim", 0) == 3)
