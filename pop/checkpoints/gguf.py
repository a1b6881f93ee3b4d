"""GGUF files into the HF checkpoint layout: config.json, generation_config.json, safetensors, tokenizer.

A GGUF file is a table of metadata and a list of tensors, often quantised, under llama.cpp's names. The import

1. refuses, by name, whatever in the metadata is not part of the architectures below;
2. writes the rest as a config.json that says all that a published checkpoint's says;
3. dequantises the tensors one by one, undoes what llama.cpp's converter did to them, and rounds to bfloat16;
4. rebuilds the tokenizer's files (gguf_tokenizer.py).

Quantised weights stay what quantisation made of them; rounding float32 to bfloat16 is all that is lost here.
Not built: other architectures, mixtures of experts, adapters, files in several pieces, big-endian files.
"""

import contextlib
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from pop.checkpoints.gguf_tokenizer import write_tokenizer
from pop.errors import CheckpointError, MissingExtra, PopError, UnsupportedError
from pop.files import staged, write_json
from pop.progress import progress_bar

# Name within a layer: GGUF -> (HF, shape). V vocabulary, D model width, F MLP width, E head width,
# Q = query heads * E, K = key-value heads * E.
_PROJECTIONS = {
    "attn_q": ("self_attn.q_proj", "QD"),
    "attn_k": ("self_attn.k_proj", "KD"),
    "attn_v": ("self_attn.v_proj", "KD"),
    "attn_output": ("self_attn.o_proj", "DQ"),
    "ffn_gate": ("mlp.gate_proj", "FD"),
    "ffn_up": ("mlp.up_proj", "FD"),
    "ffn_down": ("mlp.down_proj", "DF"),
}
_NORMS = {
    "llama": {
        "attn_norm": ("input_layernorm", "D"),
        "ffn_norm": ("post_attention_layernorm", "D"),
    },
    "gemma3": {
        "attn_norm": ("input_layernorm", "D"),
        "attn_q_norm": ("self_attn.q_norm", "E"),
        "attn_k_norm": ("self_attn.k_norm", "E"),
        "post_attention_norm": ("post_attention_layernorm", "D"),
        "ffn_norm": ("pre_feedforward_layernorm", "D"),
        "post_ffw_norm": ("post_feedforward_layernorm", "D"),
    },
}
# The keys "<architecture>.*" that are read here or change nothing; any other might change the model.
_KNOWN_KEYS = {
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("expert_count", "expert_used_count", "attention.head_count", "attention.head_count_kv"),
    *("attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon"),
    *("rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type"),
    *("rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned"),
}
_GEMMA3_KEYS = {"attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"}
_SHARD_BYTES = 4 << 30  # beyond this the weights are written as several files with an index
_CHUNK_ELEMENTS = 1 << 24  # dequantised at a time: 64 MiB of float32
_REQUIRED: Any = object()


def import_gguf(file: str | Path, folder: str | Path, *, progress: bool = True) -> Path:
    """Convert the GGUF `file` (architecture llama or gemma3) into the new checkpoint directory `folder`.

    All weights become bfloat16. `folder` must not exist, or be empty, and appears only when all is written.
    Returns `folder`. Raises MissingExtra without the `gguf` package, UnsupportedError for a kind of file that
    is not built, CheckpointError for a broken file, a `folder` in use, or a disk that is full.
    """
    file, folder = Path(file), Path(folder)
    require_gguf()
    if not file.is_file():
        raise CheckpointError(f"There is no GGUF file {file}.")
    with staged(folder) as partial:
        convert(file, partial, progress=progress)
    return folder


