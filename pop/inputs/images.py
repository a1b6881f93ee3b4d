"""Images in, pixel tensors out: what any family needs to read an image, then Gemma-3's and Qwen3-VL's preparation.

`load_image` turns a path, a PIL image or an array into RGB bytes, upright and without transparency. It looks at an
image's size before it decodes anything: a file of a few kilobytes may claim billions of pixels. Pillow, an optional
extra, reads the files; arrays need torch alone.

`gemma_pixels` then does what the reference implementation's image processor does, to its rounding: antialiased bilinear
resizing on bytes (in floats it would err visibly), and -1 to 1 for 0 to 255. `qwen_image` and `qwen_video` do the
same for Qwen3-VL, whose images keep their shape and are bicubic. Video files: pop/inputs/video_files.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
import torch.nn.functional as F

from pop.errors import InputError, MissingExtra, PopError, check_count
from pop.inputs import video_files
from pop.models.config import Qwen3VisionConfig
from pop.models.vision.qwen3_vl import Grid

MAX_PIXELS = 2**26  # 67 megapixels, a fifth of a gigabyte in RGB
MAX_SIDE = 2**16  # resizing a line of pixels to a square holds its whole length at the square's width
MAX_BYTES = 2**29  # of a file
# Not all that Pillow knows: some of its readers run other programs (EPS), and most are seldom used and tested.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def load_image(image) -> torch.Tensor:
    """Read an image as RGB: [3, H, W] uint8, on the CPU.

    image: a path (BMP, GIF, JPEG, PNG, PPM, TIFF or WebP; the first frame counts), a PIL image, or an HxWx3 uint8
        array, which is taken as it is. EXIF orientation is applied. What is transparent shows a white background, as
        the reference's `convert_to_rgb` has it, be it from alpha or from a palette; of 16 bits the upper 8 are kept.
        Colour profiles are ignored.

    Raises InputError for anything else, and for a missing, broken, truncated or too large image (MAX_PIXELS, MAX_SIDE,
    MAX_BYTES); MissingExtra for a path where Pillow is not installed.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image)
    pillow = _pillow()
    is_path = isinstance(image, (str, os.PathLike))
    if not is_path and not isinstance(image, pillow.Image):
        raise InputError(
            f"an image is of type {type(image).__name__}; give a path, a PIL image or an HxWx3 uint8 array"
        )
    name = f"the image {str(image)!r:.200}" if is_path else "a PIL image"
    try:
        if is_path:
            _check_file(image, name)
            with pillow.open(image, formats=FORMATS) as opened:
                return _from_pillow(opened, name)
        return _from_pillow(image, name)
    except PopError:
        raise
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        raise InputError(f"{name} is too large ({error}); make it smaller first") from None
    except pillow.UnidentifiedImageError:
        raise InputError(f"{name} is broken, or none of {', '.join(FORMATS)}; give another file") from None
    except Exception as error:  # corrupt bytes can raise nearly anything
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise InputError(f"{name} is truncated or broken ({reason:.200}); give another file") from None


def _from_array(array: np.ndarray) -> torch.Tensor:
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise InputError(
            f"an image array has shape {array.shape} and dtype {array.dtype}; give height x width x 3, uint8"
        )
    _check_size(array.shape[1], array.shape[0], "an image array")
    return torch.from_numpy(np.array(array, order="C")).permute(2, 0, 1)  # [3, H, W], of its own memory


def _from_pillow(image, name: str) -> torch.Tensor:
    from PIL import Image, ImageOps

    _check_size(*image.size, name)  # known from the header: nothing is decoded yet
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        values, transparent = np.asarray(image), image.info.get("transparency", -1)
        image = Image.fromarray(np.where(values == transparent, 255, values >> 8).astype(np.uint8))  # Pillow would clip
    if image.mode in ("I", "F"):
        raise InputError(f"{name} has pixels of 32 bits, of which no value is known to be white; give it in 8 bits")
    if {"A", "a"} & {*image.getbands()} or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)  # [3, H, W]


def _check_file(path: str | os.PathLike, name: str) -> None:
    if not os.path.isfile(path):
        raise InputError(f"{name} is no file; give the path of an image file")
    if (size := os.path.getsize(path)) > MAX_BYTES:
        raise InputError(f"{name} has {size:,} bytes, and at most {MAX_BYTES:,} are read; make it smaller first")


def _check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise InputError(f"{name} is {width} pixels wide and {height} high; give one that is not empty")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise InputError(
            f"{name} is {width:,} pixels wide and {height:,} high, and at most {MAX_PIXELS:,} pixels, {MAX_SIDE:,} a "
            "side, are read; make it smaller first"
        )


