"""Tiny random models with awkward sizes, in memory or as checkpoint folders.

Used by the whole test suite and by tools/goldens. Weights depend only on a seed and on the names and shapes of the
parameters. So a golden file keeps the seed, and the reference gets the very same weights.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import pop
from pop.models import build
from pop.models.config import (
    Config,
    ExpertsConfig,
    Gemma3Config,
    LlamaConfig,
    Olmo2Config,
    Qwen3Config,
    Qwen3VisionConfig,
    Qwen3VLConfig,
    RopeConfig,
    SiglipConfig,
)

# Awkward on purpose: the head width is not width / heads, the layer count is odd, and 6 query heads share 2.
SIZES = {
    "vocab_size": 67,
    "hidden_size": 30,
    "intermediate_size": 44,
    "num_layers": 5,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 10,
    "max_positions": 512,
    "norm_eps": 1e-5,
    "rope": RopeConfig(base=10_000.0, kind="default"),
    "tie_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "dtype": torch.float32,
    "bos_id": None,
    "eos_ids": (),
}


def tiny_config(**overrides) -> LlamaConfig:
    """The tiny model's config, with any of its fields replaced."""
    return LlamaConfig(**{**SIZES, **overrides})


# The same sizes. Two local layers precede each global one, and one follows. Tests easily exceed the window.
NOT_GEMMAS = ("num_layers", "tie_embeddings", "attention_bias", "mlp_bias")
GEMMA3_SIZES = {name: value for name, value in SIZES.items() if name not in NOT_GEMMAS} | {
    "windows": (5, 5, None, 5, None),
    "query_pre_attn_scalar": 14.0,
    "rope": RopeConfig(base=1_000_000.0, kind="linear", factor=8.0),
    "local_rope": RopeConfig(base=10_000.0),
    "bos_id": 2,
    "eos_ids": (1,),
}


def tiny_gemma3_config(**overrides) -> Gemma3Config:
    return Gemma3Config(**{**GEMMA3_SIZES, **overrides})


# With images of four tokens: 4 x 4 patches, averaged in squares of four.
GEMMA3_VISION = {
    "vision": SiglipConfig(24, 36, 2, 3, image_size=28, patch_size=7, norm_eps=1e-6, tokens_per_image=4),
    "image_id": 66,
    "boi_id": 64,
    "eoi_id": 65,
}


def tiny_gemma3_vl_config(**overrides) -> Gemma3Config:
    return tiny_gemma3_config(**{**GEMMA3_VISION, **overrides})


# The Llama's sizes: only the norms of queries and keys are different.
QWEN3_SIZES = {name: value for name, value in SIZES.items() if not name.endswith("_bias")}


def tiny_qwen3_config(**overrides) -> Qwen3Config:
    return Qwen3Config(**{**QWEN3_SIZES, **overrides})


# With images in patches of 4 x 4 pixels, four patches to a token, and two layers of DeepStack.
QWEN3_VL_SIZES = QWEN3_SIZES | {
    "mrope_sections": (2, 2, 1),
    "vision": Qwen3VisionConfig(24, 40, 4, 3, 30, (1, 3), position_side=5, patch_size=4),
    "image_id": 60,
    "video_id": 61,
    "start_id": 62,
    "end_id": 63,
}


def tiny_qwen3_vl_config(**overrides) -> Qwen3VLConfig:
    return Qwen3VLConfig(**{**QWEN3_VL_SIZES, **overrides})


EXPERTS = ExpertsConfig(count=7, per_token=3, width=14)


def tiny_qwen3_moe_config(**overrides) -> Qwen3Config:
    return tiny_qwen3_config(**{"experts": EXPERTS, **overrides})


