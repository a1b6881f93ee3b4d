"""Reading video files: how many frames one has and at what rate, and chosen frames one at a time.

PyAV, an optional extra that contains FFmpeg, reads them. A file may come from anybody, so this file takes precautions.
It accepts a few containers and no playlists, which would make FFmpeg open other files and addresses. It checks sizes
before it decodes anything. It holds one frame at a time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import numpy as np

from pop.errors import InputError, MissingExtra
from pop.inputs.images import check_file, reading

FORMATS = ("avi", "matroska", "mov")  # FFmpeg's names: WebM is Matroska, MP4 is MOV
MAX_BYTES = 2**33
MAX_FRAMES = 2**20  # nearly five hours at 60 frames per second


def measure(path: str | os.PathLike, max_pixels: int) -> tuple[int, float]:
    """Count the frames of a video file, without decoding them.

    Args:
        path: a file in one of FORMATS.
        max_pixels: the most pixels that a frame may have.

    Returns:
        The number of frames, and the average number of frames per second.

    Raises:
        InputError: the file is missing, broken, truncated or too large, or has no video.
        MissingExtra: PyAV is not installed.
    """
    with _opened(path, max_pixels) as (container, stream, name):
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


def frames(path: str | os.PathLike, wanted: Sequence[int], max_pixels: int) -> Iterator[np.ndarray]:
    """Yield the frames with these numbers.

    A rotation that the file asks players for is not applied. The reference ignores it, too.

    Args:
        path: a file in one of FORMATS.
        wanted: numbers of frames in ascending order, without repetitions.
        max_pixels: the most pixels that a frame may have.

    Yields:
        [H, W, 3] uint8 RGB for each frame.

    Raises:
        InputError, MissingExtra: as `measure`.
    """
    left = list(reversed(wanted))
    with _opened(path, max_pixels) as (container, stream, name):
        for number, frame in enumerate(container.decode(stream)):
            if number == left[-1]:
                yield frame.to_ndarray(format="rgb24")
                left.pop()
            if not left:
                return
        raise InputError(f"{name} is truncated or broken: frame {left[-1]:,} cannot be read; give another file")


@contextlib.contextmanager
def _opened(path: str | os.PathLike, max_pixels: int) -> Iterator[tuple]:
    """Yield the file's container, its video stream, and its name for error messages."""
    try:
        import av
    except ImportError:
        raise MissingExtra("a video file needs the package av; run `pip install 'pop-prefill[videos]'`") from None
    name = f"the video {os.fspath(path)!r:.200}"
    check_file(path, name, MAX_BYTES)
    # FFmpeg decodes some frames to identify the file, so it must know the limit when it opens the file.
    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "", "max_pixels": str(max_pixels)}
    # FFmpeg gets an open file, not a path. So it cannot open any other file.
    with reading(name, FORMATS), open(path, "rb") as file, av.open(file, options=options) as container:
        if not container.streams.video:
            raise InputError(f"{name} has no video stream; give a video file")
        stream = container.streams.video[0]
        if not 0 < stream.width * stream.height <= max_pixels:
            raise InputError(f"the frames of {name} have more than {max_pixels:,} pixels, or none; make them smaller")
        stream.codec_context.options = {"max_pixels": str(max_pixels)}  # the size may grow within a file
        stream.thread_type = "AUTO"
        yield container, stream, name
