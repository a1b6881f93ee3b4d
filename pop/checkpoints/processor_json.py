"""From a checkpoint's processor files to the limits on the pixels of its images and videos.

transformers 5 writes one file, processor_config.json. Before, preprocessor_config.json was for images and
video_preprocessor_config.json for videos. Nothing but the limits may differ from the published files: a file that asks
for another preparation is refused. A fixed field that a file lacks has its published value, except for Qwen's colours,
which a file must state.
"""

from dataclasses import MISSING
from functools import partial
from pathlib import Path

from pop.checkpoints.config_json import read_fields
from pop.checkpoints.fields import Fields
from pop.models.config import Config

# For the kinds of each family, how the name of the processor begins. Some end in Fast or Pil.
PROCESSORS = {
    "gemma3": {"image": "Gemma3ImageProcessor"},
    "qwen3_vl": {"image": "Qwen2VLImageProcessor", "video": "Qwen3VLVideoProcessor"},
}
FILES = {"image": "preprocessor_config.json", "video": "video_preprocessor_config.json"}
# The fields of `size`, for images their older names outside of it, which take precedence, and their largest values.
EDGES = (("shortest_edge", "min_pixels", 2**26), ("longest_edge", "max_pixels", 2**31))
ADVICE = "; correct the file, or remove it to take the published values"


def read_limits(folder: Path, config: Config) -> dict[str, tuple[int, int] | None]:
    """Read the fewest and the most pixels of each kind, "image" and "video", for which the checkpoint has a file.

    None stands for a size that the config states. Raises ConfigError, which names the file and the field, for a value
    that is wrong or not supported.
    """
    if getattr(config, "vision", None) is None:
        return {}
    kinds = PROCESSORS[config.family].keys()

    def read_parts(whole: Fields) -> dict[str, tuple[int, int] | None]:
        if config.family == "gemma3":
            whole.fixed(image_seq_length=config.vision.tokens_per_image)
        parts = {kind: whole.part(f"{kind}_processor") for kind in kinds}
        return {kind: _read(part, config, kind) for kind, part in parts.items() if part.left}

    path = folder / "processor_config.json"
    limits = read_fields(path, read_parts, (), ADVICE) if path.exists() else {}
    for kind in kinds:
        path = folder / FILES[kind]
        if kind not in limits and path.exists():
            limits[kind] = read_fields(path, partial(_read, config=config, kind=kind), (), ADVICE)
    return limits


def _read(fields: Fields, config: Config, kind: str) -> tuple[int, int] | None:
    vision = config.vision
    known = PROCESSORS[config.family][kind]
    fields.take(f"{kind}_processor_type", known, lambda v: type(v) is str and v.startswith(known), known)
    fields.fixed(do_resize=True, do_rescale=True, do_normalize=True, rescale_factor=1 / 255)
    half = [0.5] * 3
    # The reference's class for Qwen's images has other colours, so a file without these fields would mean those.
    default = MISSING if known == "Qwen2VLImageProcessor" else half
    for name in ("image_mean", "image_std"):
        fields.take(name, repr(half), lambda v: v == half, default)
    size = fields.part("size")
    if config.family == "gemma3":
        fields.fixed(do_pan_and_scan=False, resample=2)
        size.fixed(height=vision.image_size, width=vision.image_size)
        size.finish()
        return None
    fields.fixed(
        resample=3, patch_size=vision.patch_size, merge_size=vision.merge_size, temporal_patch_size=vision.frames
    )
    if kind == "video":
        fields.fixed(
            do_sample_frames=True, fps=2, min_frames=4, max_frames=768, cap_pixels_per_frame=False, num_frames=None
        )
    limits = []
    for name, older, most in EDGES:
        if kind == "image" and older in fields.left:
            limits.append(fields.integer(older, most=most))
        else:
            limits.append(size.integer(name, most=most))
    return tuple(limits)
