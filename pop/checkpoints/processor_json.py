"""From a checkpoint's processor files to how its images and videos are prepared (ImageConfig in models/config.py).

transformers 5 writes one file, processor_config.json. Before, preprocessor_config.json was for images and
video_preprocessor_config.json for videos. If a file lacks a field, the default is that of the reference's class, which
may differ from the published value. Fields without an effect in the reference are ignored. Gemma-3's pan-and-scan is
not supported, so a file that asks for it is refused.
"""

from dataclasses import MISSING
from pathlib import Path

from pop.checkpoints.config_json import read_fields
from pop.checkpoints.fields import Fields
from pop.models.config import Config, ImageConfig, VideoConfig

# For each family and kind, how the name of its processor begins (some end in Fast or Pil), and the class's defaults.
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
PROCESSORS = {
    ("gemma3", "image"): ("Gemma3ImageProcessor", ImageConfig()),
    ("qwen3_vl", "image"): ("Qwen2VLImageProcessor", ImageConfig((56**2, 1280 * 28**2), **CLIP)),
    ("qwen3_vl", "video"): ("Qwen3VLVideoProcessor", VideoConfig((128 * 32**2, 768 * 32**2))),
}
FILES = {"image": "preprocessor_config.json", "video": "video_preprocessor_config.json"}
# The fields of `size`, for images their older names outside of it, which take precedence, and their largest values.
EDGES = (("shortest_edge", "min_pixels", 2**26), ("longest_edge", "max_pixels", 2**31))
ADVICE = "; correct the file, or remove it to take the published values"


def read_preparation(folder: Path, config: Config) -> dict[str, ImageConfig]:
    """Read how each kind, "image" and "video", is prepared, if the checkpoint has a file that says so.

    Raises ConfigError, which names the file and the field, for a value that is wrong or not supported.
    """
    if getattr(config, "vision", None) is None:
        return {}
    kinds = [kind for family, kind in PROCESSORS if family == config.family]

    def read_parts(whole: Fields) -> dict[str, ImageConfig]:
        if config.family == "gemma3":
            whole.fixed(image_seq_length=config.vision.tokens_per_image)
        parts = {kind: whole.part(f"{kind}_processor") for kind in kinds}
        return {kind: _read(part, config, kind) for kind, part in parts.items() if part.left}

    path = folder / "processor_config.json"
    preparation = read_fields(path, read_parts, (), ADVICE) if path.exists() else {}
    for kind in kinds:
        path = folder / FILES[kind]
        if kind not in preparation and path.exists():
            preparation[kind] = read_fields(path, lambda fields, kind=kind: _read(fields, config, kind), (), ADVICE)
    return preparation


def _read(fields: Fields, config: Config, kind: str) -> ImageConfig:
    vision = config.vision
    known, default = PROCESSORS[config.family, kind]
    fields.take(f"{kind}_processor_type", known, lambda v: type(v) is str and v.startswith(known), known)
    fields.fixed(do_resize=True, do_rescale=True, do_normalize=True, resample=2 if config.family == "gemma3" else 3)
    rescale = fields.number("rescale_factor", default.rescale)
    mean = _colours(fields, "image_mean", -1e6, default.mean)
    std = _colours(fields, "image_std", 1e-6, default.std)
    size = fields.part("size")
    if config.family == "gemma3":
        fields.fixed(do_pan_and_scan=False)
        size.fixed(height=vision.image_size, width=vision.image_size)
        size.finish()
        return ImageConfig(None, rescale, mean, std)
    fields.fixed(patch_size=vision.patch_size, merge_size=vision.merge_size, temporal_patch_size=vision.frames)
    defaults = (MISSING, MISSING) if size.left else default.pixels
    pixels = []
    for (name, older, most), limit in zip(EDGES, defaults, strict=True):
        if kind == "image" and older in fields.left:
            pixels.append(fields.integer(older, most=most))
        else:
            pixels.append(size.integer(name, limit, most=most))
    if kind == "image":
        return ImageConfig(tuple(pixels), rescale, mean, std)
    fields.fixed(cap_pixels_per_frame=False, num_frames=None)
    least_frames = fields.integer("min_frames", default.frames[0])
    most_frames = fields.integer("max_frames", default.frames[1], 2)
    fps = fields.number("fps", default.fps)
    if not fields.boolean("do_sample_frames", True):
        fps = None
    return VideoConfig(tuple(pixels), rescale, mean, std, fps, (max(2, least_frames), most_frames))


def _colours(fields: Fields, name: str, least: float, default: tuple[float, ...]) -> tuple[float, ...]:
    """Read a value for each of red, green and blue."""

    def accepts(values) -> bool:
        return type(values) is list and [type(v) in (int, float) and least <= v <= 1e6 for v in values] == [True] * 3

    return tuple(fields.take(name, f"three numbers from {least:g} to 1e6", accepts, default))