def tiny_olmo2_config(**overrides) -> Olmo2Config:
    return Olmo2Config(**{**QWEN3_SIZES, **overrides})


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int, family: str = "llama") -> dict[str, torch.Tensor]:
    """Float32 weights for the named shapes, filled in the order of the published names.

    Matrices have variance 1 / columns, so that every layer changes the residual stream. The weights of norms scatter
    around one, or around zero for Gemma, which adds one. Biases scatter around zero. So leaving one out shows.
    """
    # RandomState, not Generator: numpy promises to keep its stream of numbers the same in every release.
    random = np.random.RandomState(np.random.PCG64(seed))
    weights = {}
    for name, shape in sorted(shapes.items()):
        values = random.standard_normal(shape)
        if len(shape) in (2, 3):
            values /= np.sqrt(shape[-1])
        elif name.endswith("model.norm.weight") and family == "gemma3":
            values -= 1  # 1 + weight has either sign: otherwise the tied head makes each token predict itself
        elif name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
            adds_one = family == "gemma3" and not name.startswith("vision_tower.")
            values = (not adds_one) + 0.1 * values
        else:
            values *= 0.1
        weights[name] = torch.from_numpy(values.astype(np.float32))
    return weights


def patch_values(vision) -> int:
    """The number of values in a patch of Qwen3-VL: three channels of its pixels, in all its frames."""
    return 3 * vision.frames * vision.patch_size**2


def random_patches(count: int, values: int, seed: int) -> torch.Tensor:
    """[count, values] float32 from -1 to 1: the pixels of `count` patches."""
    random = np.random.RandomState(np.random.PCG64(seed))
    return torch.from_numpy(random.uniform(-1, 1, (count, values)).astype(np.float32))


def random_model(config: Config, seed: int = 0) -> torch.nn.Module:
    """A float32 model of any family on the CPU, in evaluation mode, with random weights."""
    module = build(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    module.load_state_dict(random_weights(shapes, seed, config.family))
    return module.requires_grad_(False).eval()


def tiny_model(config: Config, seed: int = 0, **options):
    """A pop.Model with `random_model`'s weights."""
    return pop.Model(random_model(config, seed), config, **options)


def write_checkpoint(folder: Path | str, seed: int = 0, **overrides) -> Path:
    """Write config.json and model.safetensors of a tiny model into `folder` (made if missing); return it.

    The weights are those of `random_model(tiny_config(**overrides), seed)`, rounded to the config's dtype.
    """
    config = tiny_config(**overrides)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(hf_config(config), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    write_weights(folder, config, seed)
    return folder


def write_weights(folder: Path, config: Config, seed: int) -> None:
    """Write model.safetensors with the random weights of `config`'s model, in the config's dtype."""
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in build(config).named_parameters()}
    weights = {name: weight.to(config.dtype) for name, weight in random_weights(shapes, seed, config.family).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path, count: int = 3) -> dict[str, str]:
    """Spread model.safetensors over shards; return the weight map."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    weight_map = {name: files[number % count] for number, name in enumerate(weights)}
    for file in files:
        part = {name: weight for name, weight in weights.items() if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def experts_one_by_one(tensors: dict[str, torch.Tensor]) -> None:
    """Store each expert by itself, in place, as text models are published."""
    for name in [name for name in tensors if "experts" in name]:
        experts, _, kind = name.rpartition(".")
        for number, tensor in enumerate(tensors.pop(name)):
            matrices = {"down_proj": tensor}
            if kind == "gate_up_proj":
                matrices = dict(zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True))
            tensors |= {f"{experts}.{number}.{matrix}.weight": weight for matrix, weight in matrices.items()}


def experts_transposed(tensors: dict[str, torch.Tensor]) -> None:
    """Store all experts' matrices transposed, in place, as Qwen3-VL is published."""
    for name in [name for name in tensors if "experts" in name]:
        tensors[name] = tensors[name].transpose(1, 2)


def hf_config(config: LlamaConfig) -> dict:
    """The config.json of `config`, as transformers 5 writes it."""
    rope = {"rope_type": config.rope.kind, "rope_theta": config.rope.base}
    if config.rope.kind != "default":
        rope["factor"] = config.rope.factor
    if config.rope.kind == "llama3":
        rope["low_freq_factor"] = config.rope.low_freq_factor
        rope["high_freq_factor"] = config.rope.high_freq_factor
        rope["original_max_position_embeddings"] = config.rope.original_max_positions
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "hidden_act": "silu",
        "dtype": str(config.dtype).removeprefix("torch."),
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids) or None,
    }