def convert(file: Path, folder: Path, *, progress: bool = True) -> None:
    """Write the checkpoint that the GGUF `file` holds into the existing `folder`."""
    source = GGUFFile(file)
    arch = source.get("general.architecture", str)
    if (kind := source.get("general.type", str, "model")) != "model":
        raise UnsupportedError(f"{file} holds no model, but something to use with one ({kind}).")
    if source.get("split.count", int, 1) > 1:
        raise UnsupportedError(f"{file} is one of several pieces: merge them with llama-gguf-split --merge.")
    if arch not in _NORMS:
        known = ", ".join(_NORMS)
        raise UnsupportedError(f"{file}: the architecture {arch!r} is not supported, only {known} are.")
    if source.get(f"{arch}.expert_count", int, 0):
        raise UnsupportedError(f"{file} is a mixture of experts, which is not supported.")
    known = {f"{arch}.{key}" for key in _KNOWN_KEYS | (_GEMMA3_KEYS if arch == "gemma3" else set())}
    if unknown := [key for key in source.keys if key.startswith(f"{arch}.") and key not in known]:
        raise UnsupportedError(f"{file} sets {_some(unknown)}, which is not supported.")

    config = _config(source, arch)
    plan = _plan(source, arch, config)
    write_json(folder / "config.json", config)
    token_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", token_ids | {"_from_model_config": True})
    write_tokenizer(source, folder, config)
    _write_weights(source, folder, config, plan, progress)


# ---- reading


