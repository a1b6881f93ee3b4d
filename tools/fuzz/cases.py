"""Random checkpoints, plans and junk, which the loops share."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save_file

import pop
from pop.checkpoints.config_json import read_config
from pop.models import build
from pop.pruning.corrections import Corrections

LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
ROPES = ({"rope_type": "default"}, {"rope_type": "linear", "factor": 3.0}, {"rope_type": "llama3", **LLAMA3_ROPE})
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}
VISION = {
    "model_type": "qwen3_vl",
    "depth": 2,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_heads": 3,
    "num_position_embeddings": 25,
    "patch_size": 4,
}
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # bytes that byte-level BPE writes as they are
BYTES = [chr(byte) for byte in VISIBLE] + [chr(256 + number) for number in range(256 - len(VISIBLE))]
MERGES = ["t h", "h e", "th e", "i n", "a n", "Ġ t", "Ġt he", "Ġ a", "o u", "1 2"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Wrong(Exception):
    """A result that is not what it should be."""


def random_config(random: Random, families=tuple(ARCHITECTURES), vocab_size: int = 67) -> dict:
    """The config.json of a tiny model of one of the families."""
    family = random.choice(families)
    num_layers = random.randint(1, 6)
    kv_heads = random.randint(1, 3)
    rope = random.choice(ROPES) | {"rope_theta": random.choice([100.0, 10_000.0])}
    config = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": vocab_size,
        "hidden_size": random.choice([6, 18, 30]),
        "intermediate_size": random.choice([8, 44]),
        "num_hidden_layers": num_layers,
        "num_attention_heads": kv_heads * random.randint(1, 3),
        "num_key_value_heads": kv_heads,
        "head_dim": random.choice([6, 10, 16]),
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_parameters": rope,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "float32",
    }
    if family == "gemma3_text":
        local_rope = {"rope_type": "default", "rope_theta": 1000.0}
        kinds = ("sliding_attention", "full_attention")
        config |= {
            "sliding_window": random.choice([1, 2, 5, 9, 100]),
            "layer_types": random.choices(kinds, k=num_layers),
            "query_pre_attn_scalar": 14,
            "rope_parameters": {"full_attention": rope, "sliding_attention": local_rope},
        }
    else:
        config["tie_word_embeddings"] = random.random() < 0.5
    if family in ("llama", "olmo2"):
        config["attention_bias"] = random.random() < 0.5
    if family == "llama":
        config["mlp_bias"] = random.random() < 0.5
    if family == "olmo2":
        config["hidden_size"] = config["num_attention_heads"] * config["head_dim"]
    if family == "qwen3_moe":
        config |= {"num_experts": 7, "num_experts_per_tok": random.randint(1, 3), "moe_intermediate_size": 10}
        config |= {"decoder_sparse_step": random.randint(1, 2), "mlp_only_layers": [], "norm_topk_prob": True}
    if family == "qwen3_vl":
        return _with_vision(random, config)
    return config


def _with_vision(random: Random, config: dict) -> dict:
    """The config.json of a Qwen3-VL with this language model."""
    pairs = config["head_dim"] // 2
    rows = random.randint(0, pairs // 3)
    sections = [pairs - 2 * rows, rows, rows]
    tied = config.pop("tie_word_embeddings")
    architectures = config.pop("architectures")
    deepstack = list(range(random.randint(0, min(2, config["num_hidden_layers"]))))
    vision = VISION | {"out_hidden_size": config["hidden_size"], "deepstack_visual_indexes": deepstack}
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": sections, "mrope_interleaved": True}
    return {
        "architectures": architectures,
        "model_type": "qwen3_vl",
        "text_config": config | {"model_type": "qwen3_vl_text", "rope_parameters": rope},
        "vision_config": vision,
        "tie_word_embeddings": tied,
        "image_token_id": 60,
        "video_token_id": 61,
        "vision_start_token_id": 62,
        "vision_end_token_id": 63,
    }


def write_checkpoint(folder: Path, config: dict, seed: int) -> None:
    """Write config.json, and random weights of which every one matters: each layer changes h."""
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with torch.device("meta"):
        parameters = dict(build(read_config(folder)).named_parameters())
    random = torch.Generator().manual_seed(seed)
    adds_one = config["model_type"] == "gemma3_text"  # Gemma's norms multiply by 1 + weight
    weights = {}
    for name, parameter in parameters.items():
        values = torch.randn(parameter.shape, generator=random)
        if parameter.dim() > 1:
            values /= parameter.shape[-1] ** 0.5
        elif not name.endswith("model.norm.weight"):  # the last norm's have either sign: tied heads repeat no token
            values = 0.1 * values + (name.endswith("norm.weight") and not adds_one)
        weights[name] = values
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def random_model(random: Random, config: dict, folder: Path) -> pop.Model:
    """A model of config.json, which is also written to a folder. It runs eagerly and prunes nothing."""
    write_checkpoint(folder, config, random.randrange(2**31))
    return pop.load(folder, prune=None, compile=False, progress=False)


def tokenizer_json() -> dict:
    """A tokenizer.json: byte-level BPE with some merges. The control tokens have the ids 0 to 2."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    names = [*CONTROL, *BYTES, *(merge.replace(" ", "") for merge in MERGES)]
    return {
        "added_tokens": [{"id": n, "content": name, "special": True, **flags} for n, name in enumerate(CONTROL)],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel"},
        "model": {
            "type": "BPE",
            "vocab": {name: n for n, name in enumerate(names)},
            "merges": MERGES,
        },
    }


