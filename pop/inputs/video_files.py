"""Videos, and reading their files: the number of frames, the frame rate, and chosen frames one at a time.

PyAV, an optional extra that contains FFmpeg, reads them. A file may come from anybody, so this file takes precautions.
It accepts a few containers and no playlists, which would make FFmpeg open other files and addresses. It checks sizes
before it decodes anything. It holds one frame at a time.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pop.errors import InputError, import_extra
from pop.inputs import images

FORMATS = ("avi", "matroska", "mov")  # FFmpeg's names: WebM is Matroska, MP4 is MOV
MAX_BYTES = 2**33
MAX_FRAMES = 2**20  # nearly five hours at 60 frames per second


@dataclass(frozen=True)
class Video:
    """A video and its frame rate.

    With a rate, the model gets two frames of each second. Without one it gets all frames, and assumes 24 per second as
    the reference does. A file has its own rate. The limits on pixels are those of all frames that the model gets; see
    `pop.Image`.
    """

    frames: object  # an array or tensor of T images, uint8, a list of images of one size, or a path
    fps: float | None = None  # frames per second
    min_pixels: int | None = None
    max_pixels: int | None = None


def measure(path: str | os.PathLike) -> tuple[int, float]:
    """Return the number of frames of a video file and their average rate per second, without decoding them."""
    with _opened(path) as (container, stream, name):
        if not stream.average_rate:
            raise InputError(f"{name} does not state its frames per second; give its frames as a list")
        stored = shown = 0
        for packet in container.demux(stream):
            stored += packet.size > 0
            shown += packet.size > 0 and not packet.is_discard  # an edit list may hide frames that the file has
            if stored > MAX_FRAMES:
                raise InputError(f"{name} has more than {MAX_FRAMES:,} frames; cut it first")
        if stored < stream.frames:
            raise InputError(f"{name} is truncated: it has {stored:,} of {stream.frames:,} frames; give another file")
        return shown, float(stream.average_rate)


def frames(path: str | os.PathLike, wanted: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield the frames whose numbers are `wanted`, an ascending list, as [H, W, 3] uint8 RGB.

    Like the reference, this ignores a rotation that the file asks players for.
    """
    with _opened(path) as (container, stream, name):
        decoded = enumerate(container.decode(stream))
        for index in wanted:
            frame = next((frame for number, frame in decoded if number == index), None)
            if frame is None:
                raise InputError(f"{name} is truncated or broken: frame {index:,} cannot be read; give another file")
            yield frame.to_ndarray(format="rgb24")


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[tuple]:
    """Yield the file's container, its video stream, and its name for error messages."""
    av = import_extra("av", "av", "videos")
    name = f"the video {os.fspath(path)!r:.200}"
    path = os.path.expanduser(path)
    images.check_file(path, name, MAX_BYTES)
    # FFmpeg decodes some frames to identify the file, so it must know the limit when it opens the file.
    limit = {"max_pixels": str(images.MAX_PIXELS)}
    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "", **limit}
    # FFmpeg gets an open file, not a path. So it cannot open any other file.
    with images.reading(name, FORMATS), open(path, "rb") as file, av.open(file, options=options) as container:
        if not container.streams.video:
            raise InputError(f"{name} has no video stream; give a video file")
        stream = container.streams.video[0]
        images.check_size(stream.width, stream.height, f"a frame of {name}")
        stream.codec_context.options = limit  # the size may grow within a file
        stream.thread_type = "AUTO"
        yield container, stream, name