def require_gguf() -> Any:
    """The `gguf` package; without it, the error that says how to get it."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise MissingExtra(
            "Reading GGUF files needs the `gguf` package: pip install 'pop-prefill[gguf]', or in a checkout "
            "pip install -e '.[gguf]'."
        ) from error
    return gguf


class GGUFFile:
    """An open GGUF file: `get` for its metadata, `shapes` and `values` for its tensors. str() is its path."""

    def __init__(self, path: Path):
        gguf = require_gguf()

        class Reader(gguf.GGUFReader):
            def _get(self, offset, dtype, count=1, *args, **kwargs):
                part = super()._get(offset, dtype, count, *args, **kwargs)
                if len(part) != count:  # NumPy cuts slices silently: 2^60 items would be counted through
                    raise ValueError("it ends too early")
                return part

        self.path = path
        with self.sound():
            self._reader = Reader(path)
        if self._reader.byte_order != "I":
            raise UnsupportedError(f"{path} is a big-endian GGUF file, which is not supported.")
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.keys = list(self._reader.fields)
        # HF's order, rows first; GGUF stores the innermost dimension first.
        self.shapes = {name: tuple(tensor.shape.tolist()[::-1]) for name, tensor in self._tensors.items()}

    def __str__(self) -> str:
        return str(self.path)

    @contextlib.contextmanager
    def sound(self) -> Iterator[None]:
        """Broken files meet the `gguf` package with any exception: make each a CheckpointError."""
        try:
            with np.errstate(all="ignore"):
                yield
        except (PopError, OSError, MemoryError):
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{self.path} is not a sound GGUF file ({what}); fetch it again.") from error

    def get(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """The metadata value `key`: of type `kind`, not negative; without a default it must be there."""
        if key not in self._reader.fields:
            if default is _REQUIRED:
                raise CheckpointError(f"{self.path} lacks the metadata {key}.")
            return default
        with self.sound():
            value = self._reader.fields[key].contents()
        if type(value) is not kind or (kind in (int, float) and not 0 <= value < math.inf):
            raise CheckpointError(f"{self.path}: {key} is {str(value)[:60]!r}, no proper {kind.__name__}.")
        return _decimal(value) if kind is float else value

    def values(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A tensor, dequantised and cast to `dtype`; float32 exists only for a chunk of rows at a time."""
        from gguf.quants import dequantize

        shape, kind = self.shapes[name], self._tensors[name].tensor_type
        with self.sound():
            values = torch.empty(shape, dtype=dtype)
            stored, rows = np.atleast_2d(self._tensors[name].data), values.view(-1, shape[-1])
            step = max(1, _CHUNK_ELEMENTS // shape[-1])
            for i in range(0, len(rows), step):
                rows[i : i + step] = torch.from_numpy(np.array(dequantize(stored[i : i + step], kind)))
            if not values.isfinite().all():
                raise ValueError(f"{name} has values that are not finite")
        return values


def _decimal(value: float) -> float:
    """The shortest decimal that rounds to the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


# ---- config.json


def _config(source: GGUFFile, arch: str) -> dict[str, Any]:
    """config.json, in the dialect of transformers 4, with the fields that published checkpoints have."""

    def get(key: str, kind: type, default: Any = _REQUIRED) -> Any:
        return source.get(f"{arch}.{key}", kind, default)

    width, heads = get("embedding_length", int), get("attention.head_count", int)
    kv_heads = get("attention.head_count_kv", int, heads)
    if not width or not heads or not kv_heads or heads % kv_heads:
        raise CheckpointError(f"{source}: width {width}, {heads} heads and {kv_heads} KV heads do not fit.")
    head_dim = get("attention.key_length", int, width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, int, head_dim) != head_dim or head_dim % 2:
            raise UnsupportedError(f"{source}: {arch}.{key} must be the head width ({head_dim}), and even.")
    if "token_embd.weight" not in source.shapes:
        raise CheckpointError(f"{source} lacks the tensor token_embd.weight.")
    base = get("rope.freq_base", float, {"llama": 1e4, "gemma3": 1e6}[arch])
    ends = [source.get(f"tokenizer.ggml.{name}_token_id", int, None) for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(token_id for token_id in ends if token_id is not None))  # each once
    config = {
        "vocab_size": math.prod(source.shapes["token_embd.weight"]) // width,
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length", int),
        "num_hidden_layers": get("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length", int),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon", float),
        "rope_theta": base,
        "rope_scaling": _rope_scaling(source, arch, base, head_dim),
        "tie_word_embeddings": "output.weight" not in source.shapes,
        "attention_bias": "blk.0.attn_q.bias" in source.shapes,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": source.get("tokenizer.ggml.bos_token_id", int, None),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": source.get("tokenizer.ggml.padding_token_id", int, None),
        "torch_dtype": "bfloat16",
    }
    if arch == "llama":
        config |= {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "mlp_bias": "blk.0.ffn_up.bias" in source.shapes,
            "pretraining_tp": 1,
        }
    else:
        config |= {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": get("attention.sliding_window", int),
            "sliding_window_pattern": get("attention.sliding_window_pattern", int, 6),
            "rope_local_base_freq": get("rope.freq_base_swa", float, 1e4),
            # Not in the file; as in llama.cpp, the 62 layers tell the 27b model, the only exception.
            "query_pre_attn_scalar": width // heads if config["num_hidden_layers"] == 62 else head_dim,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        }
    return config


def _rope_scaling(source: GGUFFile, arch: str, base: float, head_dim: int) -> dict[str, Any] | None:
    """rope_scaling: None, the linear kind, or Llama-3.1's, of which the file holds only the divisors."""
    factor = source.get(f"{arch}.rope.scale_linear", float, 1.0)  # the older key
    factor = source.get(f"{arch}.rope.scaling.factor", float, factor)
    kind = source.get(f"{arch}.rope.scaling.type", str, "linear" if factor != 1 else "none")
    if kind not in ("none", "linear"):
        raise UnsupportedError(f"{source}: the RoPE scaling {kind!r} is not supported.")
    linear = {"rope_type": "linear", "factor": factor} if kind == "linear" and factor != 1 else None
    if arch != "llama" or "rope_freqs.weight" not in source.shapes:
        return linear
    # Llama-3.1 keeps the frequencies that turn more than `high` times within the original context, divides by
    # `factor` those that turn less than `low` times, and interpolates between. All its models have the same
    # low, high and original context; divisors that these do not reproduce are refused.
    low, high = 1.0, 4.0
    original = source.get("llama.rope.scaling.original_context_length", int, 8192)
    divisors = source.values("rope_freqs.weight", torch.float32).numpy()
    factor = _decimal(divisors.flat[-1])
    with source.sound():
        turns = original / (2 * math.pi) * base ** -(np.arange(0, head_dim, 2) / head_dim)
        kept = np.clip((turns - low) / (high - low), 0, 1)
        expected = 1 / (kept + (1 - kept) / factor)
    if linear or divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4, atol=0):
        raise UnsupportedError(f"{source}: rope_freqs.weight is not the RoPE scaling of Llama-3.1.")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


# ---- weights


