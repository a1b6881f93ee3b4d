"""What tools/bench/__main__.py measures and what that needs: known shapes, random weights and plans, and bytes in closed form.

Shape letters are those of pop/models/layers.py, I is the width inside the MLP.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
from bisect import bisect_right
from pathlib import Path

import torch

import pop
from pop import models
from pop.backends.int8 import check_quantize, quantize_module
from pop.checkpoints import registry
from pop.checkpoints.config_json import read_config
from pop.cli.commands import parse_prune
from pop.engine.cache import KVCache, _free_bytes
from pop.errors import InputError
from pop.loading import usable_device
from pop.models.config import DTYPES
from pop.models.layers import QUERY_BLOCK
from pop.pruning.projections import KVProjections

CHUNK = 2048  # tokens that prefill runs at once
BIG = 2**28  # bytes of the matrix that measures the bandwidth: far more than these cores' share of a cache
# config.json of known shapes, as the Hugging Face layout has it: what --shape needs no file for.
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHAPES = {
    "llama3.1-8b": {
        "model_type": "llama", "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131_072, "rope_theta": 500_000.0, "tie_word_embeddings": False,
        "rope_scaling": {**_LLAMA3, "original_max_position_embeddings": 8192}, "dtype": "bfloat16",
    },
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192, "rope_theta": 100_000.0, "tie_word_embeddings": True, "dtype": "bfloat16",
    },
    "qwen3-vl-8b": {
        "model_type": "qwen3_vl", "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen3_vl_text", "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 12_288,
            "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "rms_norm_eps": 1e-6, "max_position_embeddings": 262_144, "rope_theta": 5_000_000.0, "dtype": "bfloat16",
            "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
        },
        "vision_config": {
            "model_type": "qwen3_vl", "hidden_size": 1152, "intermediate_size": 4304, "depth": 27, "num_heads": 16,
            "out_hidden_size": 4096, "num_position_embeddings": 2304, "patch_size": 16,
            "deepstack_visual_indexes": [8, 16, 24],
        },
    },
    "gemma3-12b": {
        "model_type": "gemma3_text", "vocab_size": 262_208, "hidden_size": 3840, "intermediate_size": 15_360,
        "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "max_position_embeddings": 131_072,
        "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0, "sliding_window": 1024,
        "sliding_window_pattern": 6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "dtype": "bfloat16",
    },
}  # fmt: skip


# ---- What must be read and held, counted from shapes ----


def weight_bytes(config, dtype: torch.dtype) -> int:
    """Bytes of all weights."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in models.build(config).parameters()) * dtype.itemsize


def saved_bytes(model: pop.Model) -> int:
    """Bytes that its weights are smaller by than in its dtype: quantised ones are."""
    return weight_bytes(model.config, model.dtype) - sum(weight.nbytes for weight in model.module.parameters())


def decode_bytes(config, filled: int, dtype: torch.dtype) -> int:
    """Bytes that a step of decode of one row must read, `filled` slots of the cache being filled behind it."""
    unread = 0 if config.tie_embeddings else (config.vocab_size - 1) * config.hidden_size * dtype.itemsize
    slots = sum(min(filled, window or filled) for window in config.windows)
    cache = slots * 2 * config.num_kv_heads * config.head_dim * dtype.itemsize
    return weight_bytes(config, dtype) - unread + cache


def prefill_memory(config, num_tokens: int, dtype: torch.dtype, widened: bool = False) -> int:
    """Bytes at the peak of a full prefill of one prompt into a cache of its size: weights, cache, activations.

    Activations are those of one chunk of C tokens in one layer: h with and without attention's update, the normalised
    h, q, what was attended, and for a later chunk, or one that a window cuts, its masks, one for each window that there
    is, over the keys that can be seen; beside them, whichever is more, gate, up and their product in the MLP, or in
    attention k, v, those of a window put in order, and some queries' mask in the model's dtype. Where products are
    widened to float32, the largest has its weights, input and output in it, too.
    """
    D, I = config.hidden_size, config.intermediate_size  # noqa: E741 (the papers' name)
    H, K, E = config.num_heads, config.num_kv_heads, config.head_dim
    C, size = min(num_tokens, CHUNK), dtype.itemsize
    later = num_tokens > C
    keys = {w: min(num_tokens, (w or num_tokens) - 1 + C) for w in set(config.windows)}  # that a chunk may attend
    masks = C * sum(keys[w] for w in keys if later or (w or C) < C)
    mlp = C * 3 * I * size + (4 * (D * I + C * (D + I)) if widened else 0)
    in_order = max(keys[w] for w in keys if w) if later and any(keys) else 0
    block = min(C, QUERY_BLOCK) * max(keys.values()) if masks else 0
    attention = ((C + in_order) * 2 * K * E + block) * size
    activations = C * (3 * D + 2 * H * E) * size + masks + max(mlp, attention)
    cache = KVCache.size_in_bytes(config, 1, num_tokens, dtype)
    return weight_bytes(config, dtype) + cache + activations


