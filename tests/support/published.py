"""config.json files as published by their makers, each with the version of transformers that wrote it."""

import json

from support.goldens import GOLDENS

# By the model's name in the registry. Qwen3-VL's other sizes: published_vl.py.
PUBLISHED = json.loads((GOLDENS / "published.json").read_text(encoding="utf-8"))

# The parts of the multimodal sizes, whose text_config leaves most to the defaults of transformers.
GEMMA3_TEXTS = {size: PUBLISHED[f"gemma3-{size}"]["text_config"] for size in ("4b", "12b", "27b")}


def gemma3_with_images(text: dict, **fields) -> dict:
    """The config.json of a multimodal size."""
    return PUBLISHED["gemma3-4b"] | {"text_config": text} | fields


# Sizes that differ from a file above in a few fields: width, MLP, layers, query heads, key-value heads, tied. The head
# width of Qwen3 is the same in all, and that of Llama is the width of a head's share.
LLAMA_SIZES = {
    "llama3.1-70b": (8192, 28672, 80, 64, 8, False),
    "llama3.1-405b": (16384, 53248, 126, 128, 8, False),
    "llama3.2-1b": (2048, 8192, 16, 32, 8, True),
    "llama3.2-3b": (3072, 8192, 28, 24, 8, True),
    "smollm2-135m": (576, 1536, 30, 9, 3, True),
}
QWEN3_SIZES = {
    "0.6b": (1024, 3072, 28, 16, 8, True),
    "1.7b": (2048, 6144, 28, 16, 8, True),
    "4b": (2560, 9728, 36, 32, 8, True),
    "8b": (4096, 12288, 36, 32, 8, False),
    "14b": (5120, 17408, 40, 40, 8, False),
    "32b": (5120, 25600, 64, 64, 8, False),
}
FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def sized(base: dict, sizes: tuple) -> dict:
    """A file with other sizes."""
    return base | dict(zip((*FIELDS, "tie_word_embeddings"), sizes, strict=False))


PUBLISHED |= {name: sized(PUBLISHED["llama3.1-8b"], sizes) for name, sizes in LLAMA_SIZES.items()}
PUBLISHED["smollm2-135m"] |= {"vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2}
PUBLISHED |= {f"qwen3-{size}": sized(PUBLISHED["qwen3-0.6b"], sizes) for size, sizes in QWEN3_SIZES.items()}
PUBLISHED["gemma3-270m"] = sized(PUBLISHED["gemma3-1b"], (640, 2048, 18))
PUBLISHED["olmo2-1b"] = sized(PUBLISHED["olmo2-7b"], (2048, 8192, 16, 16, 16))
