"""Images and videos: from what a caller gives to what a model takes. Each family has a Processor.

Its `prepare` turns an image or a video into pixels and the pieces of a prompt that stand for it. Its `images` runs the
vision tower. The families are in gemma3.py and qwen3_vl.py. Another one needs a file and a line in `processor_of`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor

from pop.errors import InputError, check_count
from pop.inputs.images import Image
from pop.inputs.tokenizers import Piece, any_of
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

    def run_lengths(self, placeholder: int) -> list[int]:
        """Return how many placeholders each run has: one run for an image, and one for each frame pair of a video."""
        return [piece.count(placeholder) for piece in self.pieces if isinstance(piece, list) and placeholder in piece]

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
        if isinstance(given, Prepared):
            kind = given.kind
        if kind not in self.marks:
            takes = " and ".join(["text", *(f"{taken}s" for taken in self.marks)])
            raise InputError(f"this {self.config.family} model takes {takes} only; leave out the {kind}s")
        if isinstance(given, Prepared):
            return given
        whole = {"image": Image, "video": Video}[kind]
        if not isinstance(given, whole):
            given = whole(given)
        limits = self.limited(kind, given.min_pixels, given.max_pixels)
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

        Raises InputError as `runs` does, for tokens [B, T] without the padding after `lengths` [B].
        """
        if not self.placeholders:
            return TEXT
        feature_index = torch.full_like(tokens, -1, device="cpu")
        frames = []  # for each row, where each run of placeholders is, and its grid
        count = 0
        for row, (media, length) in enumerate(zip(rows, lengths.tolist(), strict=True)):
            runs = self.runs(tokens[row, :length], media, f"row {row}")
            frames.append([(run, one.grid) for one, own in zip(media, runs, strict=True) for run in own])
            for run, _ in frames[row]:
                feature_index[row, run.start : run.stop] = torch.arange(count, count + len(run))
                count += len(run)
        if not count:
            return TEXT
        return self._placed(module, list(chain.from_iterable(rows)), frames, lengths, feature_index)

    def prepare_batch(self, images, videos, num_rows: int) -> list[list[Prepared]]:
        """Return each row's images and then its videos, prepared from the forms that `pop.Model.generate` accepts."""
        rows = [[] for _ in range(num_rows)]
        for kind, given in (("image", images), ("video", videos)):
            for row, media in zip(rows, _by_row(kind, given, num_rows), strict=True):
                row += [self.prepare(kind, one) for one in media]
        return rows

    def replace_marks(self, text: str, media: Sequence[Prepared], marks: dict[str, str], what: str) -> list[Piece]:
        """Replace the marks of each kind in a text by the pieces of `media`, in order. `what` names it in errors.

        Without media, marks are text.
        """
        if not media:
            return [text]
        parts = any_of(marks.values()).split(text)
        left = {}
        for kind, mark in marks.items():
            of_kind = [one for one in media if one.kind == kind]
            count = parts.count(mark)
            if count != len(of_kind):
                raise InputError(
                    f"{len(of_kind)} {kind}s are given, but the {what} has {self.marks[kind]} {count} times"
                )
            left[mark] = iter(of_kind)
        pieces = []
        for part in parts:
            pieces += next(left[part]).pieces if part in left else [part]
        return pieces

    def locate(self, tokens: Sequence[int], media: Sequence[Prepared]) -> list[range]:
        """Return where each image and video is in a prompt's tokens: from its first to its last placeholder."""
        return [range(runs[0].start, runs[-1].stop) for runs in self.runs(tokens, media)]

    def runs(self, tokens: Sequence[int], media: Sequence[Prepared], what: str = "the prompt") -> list[list[range]]:
        """Return where the runs of placeholders of each image and video are in a prompt's tokens.

        Raises InputError if the runs are not those of `media`. `what` names the tokens in it.
        """
        tokens = torch.as_tensor(tokens, device="cpu")
        left = {}
        for kind, placeholder in self.placeholders.items():
            edges = F.pad(tokens == placeholder, (1, 1)).diff().nonzero().flatten().tolist()  # begins and ends, in turn
            runs = list(map(range, edges[::2], edges[1::2]))
            found = [len(run) for run in runs]
            given = [one for one in media if one.kind == kind]
            needed = [length for one in given for length in one.run_lengths(placeholder)]
            if found != needed:
                raise InputError(
                    f"{what} has runs of {found!s:.80} tokens {placeholder}, but the {len(given)} {kind}s given need "
                    f"runs of {needed!s:.80}; give the {kind}s that the tokens stand for, or correct the tokens"
                )
            left[kind] = iter(runs)
        return [list(islice(left[one.kind], len(one.run_lengths(self.placeholders[one.kind])))) for one in media]


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


def _by_row(kind: str, given, num_rows: int) -> list[Sequence]:
    """Return a list or a tuple for each batch row. A single row may come without the list around it."""
    if not isinstance(given, list | tuple | None):
        raise InputError(f"{kind}s is a {type(given).__name__}; give a list of {kind}s, or for a batch a list of lists")
    given = given or [()] * num_rows
    is_row = [_is_row(kind, one) for one in given]
    if num_rows == 1 and not any(is_row):
        return [given]
    if len(given) != num_rows or not all(is_row):
        raise InputError(f"{kind}s must be a list of {num_rows} lists, one for each prompt of the batch")
    return [row or () for row in given]


def _is_row(kind: str, one) -> bool:
    """Whether an element is the list of a batch row. A list of PIL images, or of arrays [H, W, 3], is one video."""
    if not isinstance(one, list | tuple | None):
        return False
    is_frame = one and (getattr(one[0], "ndim", 0) == 3 or hasattr(one[0], "getbands"))
    return not (kind == "video" and is_frame)