def fitting_layers(config, num_tokens: int, dtype: torch.dtype, free: int) -> int:
    """The most layers, up to all, whose weights, cache, projections and activations leave a tenth of `free` bytes."""

    def needed(layers: int) -> int:
        shorter = shortened(config, layers)
        projections = layers * 4 * config.num_kv_heads * config.head_dim * config.hidden_size * dtype.itemsize
        return prefill_memory(shorter, num_tokens, dtype, True) + projections + BIG

    fitting = bisect_right(range(1, config.num_layers + 1), 0.9 * free, key=needed)
    if not fitting:
        raise InputError(
            f"one layer of the shape needs {needed(1):,} bytes, but {free:,} are free; take a smaller --shape"
        )
    return fitting


def shortened(config, layers: int):
    """The config with the first `layers` layers alone."""
    changed = {"windows": config.windows[:layers]} if any(config.windows) else {"num_layers": layers}
    return dataclasses.replace(config, **changed)


# ---- The model and its plans ----


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is measured: the model, config.json's fields for rivals (None: it has no such file), and all its layers."""

    model: pop.Model
    fields: dict | None
    all_layers: int


def load_subject(args) -> Subject:
    compile = {"auto": "auto", "true": True, "false": False}[args.compile]
    dtype = DTYPES.get(args.dtype)
    if args.model:
        options = {"dtype": dtype, "prune": None, "compile": compile, "progress": False, "quantize": args.quantize}
        model = pop.load(args.model, device=args.device, **options)
        named = args.model in registry.list_models() or not os.path.isdir(args.model)
        path = (registry.find_weights(args.model) if named else Path(args.model)) / "config.json"
        return Subject(model, json.loads(path.read_text()) if path.exists() else None, model.config.num_layers)
    if args.shape not in SHAPES and not os.path.isfile(Path(args.shape) / "config.json"):
        raise InputError(f"--shape is {args.shape!r}; give one of {', '.join(SHAPES)}, or a folder with a config.json")
    with tempfile.TemporaryDirectory() as folder:
        if args.shape in SHAPES:
            (Path(folder) / "config.json").write_text(json.dumps(SHAPES[args.shape]))
        source = Path(folder if args.shape in SHAPES else args.shape)
        config, fields = read_config(source), json.loads((source / "config.json").read_text())
    device, dtype = usable_device(args.device), dtype or config.dtype
    free = _free_bytes(device)
    layers = args.layers or (fitting_layers(config, max(args.lengths), dtype, free) if free else config.num_layers)
    if layers > config.num_layers:
        raise InputError(f"--layers is {layers}, but {args.shape} has {config.num_layers}")
    shorter = shortened(config, layers)
    module = random_module(shorter, dtype, device)
    check_quantize(args.quantize, module, device)
    if args.quantize:
        quantize_module(module)
    model = pop.Model(module, shorter, compile=compile)
    return Subject(model, fields | {"num_hidden_layers": layers}, config.num_layers)


def random_module(config, dtype: torch.dtype, device: torch.device):
    """A module with random weights, on the device from the start. One block of numbers, over and over, is soon made."""
    with torch.device("meta"):
        module = models.build(config)
    block = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).mul(0.02).to(device, dtype)
    weights = {}
    for name, parameter in module.named_parameters():
        weights[name] = torch.ones(parameter.shape, dtype=dtype, device=device)
        if parameter.dim() > 1:
            for part in weights[name].view(-1).split(len(block)):
                part.copy_(block[: len(part)])
    module.load_state_dict(weights, assign=True)
    return module.requires_grad_(False).eval()


def random_image(model: pop.Model, size: tuple[int, int]):
    """An image of width x height random pixels, prepared for the model, and the patches that it has."""
    if "image" not in model.vision.marks:
        raise InputError(f"--image needs a model that takes images, and the {model.config.family} family does not")
    width, height = size
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = model.vision.prepare("image", pixels.numpy())
    per_image = model.config.vision.patches_per_side**2 if image.grid is None else image.grid.rows * image.grid.columns
    return image, [per_image]


def parse_plan(text: str, model: pop.Model) -> pop.PrunePlan:
    """One --prune, see above."""
    taps, what, last = re.fullmatch(r"(?:taps([12]):)?(.*?)(?::(\d+))?", text, re.S).groups()
    plan = model.resolve(parse_prune(what) or pop.PrunePlan.none())
    if not plan.layers:
        raise InputError(f"--prune {text} prunes none of the {model.config.num_layers} layers; give a larger fraction")
    if last:
        plan = dataclasses.replace(plan, full_depth_last=int(last))
    if not taps:
        return plan
    config = model.config
    shape = (len(plan.layers), 2, config.num_kv_heads * config.head_dim, int(taps) * config.hidden_size)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(0.02).to(model.device, model.dtype)
    projections = KVProjections(plan.layers, weight, weight[..., 0].clone(), model.fingerprint, int(taps))
    first = max(1, plan.full_depth_first)
    return dataclasses.replace(plan, full_depth_first=first, projections=projections)