def write_tokenizer(folder: Path) -> int:
    """Write a tokenizer with a chat template. Returns the size of its vocabulary."""
    tokenizer = tokenizer_json()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}), encoding="utf-8")
    return len(tokenizer["model"]["vocab"])


def random_plan(random: Random, model: pop.Model) -> pop.PrunePlan:
    """A plan with any layers, full-depth tokens and selecting layer. Half of them have random corrections."""
    num_layers = model.config.num_layers
    layers = tuple(layer for layer in range(num_layers) if random.random() < 0.5)
    kept = [layer for layer in range(max(layers, default=0)) if layer not in layers]
    fields = {"full_depth_last": random.choice([1, 1, 2, 3, 7, 40]), "full_depth_first": random.choice([0, 0, 1, 4])}
    if kept:
        fields["selecting_layer"] = random.choice(kept)
        fields["full_depth_selected"] = random.choice([0.0, 0.1, 0.4, 1.0])
    if layers and random.random() < 0.5:
        fields["corrections"] = random_corrections(random, model, layers)
        fields["full_depth_first"] = random.choice([1, 1, 4])
    return pop.PrunePlan(layers, **fields)


def random_corrections(random: Random, model: pop.Model, layers: tuple[int, ...]) -> Corrections:
    """Corrections of any rank, with updates of h after any number of groups."""
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    config = model.config
    D = config.hidden_size
    KE = config.num_kv_heads * config.head_dim
    R = random.choice([1, 3, 9, 30])
    num_groups = sum(layer - 1 not in layers for layer in layers)
    num_updates = random.randint(0, num_groups)
    update = torch.randn(num_updates, D, R, generator=generator) / R**0.5
    return Corrections(
        layers,
        weight=torch.randn(len(layers), 2, KE, R, generator=generator) / R**0.5,
        bias=0.1 * torch.randn(len(layers), 2, KE, generator=generator),
        shared=torch.randn(num_groups, R, 2 * D, generator=generator) / (2 * D) ** 0.5,
        update=update if num_updates else None,
        fingerprint=model.fingerprint,
    )


def random_prompt(random: Random, model: pop.Model, longest: int = 24) -> list[int]:
    """Token ids, none of which stands for an image."""
    size = min(model.config.vocab_size, 60)
    return random.choices(range(size), k=random.randint(1, longest))


def error_over_std(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, over the standard deviation of the expected values."""
    if found.shape != expected.shape:
        raise Wrong(f"the shape is {list(found.shape)}, not {list(expected.shape)}")
    difference = (found - expected).abs().max() / expected.std(correction=0)
    if not difference <= torch.inf:
        raise Wrong("the values are not finite")
    return difference.item()
