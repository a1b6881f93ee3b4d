"""Reading images: every kind of file and array, and the errors for files that are broken or too large."""

import io
import os
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from support.tiny_images import image, random_bytes

from pop.errors import CacheMemoryError, InputError, MissingExtra
from pop.inputs import images
from pop.inputs.images import FORMATS, load_image


def channels_first(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


def saved(picture: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_arrays_and_tensors_are_taken_as_they_are():
    picture = random_bytes(7, 9, 3, seed=1)
    expected = channels_first(picture)
    last = torch.from_numpy(picture)
    arrays = [picture, picture[::-1][::-1], np.asfortranarray(picture), np.asarray(Image.fromarray(picture))]
    tensors = [last, last.permute(2, 0, 1), last.permute(2, 0, 1).contiguous(), last.flip(0).flip(0)]
    for form in (*arrays, *tensors):
        loaded = load_image(form)
        assert loaded.dtype == torch.uint8 and torch.equal(loaded, expected)
    loaded = [load_image(picture), load_image(last)]
    picture[:] = 0
    assert all(one.any() for one in loaded), "it shares the caller's memory"


def test_files(tmp_path):
    picture = random_bytes(11, 6, 3, seed=2)
    for format in ("PNG", "BMP", "TIFF", "PPM", "WEBP"):
        options = {"lossless": True} if format == "WEBP" else {}
        content = saved(Image.fromarray(picture), format, **options)
        path = write(tmp_path / "image", content)
        for form in (path, str(path), content, bytearray(content)):
            assert torch.equal(load_image(form), channels_first(picture))
    picture = np.repeat(np.repeat(random_bytes(2, 3, 3, seed=3), 16, 0), 16, 1)
    path = write(tmp_path / "image.jpg", saved(Image.fromarray(picture), "JPEG", quality=100, subsampling=0))
    assert (load_image(path).int() - channels_first(picture).int()).abs().max() <= 2  # flat blocks, rounded twice


# How each EXIF orientation changes an upright image [H, W, 3].
ORIENTATIONS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x, -1),
}


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_exif_orientation(tmp_path, format):
    upright = random_bytes(5, 8, 3, seed=4)
    for orientation, turn in ORIENTATIONS.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = saved(Image.fromarray(np.ascontiguousarray(turn(upright))), format, exif=exif)
        for form in (write(tmp_path / "image", content), Image.open(io.BytesIO(content))):
            assert torch.equal(load_image(form), channels_first(upright))


def test_transparent_pixels_show_white(tmp_path):
    """In every mode, and the same from a file."""
    picture = Image.new("RGBA", (3, 1))
    picture.putdata([(10, 10, 10, 0), (10, 10, 10, 255), (10, 10, 10, 51)])
    palette = Image.merge("PA", (Image.new("P", (3, 1), 10), picture.getchannel("A")))
    palette.putpalette([value for value in range(256) for _ in "RGB"])
    for one in (picture, picture.convert("LA"), palette):
        assert load_image(one).squeeze(1).T.tolist() == [[255] * 3, [10] * 3, [206] * 3]  # 206 = 0.2 * 10 + 0.8 * 255
    for name in ("alpha", "grey-alpha", "palette-transparent"):
        path = write(tmp_path / name, saved(image(name), "PNG"))
        assert torch.equal(load_image(path), load_image(image(name))), name
    picture = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))  # one colour declared transparent
    path = write(tmp_path / "colour-key", saved(picture, "PNG", transparency=(4, 5, 6)))
    assert load_image(path).squeeze(1).T.tolist() == [[1, 2, 3], [255, 255, 255]]


def test_unusual_modes(tmp_path):
    """The upper eight of sixteen bits, also in colour and in another byte order, and colours times their alpha."""
    values = np.array([[0, 255, 256, 0x8000, 0xFFFF]], np.uint16)
    for format in ("PNG", "TIFF"):
        path = write(tmp_path / "grey", saved(Image.fromarray(values), format))
        assert load_image(path)[1, 0].tolist() == [0, 0, 1, 0x80, 0xFF]
    rows = b"\0" + struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0xFFFF, 0x00FF, 0x0100)
    path = write(tmp_path / "colour.png", png(2, 1, rows, depth=16, colour=2))
    assert load_image(path).squeeze(1).T.tolist() == [[0x12, 0x56, 0x9A], [0xFF, 0x00, 0x01]]
    picture = Image.frombytes("I;16B", (2, 1), bytes([0x12, 0x34, 0xFF, 0x00]))
    assert load_image(picture)[0, 0].tolist() == [0x12, 0xFF]
    picture = Image.new("RGBA", (2, 1), (200, 100, 0, 0))
    picture.putpixel((1, 0), (200, 100, 0, 255))
    assert load_image(picture.convert("RGBa")).squeeze(1).T.tolist() == [[255, 255, 255], [200, 100, 0]]


def test_photos_with_several_pictures_or_broken_tags(tmp_path):
    """The first picture counts: phones write MPO files and call them JPEG. Broken tags are ignored."""
    first = Image.new("RGB", (8, 6), (255, 0, 0))
    second = Image.new("RGB", (8, 6), (0, 0, 255))
    for format in ("MPO", "GIF"):
        path = write(tmp_path / "photo.jpg", saved(first, format, save_all=True, append_images=[second]))
        loaded = load_image(path)
        assert loaded.shape == (3, 6, 8) and loaded[0].min() > 240 and loaded[2].max() < 15
    for orientation in (None, 0, 9, 65535):
        exif = Image.Exif()
        exif[0x0112] = orientation
        tags = b"Exif\0\0" + b"\xff" * 50 if orientation is None else exif
        assert load_image(write(tmp_path / "photo.jpg", saved(first, "JPEG", exif=tags))).shape == (3, 6, 8)


