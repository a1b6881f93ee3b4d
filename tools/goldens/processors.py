"""Make the golden file of processor configs with the reference implementation, transformers.

    PYTHONPATH=tests python -m tools.goldens.processors

Makes tests/goldens/processors.json: processor files in every dialect, and how the processors that the reference loads
from them prepare a random image or video. Needs transformers and torchvision.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from support.tiny_images import random_bytes

from tools.goldens import files
from tools.goldens.files import MISSING, write_json

try:
    import torchvision
    import transformers
    from transformers.models.gemma3.image_processing_gemma3 import Gemma3ImageProcessor
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
    from transformers.video_utils import VideoMetadata

    from tools.goldens.gemma3_vision import processor_with_words
except ImportError:
    sys.exit(MISSING.format("transformers and torchvision"))

MADE_WITH = f"transformers {transformers.__version__}, torchvision {torchvision.__version__}"
SAMPLES = 24  # values that are kept of each image or video, with the sum of all

PATCHES = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}  # of the tiny model in tests/support
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
QWEN = PATCHES | HALF | {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor"}
SAMPLED = {"do_sample_frames": True, "fps": 2, "min_frames": 4, "max_frames": 768, "rescale_factor": 1 / 255}
FILM = PATCHES | HALF | {"video_processor_type": "Qwen3VLVideoProcessor"}
GEMMA = HALF | {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 28, "width": 28}}
IMAGES, VIDEOS, ALL = "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"


def size(least: int, most: int) -> dict:
    return {"size": {"shortest_edge": least, "longest_edge": most}}


# The files of a folder, and what is prepared: an image of a height and width, or a video of frames, height, width and
# frames per second.
CASES = {
    "image-size": ({IMAGES: QWEN | size(300, 1500)}, (50, 83)),
    "image-pixels": ({IMAGES: QWEN | {"min_pixels": 4000, "max_pixels": 9000, "do_convert_rgb": False}}, (20, 31)),
    "image-pixels-over-size": ({IMAGES: QWEN | size(5, 99) | {"max_pixels": 900}}, (61, 40)),
    "image-limits-crossed": ({IMAGES: QWEN | size(4000, 1000)}, (61, 40)),
    "image-combined": ({ALL: {"image_processor": QWEN | size(64, 700)}, IMAGES: QWEN | size(9000, 9000)}, (50, 83)),
    "image-not-in-combined": ({ALL: {"processor_class": "x"}, IMAGES: QWEN | size(64, 700)}, (50, 83)),
    "video-size": ({VIDEOS: FILM | size(800, 4000)}, (13, 25, 33, 24.0)),
    "video-pixels-ignored": ({VIDEOS: FILM | size(800, 4000) | {"max_pixels": 100}}, (5, 25, 33, 24.0)),
    "video-combined": ({ALL: {"video_processor": FILM | SAMPLED | size(80, 2000)}}, (30, 16, 24, 8.0)),
    "gemma": ({IMAGES: GEMMA | {"resample": 2, "do_convert_rgb": None}, ALL: {"image_seq_length": 4}}, (90, 31)),
    "gemma-combined": ({ALL: {"image_processor": GEMMA}}, (31, 90)),
}


def prepare(name: str, folder: Path, given: np.ndarray, fps: float | None) -> tuple[np.ndarray, dict]:
    """The pixels, and the rest of a case's golden."""
    if name.startswith("gemma"):
        processor = processor_with_words(Gemma3ImageProcessor.from_pretrained(folder), image_seq_length=4)
        out = processor(images=given, text="<start_of_image>", return_tensors="np", input_data_format="channels_last")
        return out["pixel_values"], {}
    if fps is None:
        out = Qwen2VLImageProcessor.from_pretrained(folder)(given, return_tensors="np")
        return out["pixel_values"], {"grid": out["image_grid_thw"][0].tolist()}
    metadata = VideoMetadata(total_num_frames=len(given), fps=fps, frames_indices=list(range(len(given))))
    options = {"video_metadata": metadata, "return_metadata": True, "return_tensors": "np"}
    out = Qwen3VLVideoProcessor.from_pretrained(folder)(given, **options)
    kept = [int(index) for index in out["video_metadata"][0].frames_indices]
    times = [f"<{time:.1f} seconds>" for time in Qwen3VLProcessor._calculate_timestamps(None, kept, fps, 2)]
    return out["pixel_values_videos"], {"grid": out["video_grid_thw"][0].tolist(), "times": times}


def main() -> None:
    transformers.logging.set_verbosity_error()
    cases = {}
    for seed, (name, (configs, shape)) in enumerate(CASES.items()):
        frames, height, width, fps = shape if len(shape) == 4 else (1, *shape, None)
        given = random_bytes(frames * height, width, 3, seed).reshape(frames, height, width, 3)
        with tempfile.TemporaryDirectory() as folder:
            for file, content in configs.items():
                (Path(folder) / file).write_text(json.dumps(content))
            pixels, golden = prepare(name, Path(folder), given if fps else given[0], fps)
        where = np.random.RandomState(seed).choice(pixels.size, SAMPLES, replace=False)
        golden |= {"shape": list(pixels.shape), "sum": float(pixels.sum(dtype=np.float64))}
        golden["millionths"] = [round(1e6 * float(value)) for value in pixels.ravel()[where]]
        cases[name] = {"files": configs, "given": list(shape), "seed": seed, **golden}
        print(f"{name}: {golden['shape']} {golden.get('grid')}")
    path = files.GOLDENS / "processors.json"
    write_json(path, {"made_with": MADE_WITH, "cases": cases}, indent=1)
    print(f"{path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