def _plan(source: GGUFFile, arch: str, config: dict[str, Any]) -> dict[str, str]:
    """HF name -> GGUF name of all tensors, in the model's order; none missing, surplus or mis-shaped."""
    sizes = {"V": config["vocab_size"], "D": config["hidden_size"], "F": config["intermediate_size"]}
    sizes["E"] = config["head_dim"]
    sizes["Q"] = config["num_attention_heads"] * config["head_dim"]
    sizes["K"] = config["num_key_value_heads"] * config["head_dim"]
    layers = config["num_hidden_layers"]
    if layers > len(source.shapes):  # else an absurd number would be counted through
        raise CheckpointError(f"{source} has fewer tensors than its {layers} layers.")
    wanted = {"token_embd.weight": ("model.embed_tokens.weight", "VD")}
    for n in range(layers):
        for name, (hf_name, shape) in (_PROJECTIONS | _NORMS[arch]).items():
            wanted[f"blk.{n}.{name}.weight"] = (f"model.layers.{n}.{hf_name}.weight", shape)
        for name, (hf_name, shape) in _PROJECTIONS.items():
            if config.get("attention_bias" if name.startswith("attn") else "mlp_bias"):
                wanted[f"blk.{n}.{name}.bias"] = (f"model.layers.{n}.{hf_name}.bias", shape[0])
    wanted["output_norm.weight"] = ("model.norm.weight", "D")
    if not config["tie_word_embeddings"]:
        wanted["output.weight"] = ("lm_head.weight", "VD")

    known = set(wanted) | ({"rope_freqs.weight"} if arch == "llama" else set())
    if missing := [name for name in wanted if name not in source.shapes]:
        raise CheckpointError(f"{source} lacks the tensors {_some(missing)}.")
    if surplus := [name for name in source.shapes if name not in known]:
        raise CheckpointError(f"{source} has tensors that the architecture {arch} does not: {_some(surplus)}.")
    for name, (_, letters) in wanted.items():
        shape, found = tuple(sizes[letter] for letter in letters), source.shapes[name]
        if found != shape:
            raise CheckpointError(f"{source}: {name} has the shape {found}, but by the metadata it is {shape}.")
    return {hf_name: name for name, (hf_name, _) in wanted.items()}


def _write_weights(
    source: GGUFFile, folder: Path, config: dict[str, Any], plan: dict[str, str], progress: bool
) -> None:
    """model.safetensors, or shards with an index. One shard at a time is in memory."""
    nbytes = {hf_name: 2 * math.prod(source.shapes[name]) for hf_name, name in plan.items()}
    shards: list[list[str]] = [[]]
    for hf_name in plan:
        if shards[-1] and sum(nbytes[other] for other in shards[-1]) + nbytes[hf_name] > _SHARD_BYTES:
            shards.append([])
        shards[-1].append(hf_name)
    weight_map = {}
    with progress_bar(f"converting {source.path.name}", len(plan), "tensors", progress) as step:
        for n, hf_names in enumerate(shards, start=1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{n:05}-of-{len(shards):05}.safetensors"
            weights = {}
            for hf_name in hf_names:
                weights[hf_name] = _hf_weight(source, config, plan[hf_name], hf_name)
                weight_map[hf_name] = file
                step(1)
            save_file(weights, folder / file, metadata={"format": "pt"})
            shutil.copymode(folder / "config.json", folder / file)  # safetensors lets only the owner read it
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(nbytes.values())}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def _hf_weight(source: GGUFFile, config: dict[str, Any], name: str, hf_name: str) -> torch.Tensor:
    """The bfloat16 tensor as HF stores it: what llama.cpp's converter changed is changed back."""
    if config["model_type"] == "gemma3_text" and name.endswith("norm.weight"):
        return (source.values(name, torch.float32) - 1).bfloat16()  # GGUF holds 1 + w, HF w
    weight = source.values(name, torch.bfloat16)
    heads = {".q_proj.": config["num_attention_heads"], ".k_proj.": config["num_key_value_heads"]}
    for projection in heads:
        if config["model_type"] == "llama" and projection in hf_name:
            # RoPE turns pairs of rows of a head: (0, 1), (2, 3) ... in GGUF, (0, E/2), (1, E/2 + 1) ... in HF
            pairs = weight.view(heads[projection], -1, 2, math.prod(weight.shape[1:]))  # [H, E/2, 2, D or 1]
            weight = pairs.transpose(1, 2).reshape(weight.shape)  # [H, 2, E/2, D or 1] -> [H * E, D] or [H * E]
    return weight


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