def test_what_is_no_image_is_refused():
    for other in (None, 3, [[1, 2]], memoryview(b"x"), io.StringIO("x")):
        refused(other, f"type {type(other).__name__}")
    for shape, dtype in (((8, 8, 3), torch.float32), ((8, 8, 3), torch.int64), ((8, 8), torch.uint8)):
        tensor = torch.zeros(shape, dtype=dtype)
        for form in (tensor, tensor.numpy()):
            refused(form, f"{re.escape(str(shape))} and dtype {str(dtype).removeprefix('torch.')}")
    for other, named in (
        (torch.zeros(3, 8, 8, dtype=torch.bfloat16), "dtype bfloat16"),  # numpy does not know it
        (torch.zeros(3, 8, 3, dtype=torch.uint8), r"shape \[3, 8, 3\]"),  # either layout; an array has one
        (torch.zeros(3, 8, 8, dtype=torch.uint8, device="meta"), "image of type Tensor is .*broken"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \(3, 8, 8\)"),
        (Image.new("RGB", (0, 4)), "0 pixels wide and 4 high"),
        (Image.new("I", (4, 4)), "32 bits"),
    ):
        refused(other, named)


# ---- errors ----


def png(width: int, height: int, rows: bytes, depth: int = 8, colour: int = 0) -> bytes:
    """A PNG file with this header and these rows, even if they are too few."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def refused(given, pattern: str) -> None:
    with pytest.raises(InputError, match=pattern) as caught:
        load_image(given)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("width", "height"),
    [(8193, 8192), (60_000, 60_000), (2**31 - 1, 2**31 - 1), (2**16 + 1, 1), (1, 10**6)],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_by_their_header(tmp_path, monkeypatch, width, height):
    def never(self, *args):
        raise AssertionError("decoded before its size was checked")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    path = write(tmp_path / "bomb.png", png(width, height, b"\0" * 100_000))
    for form in (path, path.read_bytes()):
        refused(form, f"{width:,} pixels wide|{width * height} pixels")
    if width * height < 2**27:  # Pillow itself refuses to open the others
        refused(Image.open(path), "pixels wide")
    with monkeypatch.context() as patch:
        patch.setattr("warnings.filters", [("error", None, Warning, None, 0)])
        refused(path, f"{width:,} pixels wide|{width * height} pixels")


def test_the_largest_that_is_read(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 60)
    monkeypatch.setattr(images, "MAX_SIDE", 20)
    for height, width in ((6, 10), (2, 20), (20, 1), (61, 1), (7, 9), (1, 21)):
        array = random_bytes(height, width, 3, 0)
        for form in (array, torch.from_numpy(array), Image.new("L", (width, height))):
            if height * width <= 60 and max(height, width) <= 20:
                assert load_image(form).shape == (3, height, width)
            else:
                refused(form, "1 to 60 pixels and at most 20 a side")


def test_files_of_many_bytes_are_refused_unread(tmp_path, monkeypatch):
    path = write(tmp_path / "long.webp", saved(Image.new("RGB", (4, 4)), "WEBP"))
    size = path.stat().st_size
    monkeypatch.setattr(images, "MAX_BYTES", size)
    assert load_image(path).shape == (3, 4, 4)
    os.truncate(path, size + 1)
    monkeypatch.setattr(Image, "open", None)
    refused(path, f"has {size + 1} bytes; at most {size} are read")


def test_truncated_files(tmp_path):
    for format in FORMATS:
        whole = saved(Image.fromarray(random_bytes(64, 64, 3, seed=7)), format)
        for size in (0, 1, 10, len(whole) // 2, len(whole) * 3 // 4):
            for form in (write(tmp_path / "image", whole[:size]), whole[:size]):
                refused(form, "broken")


def test_other_files_are_refused(tmp_path):
    refused(write(tmp_path / "a.txt", b"not an image"), "not one of .*BMP.*GIF")
    refused(write(tmp_path / "a.eps", saved(Image.new("RGB", (4, 4)), "EPS")), "not one of .*BMP.*GIF")
    refused(tmp_path / "missing.png", "missing.png' is not a file")
    refused(tmp_path, "is not a file")
    for address in ("https://example.org/image.png", "HTTP://example.org/image.png"):
        refused(address, "is not a file.*network addresses are not opened")
    refused("a\0b", "is not a file|truncated or broken")


def test_a_lack_of_memory_is_not_a_broken_file(tmp_path, monkeypatch):
    def lacking(*args):
        raise MemoryError

    path = write(tmp_path / "image.png", saved(Image.new("RGB", (4, 4)), "PNG"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lacking)
    with pytest.raises(CacheMemoryError, match="image.png' takes more memory than is free"):
        load_image(path)


def test_without_pillow_arrays_work_and_files_need_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    picture = random_bytes(7, 9, 3, seed=1)
    assert torch.equal(load_image(picture), channels_first(picture))
    with pytest.raises(MissingExtra, match=r"pip install 'pop-prefill\[images\]'"):
        load_image(write(tmp_path / "image.png", b""))


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (2, 3)).save(tmp_path / "a.png")
    assert load_image("~/a.png").shape == (3, 3, 2)


def test_pixels_are_float32_whatever_the_callers_default_is():
    pixels = torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2)
    expected = images.normalise(pixels)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert torch.equal(images.normalise(pixels), expected)
    finally:
        torch.set_default_dtype(default)
    assert expected.dtype == torch.float32
