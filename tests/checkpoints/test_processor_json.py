"""Processor files: what the reference's processors make of them, and files that are wrong."""

import contextlib
import json

import numpy as np
import pytest
from support.goldens import REFUSED
from support.text import GOLDENS
from support.tiny import tiny_config, tiny_gemma3_vl_config, tiny_qwen3_vl_config
from support.tiny_images import random_bytes

from pop.checkpoints.processor_json import read_limits
from pop.errors import ConfigError, PopError
from pop.inputs import qwen3_vl
from pop.inputs.processors import processor_of
from pop.inputs.video_files import Video
from pop.models.config import Qwen3VisionConfig, SiglipConfig

CASES = json.loads((GOLDENS.parent / "processors.json").read_bytes())["cases"]
QWEN = tiny_qwen3_vl_config()
GEMMA = tiny_gemma3_vl_config(vision=SiglipConfig(24, 36, 2, 3, 28, 7, tokens_per_image=4))
IMAGES, VIDEOS, ALL = "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"


def write(folder, files):
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def case(name, folder):
    """The config, and the kind and the image or video of a golden case, whose files are written to the folder."""
    golden = CASES[name]
    write(folder, golden["files"])
    frames, height, width, fps = golden["given"] if len(golden["given"]) == 4 else (1, *golden["given"], None)
    given = random_bytes(frames * height, width, 3, golden["seed"]).reshape(frames, height, width, 3)
    kind, given = ("image", given[0]) if fps is None else ("video", Video(given, fps))
    return GEMMA if name.startswith("gemma") else QWEN, kind, given


@pytest.mark.parametrize("name", CASES)
def test_prepared_as_the_reference_does_with_the_same_files(name, tmp_path):
    golden = CASES[name]
    config, kind, given = case(name, tmp_path)
    found = processor_of(config, read_limits(tmp_path, config)).prepare(kind, given)
    assert list(found.pixels.shape) == golden["shape"]
    if found.grid is not None:
        assert list(found.grid) == golden["grid"]
    if kind == "video":
        assert [piece for piece in found.pieces if isinstance(piece, str)] == golden["times"]
    where = np.random.RandomState(golden["seed"]).choice(found.pixels.numel(), len(golden["millionths"]), replace=False)
    samples = found.pixels.numpy().ravel()[where].astype(np.float64)
    assert np.abs(samples * 1e6 - golden["millionths"]).max() <= 1
    assert found.pixels.double().sum().item() == pytest.approx(golden["sum"], abs=1e-6 * found.pixels.numel())


HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def test_qwens_published_files_say_what_a_folder_without_files_gets(tmp_path):
    """The fields of Qwen/Qwen3-VL-8B-Instruct."""
    both = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "processor_class": "Qwen3VLProcessor"} | HALF
    images = both | {"image_processor_type": "Qwen2VLImageProcessorFast"}
    images["size"] = {"longest_edge": 16777216, "shortest_edge": 65536}
    videos = both | {"video_processor_type": "Qwen3VLVideoProcessor"}
    videos["size"] = {"longest_edge": 25165824, "shortest_edge": 4096}
    config = tiny_qwen3_vl_config(vision=Qwen3VisionConfig(24, 40, 4, 3, 30, (1, 3)))
    assert read_limits(tmp_path, config) == {}
    assert read_limits(write(tmp_path, {IMAGES: images, VIDEOS: videos}), config) == qwen3_vl.PUBLISHED


def test_gemmas_published_files_are_read(tmp_path):
    """The fields of google/gemma-3-4b-it."""
    images = HALF | {"do_convert_rgb": None, "do_normalize": True, "do_pan_and_scan": None, "do_rescale": True}
    images |= {"do_resize": True, "image_processor_type": "Gemma3ImageProcessor", "image_seq_length": 256}
    images |= {"pan_and_scan_max_num_crops": None, "pan_and_scan_min_crop_size": None, "resample": 2}
    images |= {"rescale_factor": 0.00392156862745098, "size": {"height": 896, "width": 896}}
    config = tiny_gemma3_vl_config(vision=SiglipConfig(24, 36, 2, 3, 896, 14))
    files = {IMAGES: images, ALL: {"image_seq_length": 256, "processor_class": "Gemma3Processor"}}
    assert read_limits(write(tmp_path, files), config) == {"image": None}


def test_text_models_read_none(tmp_path):
    write(tmp_path, {IMAGES: "{", ALL: "["})
    assert read_limits(tmp_path, tiny_config()) == {}


# A case, its file, and a field that is not supported or wrong. A null is a field that is missing.
@pytest.mark.parametrize(("name", "file", "field", "value"), REFUSED["fields of processor files"])
def test_what_is_wrong_or_not_supported_is_refused_by_name(name, file, field, value, tmp_path):
    config, *_ = case(name, tmp_path)
    write(tmp_path, {file: CASES[name]["files"][file] | {field: value}})
    with pytest.raises(ConfigError, match=rf"{file}: .*{field}.*; correct the file, or remove it"):
        read_limits(tmp_path, config)


WRONG = [-1, 0, 1, 1.5, 2**31, 10**400, 1e300, -1e300, True, False, "", "x", [], {}, [1, 2, 3], [[]], {"a": {}}]


def mutated(content):
    """Yield the name of each field, at any depth, and the content with a wrong value there."""
    for field, value in content.items():
        yield from ((field, content | {field: wrong}) for wrong in WRONG)
        if isinstance(value, dict):
            yield from ((inner, content | {field: changed}) for inner, changed in mutated(value))


@pytest.mark.parametrize("name", ["image-pixels", "image-combined", "video-size", "video-combined", "gemma"])
def test_mutated_files_raise_nothing_but_errors_that_name_file_and_field(name, tmp_path):
    """If a mutated file can be read, then an image or a video can be prepared, or is refused."""
    config, kind, given = case(name, tmp_path)
    absent = dict.fromkeys(
        ("do_resize", "min_pixels", "max_pixels", "fps", "max_frames", "do_sample_frames", "resample")
    )
    refused = 0
    for file, content in CASES[name]["files"].items():
        for field, changed in mutated(absent | content):
            write(tmp_path, {file: changed})
            try:
                limits = read_limits(tmp_path, config)
            except ConfigError as error:
                assert file in str(error) and field in str(error)
                refused += 1
            else:
                with contextlib.suppress(PopError):
                    processor_of(config, limits).prepare(kind, given)
        write(tmp_path, {file: content})
    assert refused > 50