def _pillow():
    """The module PIL.Image."""
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtra(
            "any image but an HxWx3 uint8 array needs the package pillow; run `pip install 'pop-prefill[images]'`"
        ) from None
    return Image


# ---- Gemma-3 ----


@dataclass(frozen=True, eq=False)
class PanAndScan:
    """An image that Gemma-3 also looks at in crops, side by side along its longer side, if it is elongated.

    image: see `load_image`. The crops' count is the ratio of the sides, rounded; at least 2, at most `max_crops`, and
    no more than leave each crop `min_crop_size` pixels. Images with a ratio below `min_ratio`, or crops with a side
    below `min_crop_size`, are not looked at in crops.
    """

    image: object
    min_crop_size: int = 256
    max_crops: int = 4
    min_ratio: float = 1.2

    def __post_init__(self):
        check_count("min_crop_size", self.min_crop_size)
        check_count("max_crops", self.max_crops)
        if not isinstance(self.min_ratio, (int, float)) or not self.min_ratio >= 1:
            raise InputError(f"min_ratio is {self.min_ratio!r}; it must be a number of at least 1")


def gemma_pixels(image, size: int) -> torch.Tensor:
    """Prepare an image (see `load_image`) for the vision tower: [1 + crops, 3, size, size] float32 from -1 to 1.

    image: behind a PanAndScan come its crops, from left to right or downwards; there are none of other images.
    size: the config's image_size; an image is squeezed into that square, whatever its shape.
    """
    if isinstance(image, PanAndScan):
        whole = load_image(image.image)
        views = [whole, *_crops(whole, image)]
    else:
        views = [load_image(image)]
    return (torch.stack([_resize(view, size) for view in views]).float() - 127.5) / 127.5  # [1 + crops, 3, size, size]


def _resize(image: torch.Tensor, size: int) -> torch.Tensor:
    """image [3, H, W] uint8 -> [3, size, size] uint8."""
    return F.interpolate(image[None], (size, size), mode="bilinear", antialias=True, align_corners=False)[0]


def _crops(image: torch.Tensor, options: PanAndScan) -> tuple[torch.Tensor, ...]:
    """image [3, H, W] -> its crops; views, the last one up to a few pixels smaller than the others."""
    height, width = image.shape[1:]
    axis, long, short = (2, width, height) if width >= height else (1, height, width)
    count = min(int(long / short + 0.5), long // options.min_crop_size)
    length = -(-long // min(max(count, 2), options.max_crops))  # rounded up
    if long / short < options.min_ratio or min(length, short) < options.min_crop_size:
        return ()
    return image.split(length, axis)


# ---- Qwen3-VL ----

MAX_RATIO = 200  # of an image's longer side to its shorter one
IMAGE_PIXELS = (256**2, 4096**2)  # the least and the most of an image, as the published preprocessor_config.json has it
VIDEO_PIXELS = (4096, 24 * 2**20)  # of all frames of a video, as in video_preprocessor_config.json
FRAMES_PER_SECOND = 2.0
VIDEO_FRAMES = (4, 768)


@dataclass(frozen=True)
class Patches:
    """An image or a video as the vision tower takes it.

    pixels: [P, 3 * frames * patch * patch] float32 from -1 to 1, frame pair by frame pair and, within one, square by
        square of merge_size patches a side.
    times: in seconds, of a video's frame pairs; empty for an image.
    """

    pixels: torch.Tensor
    grid: Grid
    times: tuple[float, ...] = ()


def qwen_image(image, config: Qwen3VisionConfig, pixels: tuple[int, int] = IMAGE_PIXELS) -> Patches:
    """Prepare an image (see `load_image`) for the vision tower.

    pixels: the least and the most that the image may have; one outside is resized, about keeping its shape. Raises
    InputError where a side is more than MAX_RATIO times the other.
    """
    frame = load_image(image)
    size = _qwen_size(*frame.shape[1:], config, 1, 1, pixels, "the image")
    frame = _resize_bicubic(frame[None], size)
    return _patches(frame.expand(config.frames, -1, -1, -1), config)  # an image is a video that stands still


@dataclass(frozen=True)
class Video:
    """A video and its rate.

    frames: a TxHxWx3 uint8 array, or a list of images (see `load_image`) of one size, at least two; or the path of a
        video file (pop/inputs/video_files.py).
    fps: frames per second, of which FRAMES_PER_SECOND are kept, evenly spread, within VIDEO_FRAMES. None: they are
        kept all, and are the frames of a video of 24 a second: the reference's assumption. A file says it itself.
    """

    frames: np.ndarray | Sequence | str | os.PathLike
    fps: float | None = None


def qwen_video(video, config: Qwen3VisionConfig, pixels: tuple[int, int] = VIDEO_PIXELS) -> Patches:
    """Prepare a video for the vision tower.

    video: a Video, or its frames or path alone. pixels: the least and the most that all kept frames may have together.
    Raises InputError for anything else, and MissingExtra for a path where PyAV is not installed. Frames are read and
    resized one at a time.
    """
    video, fps = (video.frames, video.fps) if isinstance(video, Video) else (video, None)
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, Real) or not 1e-6 <= fps <= 1e6):
        raise InputError(f"fps is {fps!r}; give the video's frames per second, from 1e-6 to 1e6, or None")
    is_path = isinstance(video, (str, os.PathLike))
    if is_path and fps is not None:
        raise InputError(f"fps is {fps}, but a video file has a rate of its own; leave fps out")
    if isinstance(video, np.ndarray) and video.ndim != 4:
        raise InputError(f"a video array has shape {video.shape}; give frames x height x width x 3, uint8")
    if not (is_path or isinstance(video, (np.ndarray, Sequence))) or isinstance(video, bytes):
        raise InputError(
            f"a video is of type {type(video).__name__}; give a path, a TxHxWx3 uint8 array or a list of images"
        )
    count, fps = video_files.measure(video, MAX_PIXELS) if is_path else (len(video), fps and float(fps))
    if count < 2:
        raise InputError(f"the video has {count} frames; give at least two, or pass the one as an image")
    kept = range(count) if fps is None else _sampled(count, fps)
    frames = video_files.frames(video, kept, MAX_PIXELS) if is_path else (video[index] for index in kept)
    shape, resized = None, []
    for frame in map(load_image, frames):
        if shape not in (None, frame.shape):
            raise InputError("the video's frames differ in size; give all of them the same height and width")
        shape = frame.shape
        size = _qwen_size(*shape[1:], config, len(kept), config.frames, pixels, "the video")
        resized.append(_resize_bicubic(frame[None], size))
    short = -len(kept) % config.frames  # the last frame fills up the last pair
    resized = torch.cat([*resized, *resized[-1:] * short])
    seconds = [index / (fps or 24) for index in (*kept, *[kept[-1]] * short)]
    firsts, lasts = seconds[:: config.frames], seconds[config.frames - 1 :: config.frames]
    times = tuple((first + last) / 2 for first, last in zip(firsts, lasts, strict=True))
    patches = _patches(resized, config)
    return Patches(patches.pixels, patches.grid, times)


