"""config.json files as published by their makers, each with the version of transformers that wrote it."""

import json

from support.goldens import GOLDENS

# By the model's name in the registry. A further size goes into the last entry of the file. Qwen3-VL's other sizes:
# published_vl.py.
PUBLISHED = json.loads((GOLDENS / "published.json").read_text(encoding="utf-8"))
_SIZES = PUBLISHED.pop("sizes that differ from another file in these fields")
for name, (base, fields) in _SIZES.items():  # in the order of the file, so a base may be one of them
    PUBLISHED[name] = PUBLISHED[base] | fields

# The parts of the multimodal sizes, whose text_config leaves most to the defaults of transformers.
GEMMA3_TEXTS = {size: PUBLISHED[f"gemma3-{size}"]["text_config"] for size in ("4b", "12b", "27b")}


def gemma3_with_images(text: dict, **fields) -> dict:
    """The config.json of a multimodal size."""
    return PUBLISHED["gemma3-4b"] | {"text_config": text} | fields
