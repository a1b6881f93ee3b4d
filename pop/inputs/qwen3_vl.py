"""Qwen3-VL's images and videos: patches that keep the image's shape, and a few frames of each second.

Pixels equal those of the reference's processors, which resize bytes and round. Resizing floats would differ.
"""

import math
import os
from collections.abc import Sequence
from numbers import Real

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pop.errors import InputError
from pop.inputs import images, video_files
from pop.inputs.images import normalise
from pop.inputs.processors import Limits, Prepared, Processor
from pop.inputs.video_files import Video
from pop.models.config import Qwen3VisionConfig, Qwen3VLConfig
from pop.models.images import Images
from pop.models.qwen3_vl import image_positions
from pop.models.vision.qwen3_vl import Grid

MAX_RATIO = 200  # of an image's longer side to its shorter one
PUBLISHED = {"image": (256**2, 4096**2), "video": (4096, 24 * 2**20)}
FPS = 2  # how many frames of a second are kept
FRAMES = (4, 768)  # the fewest and the most frames that are kept


def qwen_image(image, vision: Qwen3VisionConfig, limits: Limits = PUBLISHED["image"]) -> tuple[Tensor, Grid]:
    """Return an image's patches and their grid. It is resized to the limits on pixels, nearly in shape."""
    frame = normalise(_resize(images.load_image(image), vision, 1, limits))
    return _patches(frame.expand(vision.frames, -1, -1, -1), vision)  # one frame pair: the image twice


def qwen_video(
    video: Video, vision: Qwen3VisionConfig, limits: Limits = PUBLISHED["video"]
) -> tuple[Tensor, Grid, list[float]]:
    """Return a video's patches, frame pair by frame pair, their grid, and the time of each frame pair in seconds.

    The limits are those of all frames together. Frames are read and resized one at a time.
    """
    given = video.frames
    fps = video.fps
    is_path = isinstance(given, (str, os.PathLike))
    _check_video(given, fps, is_path)
    if is_path:
        count, fps = video_files.measure(given)
    else:
        count = len(given)
        fps = None if fps is None else float(fps)
    if count < 2:
        raise InputError(f"the video has {count} frames; give at least two, or pass the one as an image")
    kept = list(range(count)) if fps is None else _sampled(count, fps)
    frames = video_files.frames(given, kept) if is_path else (given[index] for index in kept)
    shape = None
    resized = []
    for frame in map(images.load_image, frames):
        shape = shape or frame.shape
        if frame.shape != shape:
            raise InputError(f"the video's frames differ in size: {tuple(shape)} and {tuple(frame.shape)}")
        resized.append(_resize(frame, vision, len(kept), limits))
    missing = -len(kept) % vision.frames  # the last pair is filled with the last frame
    resized += resized[-1:] * missing
    kept += kept[-1:] * missing
    patches, grid = _patches(normalise(torch.cat(resized)), vision)
    pairs = np.reshape(kept, (-1, vision.frames))
    times = (pairs[:, [0, -1]] / (fps or 24)).mean(1)
    return patches, grid, times.tolist()


def _check_video(frames, fps: float | None, is_path: bool) -> None:
    is_rate = isinstance(fps, Real) and not isinstance(fps, bool) and 1e-6 <= fps <= 1e6
    if fps is not None and (is_path or not is_rate):
        raise InputError(f"fps is {fps!r}; it must be a number from 1e-6 to 1e6, or None for a file, which has its own")
    if not isinstance(frames, (os.PathLike, np.ndarray, Tensor, Sequence)) or isinstance(frames, bytes):
        raise InputError(f"a video is of type {type(frames).__name__}; give a path, an array or a list of images")


def _sampled(count: int, fps: float) -> list[int]:
    """Return the numbers of the frames that are kept of `count`."""
    least, most = FRAMES
    kept = min(max(int(count / fps * FPS), least), most, count)
    return np.linspace(0, count - 1, kept).round().astype(int).tolist()


def _resize(frame, vision: Qwen3VisionConfig, num_frames: int, limits: Limits) -> Tensor:
    """Resize an image or one of a video's frames [3, H, W] to whole squares of merged patches, [1, 3, h, w] uint8."""
    sides = frame.shape[1:]
    least, most = limits
    unit = vision.patch_size * vision.merge_size
    depth = vision.frames if num_frames > 1 else 1
    if depth > 1 and min(sides) < unit:  # the reference enlarges small frames of videos only
        scale = unit / min(sides)
        sides = [int(side * scale) for side in sides]
    if max(sides) > MAX_RATIO * min(sides):
        height, width = sides
        raise InputError(f"{width} x {height} pixels are too long; a side may be at most {MAX_RATIO} times the other")
    num_pixels = num_frames * math.prod(sides)
    squares = [round(side / unit) for side in sides]  # rows and columns of merged patches
    counted = round(num_frames / depth) * depth * math.prod(squares) * unit**2
    if counted > most:
        scale = math.sqrt(num_pixels / most)
        squares = [max(1, math.floor(side / scale / unit)) for side in sides]
    elif counted < least:
        scale = math.sqrt(least / num_pixels)
        squares = [math.ceil(side * scale / unit) for side in sides]
    height, width = [square * unit for square in squares]
    images.check_size(width, height, "a resized image")
    return F.interpolate(frame[None], (height, width), mode="bicubic", antialias=True)


def _patches(frames: Tensor, config: Qwen3VisionConfig) -> tuple[Tensor, Grid]:
    """Cut frames [T, 3, H, W] into patches [P, 3 * frames * size * size], by squares."""
    size = config.patch_size
    merge = config.merge_size
    parts = frames.unflatten(3, (-1, merge, size)).unflatten(2, (-1, merge, size)).unflatten(0, (-1, config.frames))
    # [pair, frame, 3, row, row in square, y, column, column in square, x]: each patch by channel, then by frame
    parts = parts.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    grid = Grid(parts.shape[0], parts.shape[1] * merge, parts.shape[2] * merge)
    return parts.flatten(5).flatten(0, 4), grid  # [P, 3 * frames * size * size]


class QwenProcessor(Processor):
    """Lays out an image as its tokens, and a video as frame pairs with their times, between two more tokens."""

    def __init__(self, config: Qwen3VLConfig, limits: dict[str, Limits]):
        super().__init__(config, PUBLISHED | limits)
        self.marks = {kind: f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video")}
        self.placeholders = {"image": config.image_id, "video": config.video_id}

    def _prepare(self, kind, given, limits):
        config = self.config
        if kind == "video":
            pixels, grid, times = qwen_video(given, config.vision, limits)
        else:
            pixels, grid = qwen_image(given.image, config.vision, limits)
        num_tokens = grid.rows * grid.columns // config.vision.merge_size**2  # of an image, or of a frame pair
        ids = [config.start_id, *[self.placeholders[kind]] * num_tokens, config.end_id]
        pieces = [ids]
        if kind == "video":
            pieces = [[config.start_id]]
            for time in times:
                pieces += [f"<{time:.1f} seconds>", ids]
            pieces.append([config.end_id])
        return Prepared(kind, pixels, tuple(pieces), grid)

    def _placed(self, module, media, frames, lengths, feature_index):
        rope_positions = feature_index.new_zeros(3, *feature_index.shape)
        for row, length in enumerate(lengths.tolist()):
            rope_positions[:, row, :length] = image_positions(length, frames[row], self.config.vision.merge_size)
        pixels = torch.cat([one.pixels for one in media])  # [P, ...]
        features, deepstack = module.image_features(pixels, [one.grid for one in media])
        return Images(features, feature_index, rope_positions=rope_positions, deepstack=deepstack)
