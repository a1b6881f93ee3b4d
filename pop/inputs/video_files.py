"""Video files: how many frames one has and at what rate, and those that are wanted, one after the other.

PyAV reads them, an optional extra that brings FFmpeg along. A file may come from anybody. So a few containers are read
and no playlists, which would have FFmpeg open other files and addresses; sizes are looked at before anything is
decoded; and no more than a frame is held.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import numpy as np

from pop.errors import InputError, MissingExtra, PopError

FORMATS = ("avi", "matroska", "mov")  # FFmpeg's names; WebM is Matroska, MP4 is MOV
MAX_BYTES = 2**33
MAX_FRAMES = 2**20  # nearly five hours at 60 a second


def measure(path: str | os.PathLike, max_pixels: int) -> tuple[int, float]:
    """How many frames a video file has, and its frames per second on average. Nothing is decoded.

    max_pixels: the most that a frame may have. Raises InputError for a file that is missing, empty, broken, truncated,
    too large, or no video; MissingExtra where PyAV is not installed.
    """
    with _opened(path, max_pixels) as (container, stream, name):
        if not stream.average_rate:
            raise InputError(f"{name} does not say how many frames it has a second; give its frames as a list")
        stored = shown = 0
        for packet in container.demux(stream):
            stored += packet.size > 0
            shown += packet.size > 0 and not packet.is_discard  # cut out of the film, but still in the file
            if stored > MAX_FRAMES:
                raise InputError(f"{name} has more than {MAX_FRAMES:,} frames; cut it first")
        if stored < stream.frames:
            raise InputError(
                f"{name} is truncated: {stored:,} of {stream.frames:,} frames are there; give another file"
            )
        return shown, float(stream.average_rate)


def frames(path: str | os.PathLike, wanted: Sequence[int], max_pixels: int) -> Iterator[np.ndarray]:
    """The frames of these numbers, ascending and each of them once: [H, W, 3] uint8 RGB each, as they are stored.

    A rotation that the file asks players for is not applied, as the reference does not. Raises as `measure`.
    """
    left = list(reversed(wanted))
    with _opened(path, max_pixels) as (container, stream, name):
        for number, frame in enumerate(container.decode(stream)):
            if number == left[-1]:
                yield frame.to_ndarray(format="rgb24")
                left.pop()
            if not left:
                return
        raise InputError(f"{name} is truncated or broken: its frame {left[-1]:,} cannot be read; give another file")


@contextlib.contextmanager
def _opened(path: str | os.PathLike, max_pixels: int) -> Iterator[tuple]:
    """The file's container, its video stream, and its name in errors."""
    try:
        import av
    except ImportError:
        raise MissingExtra("a video file needs the package av; run `pip install 'pop-prefill[videos]'`") from None
    name = f"the video {os.fspath(path)!r:.200}"
    if not os.path.isfile(path):
        raise InputError(f"{name} is no file; give the path of a video file")
    if (size := os.path.getsize(path)) > MAX_BYTES:
        raise InputError(f"{name} has {size:,} bytes, and at most {MAX_BYTES:,} are read; make it smaller first")
    # FFmpeg itself refuses larger frames: it decodes some to find out what the file is.
    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "", "max_pixels": str(max_pixels)}
    try:
        # An open file, not its name: FFmpeg has no way to open another one.
        with open(path, "rb") as file, av.open(file, options=options) as container:
            if not container.streams.video:
                raise InputError(f"{name} has no pictures; give a video file")
            stream = container.streams.video[0]
            if not 0 < stream.width * stream.height <= max_pixels:
                raise InputError(
                    f"{name} has frames of more than {max_pixels:,} pixels, or of none; make them smaller first"
                )
            stream.codec_context.options = {"max_pixels": str(max_pixels)}  # here, too: it may grow on the way
            stream.thread_type = "AUTO"
            yield container, stream, name
    except PopError:
        raise
    except Exception as error:  # corrupt bytes can raise nearly anything
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise InputError(
            f"{name} is truncated or broken, or no {', '.join(FORMATS)} ({reason:.200}); give another file"
        ) from None
