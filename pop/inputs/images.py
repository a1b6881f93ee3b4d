"""Reading images: a path, a PIL image or an array becomes RGB bytes, upright and without transparency.

A file may come from anybody, and one of a few kilobytes may claim billions of pixels. So this file checks the sizes
before it decodes anything. Pillow, an optional extra, reads files; arrays do not need it.
"""

import contextlib
import importlib
import os
from collections.abc import Iterator

import numpy as np
import torch

from pop.errors import InputError, MissingExtra, PopError

MAX_PIXELS = 2**26  # 67 megapixels, 0.2 GB in RGB
MAX_SIDE = 2**16  # an image is resized along one side first, so a very long one would need much memory
MAX_BYTES = 2**29  # of a file
# Pillow knows more formats. Some of its readers run other programs (EPS), and most are rarely used and tested.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def load_image(image) -> torch.Tensor:
    """Return a file in one of FORMATS, a PIL image or an HxWx3 uint8 array as RGB, [3, H, W] uint8 on the CPU.

    Transparent pixels show a white background, as in the reference's `convert_to_rgb`. Of 16 bits, the high 8 are
    kept. Colour profiles are ignored, and the EXIF orientation is applied. Of several frames the first is read.
    """
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise InputError(f"an image array has shape {image.shape} and dtype {image.dtype}; it must be HxWx3, uint8")
        _check_size(image.shape[1], image.shape[0], "an image array")
        return torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1)  # [3, H, W], a copy
    pillow = import_extra("PIL.Image", "pillow", "images")
    name = "a PIL image" if isinstance(image, pillow.Image) else f"the image {str(image)!r:.200}"
    with reading(name, FORMATS):
        if isinstance(image, pillow.Image):
            return _from_pillow(image, name)
        if not isinstance(image, (str, os.PathLike)):
            raise InputError(f"an image is of type {type(image).__name__}; give a path, a PIL image or an HxWx3 array")
        check_file(image, name, MAX_BYTES)
        with pillow.open(image, formats=FORMATS) as opened:  # refuses an image with more than 178 megapixels
            return _from_pillow(opened, name)


def import_extra(module: str, package: str, extra: str):
    """Import a module of an optional package. Raises MissingExtra with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingExtra(f"this needs the package {package}; run `pip install 'pop-prefill[{extra}]'`") from None


def check_file(path: str | os.PathLike, name: str, max_bytes: int) -> None:
    """Raise InputError unless `path` is a file of at most `max_bytes`."""
    if not os.path.isfile(path):
        raise InputError(f"{name} is not a file; give the path of a file")
    if (size := os.path.getsize(path)) > max_bytes:
        raise InputError(f"{name} has {size:,} bytes; at most {max_bytes:,} are read, so make it smaller first")


@contextlib.contextmanager
def reading(name: str, formats: tuple[str, ...]) -> Iterator[None]:
    """Turn every exception within the block into an InputError: corrupt bytes can raise nearly anything."""
    try:
        yield
    except PopError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        known = ", ".join(formats)
        raise InputError(f"{name} is truncated or broken, or not one of {known} ({reason:.200})") from None


def _from_pillow(image, name: str) -> torch.Tensor:
    from PIL import Image, ImageOps

    _check_size(*image.size, name)  # the header has the size, so nothing is decoded yet
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow would clip the values at 255
        values, transparent = np.asarray(image), image.info.get("transparency", -1)
        image = Image.fromarray(np.where(values == transparent, 255, values >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InputError(f"{name} has pixels of 32 bits, whose range is unknown; convert them to 8 bits")
    if {"A", "a"} & {*image.getbands()} or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)  # [3, H, W]


def _check_size(width: int, height: int, name: str) -> None:
    if not 1 <= width * height <= MAX_PIXELS or max(width, height) > MAX_SIDE:
        limits = f"1 to {MAX_PIXELS:,} pixels and at most {MAX_SIDE:,} a side"
        raise InputError(f"{name} is {width:,} pixels wide and {height:,} high; it must have {limits}")