def _sampled(count: int, fps: float) -> list[int]:
    """Which of a video's frames are kept."""
    least, most = VIDEO_FRAMES
    kept = min(max(int(count / fps * FRAMES_PER_SECOND), least), most, count)
    return np.linspace(0, count - 1, kept).round().astype(int).tolist()


def _qwen_size(height, width, config, frames: int, depth: int, pixels: tuple[int, int], name: str) -> tuple[int, int]:
    """Height and width to resize to: multiples of a merged square, so that all frames have about `pixels`.

    frames: how many there are, in groups of `depth`.
    """
    least, most = pixels
    unit = config.patch_size * config.merge_size
    if depth > 1 and min(height, width) < unit:  # a video's frames only
        scale = max(unit / height, unit / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) > MAX_RATIO * min(height, width):
        raise InputError(
            f"{name} is {width} pixels wide and {height} high; a side may be at most {MAX_RATIO} times the other"
        )
    counted = round(frames / depth) * depth
    size = round(height / unit) * unit, round(width / unit) * unit
    if counted * size[0] * size[1] > most:
        scale = math.sqrt(frames * height * width / most)
        size = tuple(max(unit, math.floor(side / scale / unit) * unit) for side in (height, width))
    elif counted * size[0] * size[1] < least:
        scale = math.sqrt(least / (frames * height * width))
        size = tuple(math.ceil(side * scale / unit) * unit for side in (height, width))
    return size


def _resize_bicubic(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """frames [T, 3, H, W] uint8 -> [T, 3, *size] uint8."""
    return F.interpolate(frames, size, mode="bicubic", antialias=True, align_corners=False)


def _patches(frames: torch.Tensor, config: Qwen3VisionConfig) -> Patches:
    """frames [T, 3, H, W] uint8, T a multiple of config.frames, sides of merged squares."""
    size, merge = config.patch_size, config.merge_size
    parts = frames.unflatten(3, (-1, merge, size)).unflatten(2, (-1, merge, size)).unflatten(0, (-1, config.frames))
    # [pair, frame, 3, row, row in square, y, column, column in square, x] -> patches, each by channel, then by frame
    parts = parts.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    grid = Grid(parts.shape[0], parts.shape[1] * merge, parts.shape[2] * merge)
    return Patches((parts.flatten(5).flatten(0, 4).float() - 127.5) / 127.5, grid)  # [P, 3 * frames * size * size]
