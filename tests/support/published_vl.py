"""The published sizes of Qwen3-VL."""

from pop.models.config import ExpertsConfig, Qwen3VisionConfig, Qwen3VLConfig

# Width, MLP, layers, query heads, tied; of the tower: width, MLP, blocks, DeepStack.
SIZES = {
    "2b": (2048, 6144, 28, 16, True, 1024, 4096, 24, (5, 11, 17)),
    "4b": (2560, 9728, 36, 32, True, 1024, 4096, 24, (5, 11, 17)),
    "8b": (4096, 12288, 36, 32, False, 1152, 4304, 27, (8, 16, 24)),
    "32b": (5120, 25600, 64, 64, False, 1152, 4304, 27, (8, 16, 24)),
    "30b-a3b": (2048, 6144, 48, 32, False, 1152, 4304, 27, (8, 16, 24)),
    "235b-a22b": (4096, 12288, 94, 64, False, 1152, 4304, 27, (8, 16, 24)),
}


EXPERT_WIDTHS = {"30b-a3b": 768, "235b-a22b": 1536}


def published(size: str) -> Qwen3VLConfig:
    D, inner, layers, heads, tied, C, vision_inner, blocks, deepstack = SIZES[size]
    vision, experts, kv_heads = Qwen3VisionConfig(C, vision_inner, blocks, 16, D, deepstack), None, 8
    if width := EXPERT_WIDTHS.get(size):
        experts, kv_heads = ExpertsConfig(128, 8, width), 4
    options = {"tie_embeddings": tied, "mrope_sections": (24, 20, 20), "vision": vision, "experts": experts}
    return Qwen3VLConfig(151_936, D, inner, layers, heads, kv_heads, **options)
