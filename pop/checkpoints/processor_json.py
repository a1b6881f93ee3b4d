"""From a checkpoint's processor files to how its images and videos are prepared (ImageConfig in models/config.py).

transformers 5 writes one file, processor_config.json. Before, preprocessor_config.json was for images and
video_preprocessor_config.json for videos. If a file lacks a field, the default is that of the reference's class, which
may differ from the published value. Fields without an effect in the reference are ignored, such as do_pan_and_scan.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import MISSING
from pathlib import Path

from pop.checkpoints.fields import Fields
from pop.errors import ConfigError
from pop.models.config import Config, ImageConfig, VideoConfig
from pop.system.files import read_json

logger = logging.getLogger(__name__)

# For each family and kind, how the name of its processor begins (some end in Fast or Pil), and the class's defaults.
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
PROCESSORS = {
    ("gemma3", "image"): ("Gemma3ImageProcessor", ImageConfig()),
    ("qwen3_vl", "image"): ("Qwen2VLImageProcessor", ImageConfig((56**2, 1280 * 28**2), **CLIP)),
    ("qwen3_vl", "video"): ("Qwen3VLVideoProcessor", VideoConfig((128 * 32**2, 768 * 32**2))),
}
# The fields of `size`. For images, they have older names outside of it, which take precedence. Logarithms of the most.
EDGES = {"shortest_edge": ("min_pixels", 26), "longest_edge": ("max_pixels", 31)}
FILES = {"image": "preprocessor_config.json", "video": "video_preprocessor_config.json"}


def read_preparation(folder: Path, config: Config) -> dict[str, ImageConfig]:
    """Read how each kind, "image" and "video", is prepared, if the checkpoint has a file that says so.

    Raises ConfigError, which names the file and the field, for a value that is wrong or not supported.
    """
    if getattr(config, "vision", None) is None:
        return {}
    kinds = [kind for family, kind in PROCESSORS if family == config.family]
    with _fields(folder / "processor_config.json") as whole:
        if config.family == "gemma3":
            whole.fixed(image_seq_length=config.vision.tokens_per_image)
        parts = {kind: whole.part(f"{kind}_processor") for kind in kinds}
        preparation = {kind: _read(part, config, kind) for kind, part in parts.items() if part.left}
    for kind in kinds:
        if kind not in preparation and (path := folder / FILES[kind]).exists():
            with _fields(path) as fields:
                preparation[kind] = _read(fields, config, kind)
    return preparation


@contextlib.contextmanager
def _fields(path: Path) -> Iterator[Fields]:
    """Yield the fields of a file, which may be missing. The block takes some. The others are ignored."""
    fields = Fields(read_json(path) if path.exists() else {})
    try:
        yield fields
        ignored = fields.finish(())
    except (ConfigError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}; correct the file, or remove it to take the published values") from None
    if ignored:
        logger.info("%s: ignored %s", path, ignored)


def _read(fields: Fields, config: Config, kind: str) -> ImageConfig:
    vision, (known, default) = config.vision, PROCESSORS[config.family, kind]
    fields.take(f"{kind}_processor_type", known, lambda v: type(v) is str and v.startswith(known), known)
    fields.fixed(do_resize=True, do_rescale=True, do_normalize=True, resample=2 if config.family == "gemma3" else 3)
    rescale = _number(fields, "rescale_factor", default.rescale)
    colours = _colours(fields, "image_mean", -1e6, default.mean), _colours(fields, "image_std", 1e-6, default.std)
    size = fields.part("size")
    if config.family == "gemma3":
        size.fixed(height=vision.image_size, width=vision.image_size)
        size.finish()
        return ImageConfig(None, rescale, *colours)
    fields.fixed(patch_size=vision.patch_size, merge_size=vision.merge_size, temporal_patch_size=vision.frames)
    pixels, defaults = [], (MISSING, MISSING) if size.left else default.pixels
    for name, (older, most), limit in zip(EDGES, EDGES.values(), defaults, strict=True):
        is_older = kind == "image" and older in fields.left
        pixels.append(_area(fields, older, most) if is_older else _area(size, name, most, limit))
    if kind == "image":
        return ImageConfig(tuple(pixels), rescale, *colours)
    fields.fixed(cap_pixels_per_frame=False, num_frames=None)
    least, most = fields.integer("min_frames", default.frames[0]), fields.integer("max_frames", default.frames[1], 2)
    fps = _number(fields, "fps", default.fps)
    fps = fps if fields.boolean("do_sample_frames", True) else None
    return VideoConfig(tuple(pixels), rescale, *colours, fps, (max(least, 2), most))


def _area(fields: Fields, name: str, most: int, default=MISSING) -> int:
    return fields.take(name, f"an integer from 1 to 2**{most}", lambda v: type(v) is int and 1 <= v <= 2**most, default)


def _number(fields: Fields, name: str, default: float) -> float:
    return fields.take(name, "a number from 1e-6 to 1e6", lambda v: _fits(v, 1e-6), default)


def _colours(fields: Fields, name: str, least: float, default: tuple[float, ...]) -> tuple[float, ...]:
    """Read a value for each of red, green and blue."""
    kind = f"three numbers from {least:g} to 1e6"
    accepts = lambda v: type(v) is list and len(v) == 3 and all(_fits(n, least) for n in v)  # noqa: E731
    return tuple(fields.take(name, kind, accepts, default))


def _fits(value, least: float) -> bool:
    return type(value) in (int, float) and least <= value <= 1e6
