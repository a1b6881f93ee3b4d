"""Reading images: files, bytes, PIL images, arrays and tensors become RGB bytes, upright and without transparency.

A file may come from anybody, and one of a few kilobytes may claim billions of pixels. So this file checks the sizes
before it decodes anything. Pillow, an optional extra, reads files; arrays do not need it.
"""

import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pop.errors import CacheMemoryError, InputError, PopError, import_extra, reason_of

MAX_PIXELS = 2**26  # 67 megapixels, 0.2 GB in RGB
MAX_SIDE = 2**16  # an image is resized along one side first, so a very long one would need much memory
MAX_BYTES = 2**29  # of a file
# Pillow knows more formats. Some of its readers run other programs (EPS), and most are rarely used and tested.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


@dataclass(frozen=True, eq=False)
class Image:
    """An image with its own limits on pixels, for a family that keeps an image's shape.

    None takes the model's limit, or the other limit if the two contradict each other.
    """

    image: object  # as in `load_image`
    min_pixels: int | None = None
    max_pixels: int | None = None


def load_image(image) -> Tensor:
    """Return an image as RGB, [3, H, W] uint8 on the CPU.

    An image is a file in one of FORMATS, as a path or bytes. Or it is a PIL image, a uint8 array [H, W, 3], or a uint8
    tensor [H, W, 3] or [3, H, W].

    Transparent pixels show a white background, as in the reference's `convert_to_rgb`. Of 16 bits, the high 8 are
    kept. Colour profiles are ignored, and the EXIF orientation is applied. Of several frames the first is read.
    """
    is_path = isinstance(image, (str, os.PathLike))
    name = f"the image {str(image)!r:.200}" if is_path else f"an image of type {type(image).__name__}"
    with reading(name, FORMATS):
        if isinstance(image, np.ndarray | Tensor):
            return _from_array(image)
        pillow = import_extra("PIL.Image", "pillow", "images")
        if isinstance(image, pillow.Image):
            return _from_pillow(image, name)
        if is_path:
            image = os.path.expanduser(image)
            check_file(image, name, MAX_BYTES)
        elif isinstance(image, (bytes, bytearray)):
            image = io.BytesIO(image)
        else:
            raise InputError(f"{name} was given; give a path, bytes, a PIL image, or a uint8 array or tensor [H, W, 3]")
        with pillow.open(image, formats=FORMATS) as opened:  # refuses an image with more than 178 megapixels
            return _from_pillow(opened, name)


def _from_array(image: np.ndarray | Tensor) -> Tensor:
    shape = tuple(image.shape)
    dtype = str(image.dtype).removeprefix("torch.")
    if isinstance(image, Tensor) and image.ndim == 3 and shape[0] == 3:
        if shape[2] == 3:
            raise InputError(f"an image tensor has shape {list(shape)}, either [3, H, W] or [H, W, 3]; give an array")
        image = image.permute(1, 2, 0)
    if image.ndim != 3 or image.shape[2] != 3 or dtype != "uint8":
        raise InputError(
            f"an image has shape {shape} and dtype {dtype}; it must be HxWx3, uint8; "
            "turn floats from 0 to 1 into bytes with (255 * image).round()"
        )
    height, width, _ = image.shape
    check_size(width, height, "an image array")
    if isinstance(image, Tensor):
        image = image.cpu().numpy()
    return torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1)  # [3, H, W], a copy


def normalise(pixels: Tensor) -> Tensor:
    """Return pixels [N, 3, H, W] uint8 as the vision tower's input, float32 from -1 to 1."""
    return (pixels.float() - 127.5) / 127.5


def check_file(path: str | os.PathLike, name: str, max_bytes: int) -> None:
    """Raise InputError unless `path` is a file of at most `max_bytes`."""
    if not os.path.isfile(path):
        raise InputError(f"{name} is not a file; give the path of a file (network addresses are not opened)")
    size = os.path.getsize(path)
    if size > max_bytes:
        raise InputError(f"{name} has {size:,} bytes; at most {max_bytes:,} are read, so make it smaller first")


@contextlib.contextmanager
def reading(name: str, formats: tuple[str, ...]) -> Iterator[None]:
    """Turn exceptions within the block into an InputError: corrupt bytes can raise nearly anything.

    A lack of memory says nothing about the bytes. But FFmpeg's own MemoryError is about a length that they state.
    """
    try:
        yield
    except PopError:
        raise
    except Exception as error:
        if type(error) is MemoryError:
            raise CacheMemoryError(f"{name} takes more memory than is free; make it smaller") from None
        raise InputError(
            f"{name} is truncated or broken, or not one of {', '.join(formats)} ({reason_of(error)})"
        ) from None


def _from_pillow(image, name: str) -> Tensor:
    from PIL import Image, ImageOps

    check_size(*image.size, name)  # the header has the size, so nothing is decoded yet
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow would clip the values at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InputError(f"{name} has pixels of 32 bits, whose range is unknown; convert them to 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)  # [3, H, W]


def check_size(width: int, height: int, name: str) -> None:
    if not 1 <= width * height <= MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise InputError(
            f"{name} is {width:,} pixels wide and {height:,} high; "
            f"it must have 1 to {MAX_PIXELS:,} pixels and at most {MAX_SIDE:,} a side"
        )
