"""Video files: their frames and rates, and files that are broken, too large or not videos."""

import os
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from support.tiny_images import random_bytes

from pop.errors import InputError, MissingExtra
from pop.inputs import images, qwen3_vl, video_files
from pop.inputs.qwen3_vl import qwen_video
from pop.inputs.video_files import Video
from pop.models.config import Qwen3VisionConfig

SMALL = Qwen3VisionConfig(8, 8, 1, 1, 8, (), patch_size=4)


@pytest.fixture(scope="module")
def av():
    return pytest.importorskip("av", reason="the extra 'videos' is not installed")


def write(av, path, count, rate=8, size=(32, 48), **options):
    """Write a film of `count` noisy frames."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for seed in range(count):
            for packet in stream.encode(av.VideoFrame.from_ndarray(random_bytes(*size, 3, seed), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def decoded(av, path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize(("kind", "count", "rate"), [("mp4", 40, 8), ("mkv", 7, 25), ("avi", 2, 1)])
def test_a_file_is_its_frames_and_its_rate(av, tmp_path, kind, count, rate):
    """It gives the same pixels and times as a pop.Video of its decoded frames with its rate."""
    path = write(av, tmp_path / f"film.{kind}", count, rate)
    film = decoded(av, path)
    assert len(film) == count
    expected = qwen_video(Video(film, fps=rate), SMALL)
    for given in (path, str(path)):
        found = qwen_video(Video(given), SMALL)
        assert found[1] == expected[1] and found[2] == pytest.approx(expected[2])
        assert torch.equal(found[0], expected[0])


# The number of frames, their rate, and the frames that Qwen3VLVideoProcessor.sample_frames of transformers 5.24 keeps.
KEPT = {
    (300, 30): [0, 16, 31, 47, 63, 79, 94, 110, 126, 142, 157, 173, 189, 205, 220, 236, 252, 268, 283, 299],
    (90, 29.97): [0, 18, 36, 53, 71, 89],
    (100, 23.976): [0, 14, 28, 42, 57, 71, 85, 99],
    (31, 60): [0, 10, 20, 30],
    (3, 30): [0, 1, 2],
    (11, 1): list(range(11)),
}


def test_two_frames_a_second_are_kept():
    for (count, rate), kept in KEPT.items():
        assert qwen3_vl._sampled(count, rate) == kept
        assert len(qwen3_vl._sampled(10**6, rate)) == 768


def test_frames_are_held_one_at_a_time(av, tmp_path, notes):
    """Only the sampled frames become arrays."""
    path = write(av, tmp_path / "film.mp4", 40)
    read = notes(images, "load_image", lambda frame: frame.shape)
    assert qwen_video(Video(path), SMALL)[1].frames == 5 and len(read) == 10
    film = video_files.frames(path, [3, 4, 39])
    first = next(film)
    assert np.array_equal(first, decoded(av, path)[3]) and len(list(film)) == 2


def broken(av, folder):
    """Yield files that are not complete videos, and a part of the error message for each."""
    film = write(av, folder / "film.mp4", 30, movflags="faststart")
    for name, content in {
        "empty.mp4": b"",
        "noise.mkv": random_bytes(60, 60, 3, 0).tobytes(),
        "playlist.m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfilm.mp4\n#EXT-X-ENDLIST\n",
        "list.mp4": f"ffconcat version 1.0\nfile {film}\n".encode(),
    }.items():
        (folder / name).write_bytes(content)
        yield folder / name, "truncated or broken, or not one of avi"
    for name, options in {"cut.mp4": {"movflags": "faststart"}, "end-cut.mp4": {}}.items():
        content = write(av, folder / name, 30, **options).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        yield folder / name, "truncated"
    yield write(av, folder / "film.nut", 4), "truncated or broken, or not one of avi"  # FFmpeg itself would read it
    yield "https://example.org/film.mp4", "network addresses are not opened"
    yield folder / "none.mp4", "is not a file"
    yield folder, "is not a file"
    if os.path.exists("/dev/zero"):
        yield "/dev/zero", "is not a file"  # endless
    greedy = write(av, folder / "greedy.mp4", 4)
    content = bytearray(greedy.read_bytes())
    entries = content.index(b"stts") + 8  # how many there are, as the table of times states
    content[entries : entries + 4] = b"\x7f\xff\xff\xff"
    greedy.write_bytes(content)
    yield greedy, "truncated or broken, .* Cannot allocate memory"
    damaged = write(av, folder / "damaged.avi", 30)
    content = bytearray(damaged.read_bytes())
    content[6000:-2000] = bytes(len(content) - 8000)
    damaged.write_bytes(content)
    yield damaged, "is truncated"
    with av.open(str(folder / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    yield folder / "sound.mkv", "has no video stream"
    yield write(av, folder / "one.mp4", 1), "has 1 frames"


def test_broken_files(av, tmp_path):
    for path, message in broken(av, tmp_path):
        with pytest.raises(InputError, match=message) as caught:
            qwen_video(Video(path), SMALL)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_files_that_are_too_large(av, tmp_path, monkeypatch):
    path = write(av, tmp_path / "film.mp4", 12)
    monkeypatch.setattr(video_files, "MAX_FRAMES", 11)
    with pytest.raises(InputError, match="has more than 11 frames"):
        qwen_video(Video(path), SMALL)
    monkeypatch.setattr(video_files, "MAX_BYTES", 100)
    with pytest.raises(InputError, match="bytes; at most 100 are read"):
        qwen_video(Video(path), SMALL)
    monkeypatch.undo()
    monkeypatch.setattr(images, "MAX_PIXELS", 1500)
    with pytest.raises(InputError, match="1 to 1,500 pixels"):
        qwen_video(Video(path), SMALL)


def test_frames_that_an_edit_list_hides_do_not_count(av, tmp_path):
    """The film begins three frames before time 0. FFmpeg decodes them, since later ones need them, and hides them."""
    picture = np.kron(random_bytes(4, 6, 3, 0), np.ones((8, 8, 1), np.uint8))
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
        shifted = [np.ascontiguousarray(np.roll(picture, number, 1)) for number in range(12)]
        packets = [packet for image in shifted for packet in stream.encode(av.VideoFrame.from_ndarray(image))]
        for packet in [*packets, *stream.encode()]:
            packet.pts -= 3
            packet.dts -= 3
            container.mux(packet)
    film = decoded(av, path)
    assert len(film) == 9
    assert video_files.measure(path) == (9, 8.0)
    assert np.array_equal(list(video_files.frames(path, range(9))), film)


def test_a_frame_that_grows_over_the_limit_is_refused(av, tmp_path, monkeypatch):
    """A file states one size, but each of its JPEG pictures has its own."""
    path = tmp_path / "film.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuvj420p"
        for number, size in enumerate([(32, 48), (320, 480)]):
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.height, encoder.width = size
            encoder.pix_fmt = "yuvj420p"
            encoder.time_base = Fraction(1, 8)
            frame = av.VideoFrame.from_ndarray(random_bytes(*size, 3, 0)).reformat(format="yuvj420p")
            frame.pts = number
            for packet in [*encoder.encode(frame), *encoder.encode()]:
                packet.stream = stream
                container.mux(packet)
    assert [frame.shape for frame in video_files.frames(path, [0, 1])] == [(32, 48, 3), (320, 480, 3)]
    monkeypatch.setattr(images, "MAX_PIXELS", 2000)
    with pytest.raises(InputError, match="broken"):
        list(video_files.frames(path, [0, 1]))


def test_without_pyav_a_path_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "film.mp4").write_bytes(b"x")
    with pytest.raises(MissingExtra, match=r"pip install 'pop-prefill\[videos\]'"):
        qwen_video(Video(tmp_path / "film.mp4"), SMALL)
    film = random_bytes(8 * 3, 8, 3, 0).reshape(3, 8, 8, 3)
    assert qwen_video(Video(film, fps=24), SMALL)[1].frames == 2  # arrays do not need PyAV
