"""Qwen3-VL's images and videos: patches, grids and times against the reference's processors."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_images import image, levels, random_bytes

from pop.errors import InputError
from pop.inputs import images
from pop.inputs.qwen3_vl import qwen_image, qwen_video
from pop.inputs.video_files import Video
from pop.models.config import Qwen3VisionConfig

GOLDENS = dict(np.load(Path(__file__).parents[1] / "goldens" / "qwen3_vl" / "images.npz"))
IMAGES = ("tall", "wide", "tiny", "dot", "line", "large", "alpha", "grey")
IMAGE_PIXELS, VIDEO_PIXELS = (300, 1500), (800, 4000)
SMALL = Qwen3VisionConfig(8, 8, 1, 1, 8, (), patch_size=4)
PUBLISHED = Qwen3VisionConfig(1152, 4304, 27, 16, 4096, (8, 16, 24))
# Frames, height, width, and frames per second, as in the tool.
VIDEOS = {
    "odd": (5, 20, 31, None),
    "even": (4, 40, 22, None),
    "narrow": (4, 6, 40, None),
    "long": (13, 25, 25, None),
    "sampled": (40, 16, 24, 8.0),
    "few": (7, 16, 24, 30.0),
    "fewer": (3, 16, 24, 30.0),
}


def video(name: str) -> np.ndarray:
    frames, height, width, _ = VIDEOS[name]
    return random_bytes(frames * height, width, 3, [*VIDEOS].index(name)).reshape(frames, height, width, 3)


@pytest.mark.parametrize("name", IMAGES)
def test_images_are_the_references(name):
    patches, grid = qwen_image(image(name), SMALL, IMAGE_PIXELS)
    assert grid == tuple(GOLDENS[f"{name}-grid"])
    assert torch.equal(patches, (torch.from_numpy(GOLDENS[name]).float() - 127.5) / 127.5)


def test_an_image_in_the_published_size():
    patches, grid = qwen_image(image("large"), PUBLISHED)
    pixels = levels(patches)
    where = np.random.RandomState(0).choice(pixels.size, 2000, replace=False)
    assert grid == tuple(GOLDENS["real-grid"])
    assert np.array_equal(pixels.ravel()[where], GOLDENS["real-samples"])
    assert np.array_equal(pixels.sum(1, dtype=np.int64), GOLDENS["real-sums"])


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_are_the_references(name):
    """Of an array, a list of images, and tensors of either layout. The rate is any real number."""
    film, fps = video(name), VIDEOS[name][3]
    patches, grid, times = qwen_video(Video(film, fps), SMALL, VIDEO_PIXELS)
    assert grid == tuple(GOLDENS[f"video-{name}-grid"])
    assert np.array_equal(levels(patches), GOLDENS[f"video-{name}"])
    assert times == pytest.approx(GOLDENS[f"video-{name}-times"])
    last = torch.from_numpy(film)
    forms = (list(film), last, last.permute(0, 3, 1, 2))
    rates = (Fraction(fps), np.float32(fps), np.int64(fps)) if fps else (None, None, None)
    for form, rate in zip(forms, rates, strict=True):
        found = qwen_video(Video(form, rate), SMALL, VIDEO_PIXELS)
        assert torch.equal(found[0], patches) and found[1:] == (grid, times)


@given(st.integers(1, 400), st.integers(1, 400))
def test_images_of_any_size(height, width):
    """Patches are whole squares, about as many as allowed, and about keep the shape. Very long images are refused."""
    picture = np.zeros((height, width, 3), np.uint8)
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(InputError, match=f"{width} x {height} pixels .* 200 times"):
            qwen_image(picture, SMALL, IMAGE_PIXELS)
        return
    patches, (_, rows, columns) = qwen_image(picture, SMALL, IMAGE_PIXELS)
    assert rows % 2 == columns % 2 == 0 and patches.shape == (rows * columns, 96)
    assert rows * columns * 16 >= IMAGE_PIXELS[0]
    if min(rows, columns) > 2:
        assert rows * columns * 16 <= IMAGE_PIXELS[1] or min(height, width) < 8
        assert 0.4 < rows / columns * width / height < 2.5


FRAMES = np.zeros((2, 8, 8, 3), np.uint8)
INVALID = [
    (FRAMES[:1], None, "has 1 frames"),
    ([], None, "has 0 frames"),
    (FRAMES[0], None, r"shape \(8, 3\)"),
    (torch.zeros(24, 16, 3, dtype=torch.uint8), None, r"shape \(16, 3\)"),
    ([FRAMES[0], np.zeros((8, 9, 3), np.uint8)], None, r"\(3, 8, 8\) and \(3, 8, 9\)"),
    (b"film.mp4", None, "type bytes"),
    ("film.mp4", 24, "fps is 24"),
    (FRAMES, 0, "fps is 0"),
    (FRAMES, float("nan"), "fps is nan"),
    (FRAMES, 5e-324, "fps is 5e-324; .* from 1e-6"),
    (np.zeros((2, 8, 1700, 3), np.uint8), None, "1700 x 8 pixels"),
]


def test_invalid_videos_and_sizes():
    for frames, fps, message in INVALID:
        with pytest.raises(InputError, match=message):
            qwen_video(Video(frames, fps), SMALL)
    with pytest.raises(InputError, match="1 to 67,108,864 pixels"):
        qwen_image(FRAMES[0], SMALL, (2**31, 2**31))


def test_a_video_of_many_frames_is_sampled_before_it_is_read(notes):
    """Frames may be large files, so the others are never read."""
    read = notes(images, "load_image", lambda frame: frame.shape)
    video = list(np.zeros((90, 8, 8, 3), np.uint8))
    _, grid, _ = qwen_video(Video(video, 30), SMALL)
    assert len(read) == 6 and grid.frames == 3
