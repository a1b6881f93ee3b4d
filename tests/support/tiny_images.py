"""Small images from seeds, for the tests and for the tools that make goldens with the same images."""

from __future__ import annotations

import numpy as np
import torch

from pop.models.images import Images

# The golden images: mode, width and height. They are taller, wider, smaller and larger than their resized versions.
IMAGES = {
    "tall": ("RGB", 17, 83),
    "wide": ("RGB", 97, 31),
    "tiny": ("RGB", 3, 2),
    "dot": ("RGB", 1, 1),
    "line": ("RGB", 1, 150),
    "large": ("RGB", 211, 149),
    "alpha": ("RGBA", 40, 61),
    "grey-alpha": ("LA", 33, 20),
    "palette": ("P", 45, 52),
    "palette-transparent": ("P", 45, 52),
    "grey": ("L", 64, 29),
    "one-bit": ("1", 50, 50),
    "cmyk": ("CMYK", 37, 44),
}
BANDS = {"RGB": 3, "RGBA": 4, "LA": 2, "P": 1, "L": 1, "1": 1, "CMYK": 4}


def random_bytes(height: int, width: int, bands: int, seed: int) -> np.ndarray:
    """[height, width, bands] uint8: slow waves, so that crops differ, and noise, so that every pixel matters."""
    random = np.random.RandomState(seed)
    rows, columns = np.mgrid[:height, :width]
    planes = []
    for _ in range(bands):
        fx, fy, phase = random.uniform(1, 9, 3)
        planes.append(120 + 80 * np.sin(fx * columns / width + fy * rows / height + phase))
    return (np.stack(planes, -1) + random.randint(-50, 56, (height, width, bands))).astype(np.uint8)


def image(name: str):
    """The golden image of that name, as a PIL.Image."""
    from PIL import Image  # an optional package

    mode, width, height = IMAGES[name]
    values = random_bytes(height, width, BANDS[mode], seed=sorted(IMAGES).index(name))
    if mode == "1":
        return Image.fromarray(values[:, :, 0]).point(lambda value: 255 * (value > 120), mode="1")
    picture = Image.frombytes(mode, (width, height), values.tobytes())
    if mode == "P":
        picture.putpalette(np.random.RandomState(5).randint(0, 256, 768).tolist())
    if name == "palette-transparent":  # an alpha for each of its colours
        picture.info["transparency"] = bytes(np.random.RandomState(6).randint(0, 256, 256).tolist())
    return picture


def picture(size: int, seed: int) -> np.ndarray:
    """[size, size, 3] uint8: an image that needs no resizing."""
    return random_bytes(size, size, 3, seed)


def levels(pixels: torch.Tensor) -> np.ndarray:
    """Prepared pixels from -1 to 1 -> the bytes that they come from."""
    return (pixels.double() * 127.5 + 127.5).round().to(torch.uint8).numpy()


def both_ways(features: torch.Tensor, numbers: torch.Tensor) -> Images:
    """Images as Gemma-3 has them, features [N, M, D]: the tokens of one attend each other in both directions."""
    M = features.shape[1]
    return Images(features.flatten(0, 1), numbers, look_ahead=(M - 1 - numbers % M).where(numbers >= 0, 0))


def pixels_of(image: np.ndarray) -> torch.Tensor:
    """[H, W, 3] uint8 -> the vision tower's input, [3, H, W] float32."""
    return (torch.from_numpy(image).permute(2, 0, 1).float() - 127.5) / 127.5
