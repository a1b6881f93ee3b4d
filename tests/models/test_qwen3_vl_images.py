"""Images and videos as Qwen3-VL's tower takes them, against the reference's processors.

The goldens are made by tools/goldens/qwen3_vl.py, the images by tests/support/tiny_images.py.
"""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_images import image, random_bytes

from pop.errors import InputError
from pop.inputs import images
from pop.inputs.images import Video, qwen_image, qwen_video
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


def levels(pixels: torch.Tensor) -> np.ndarray:
    return torch.round(pixels.double() * 127.5 + 127.5).to(torch.uint8).numpy()


def video(name: str) -> np.ndarray:
    frames, height, width, _ = VIDEOS[name]
    return random_bytes(frames * height, width, 3, [*VIDEOS].index(name)).reshape(frames, height, width, 3)


@pytest.mark.parametrize("name", IMAGES)
def test_images_are_the_references(name):
    patches = qwen_image(image(name), SMALL, IMAGE_PIXELS)
    assert patches.grid == tuple(GOLDENS[f"{name}-grid"])
    assert np.array_equal(levels(patches.pixels), GOLDENS[name])
    assert torch.equal(patches.pixels, (torch.from_numpy(GOLDENS[name]).float() - 127.5) / 127.5)
    assert patches.times == ()


def test_an_image_in_the_published_size():
    patches = qwen_image(image("large"), PUBLISHED)
    pixels = levels(patches.pixels)
    where = np.random.RandomState(0).choice(pixels.size, 2000, replace=False)
    assert patches.grid == tuple(GOLDENS["real-grid"])
    assert np.array_equal(pixels.ravel()[where], GOLDENS["real-samples"])
    assert np.array_equal(pixels.sum(1, dtype=np.int64), GOLDENS["real-sums"])


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_are_the_references(name):
    patches = qwen_video(Video(video(name), VIDEOS[name][3]), SMALL, VIDEO_PIXELS)
    assert patches.grid == tuple(GOLDENS[f"video-{name}-grid"])
    assert np.array_equal(levels(patches.pixels), GOLDENS[f"video-{name}"])
    assert patches.times == pytest.approx(GOLDENS[f"video-{name}-times"])
    frames = qwen_video(Video(list(video(name)), VIDEOS[name][3]), SMALL, VIDEO_PIXELS)
    assert torch.equal(frames.pixels, patches.pixels)


@given(st.integers(1, 400), st.integers(1, 400))
def test_images_of_any_size(height, width):
    """Whole squares, within the pixels that are allowed where the shape permits, and the shape about kept."""
    patches = None
    try:
        patches = qwen_image(np.zeros((height, width, 3), np.uint8), SMALL, IMAGE_PIXELS)
    except InputError as error:
        assert "at most 200 times" in str(error)
    assert (patches is None) == (max(height, width) > 200 * min(height, width))
    if patches is None:
        return
    _, rows, columns = patches.grid
    assert rows % 2 == columns % 2 == 0 and patches.pixels.shape == (rows * columns, 96)
    assert rows * columns * 16 >= IMAGE_PIXELS[0]
    if min(rows, columns) > 2:
        assert rows * columns * 16 <= IMAGE_PIXELS[1] or min(height, width) < 8
        assert 0.4 < rows / columns * width / height < 2.5


def test_an_image_of_an_allowed_size_is_cut_into_patches_in_squares():
    """Row by row of squares, and row by row within them; each frame of a patch is the image itself."""
    picture = random_bytes(16, 24, 3, seed=1)
    patches = qwen_image(picture, SMALL, IMAGE_PIXELS)
    assert patches.grid == (1, 4, 6)
    corners = [(y + dy, x + dx) for y in (0, 8) for x in (0, 8, 16) for dy in (0, 4) for dx in (0, 4)]
    for values, (y, x) in zip(levels(patches.pixels), corners, strict=True):
        block = picture[y : y + 4, x : x + 4].transpose(2, 0, 1)  # [3, 4, 4]
        assert np.array_equal(values.reshape(3, 2, 4, 4), np.stack([block, block], axis=1))


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (np.zeros((1, 8, 8, 3), np.uint8), None, "has 1 frames; give at least two"),
        ([], None, "has 0 frames"),
        (np.zeros((8, 8, 3), np.uint8), None, "a video array has shape"),
        (np.zeros((2, 8, 8, 3), np.float32), None, "height x width x 3, uint8"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)], None, "frames differ in size"),
        (b"film.mp4", None, "a video is of type bytes"),
        ("film.mp4", 24, "a video file has a rate of its own"),
        (7, None, "a video is of type int"),
        (np.zeros((2, 8, 8, 3), np.uint8), 0, "fps is 0"),
        (np.zeros((2, 8, 8, 3), np.uint8), float("nan"), "fps is nan"),
        (np.zeros((2, 8, 8, 3), np.uint8), "2", "fps is '2'"),
        (np.zeros((2, 8, 8, 3), np.uint8), 5e-324, "fps is 5e-324; .* from 1e-6"),
        (np.zeros((2, 8, 8, 3), np.uint8), True, "fps is True"),
        (np.zeros((2, 8, 1700, 3), np.uint8), None, "the video is 1700 pixels wide and 8 high"),
    ],
)
def test_what_is_no_video_is_refused(frames, fps, message):
    with pytest.raises(InputError, match=message):
        qwen_video(frames if fps is None else Video(frames, fps), SMALL)


@pytest.mark.parametrize("fps", [Fraction(24000, 1001), np.float32(24), np.int64(24)])
def test_a_rate_is_any_real_number(fps):
    """As what reads videos gives it."""
    frames = np.zeros((9, 8, 8, 3), np.uint8)
    assert qwen_video(Video(frames, fps), SMALL).times == qwen_video(Video(frames, float(fps)), SMALL).times


def test_a_video_of_many_frames_is_thinned_before_it_is_read(monkeypatch):
    """Frames that are not kept are not looked at: they may be large, and on disk."""
    read, load = [], images.load_image
    monkeypatch.setattr(images, "load_image", lambda frame: read.append(frame) or load(frame))
    video = list(np.zeros((90, 8, 8, 3), np.uint8))
    patches = qwen_video(Video(video, 30), SMALL)
    assert len(read) == 6 and patches.grid[0] == 3
    monkeypatch.setattr(images, "VIDEO_FRAMES", (4, 5))
    assert len(qwen_video(Video(video, 30), SMALL).times) == 3
