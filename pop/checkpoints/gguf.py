"""Convert GGUF files into the HF checkpoint layout: config.json, generation_config.json, safetensors, tokenizer.

A GGUF file holds a table of metadata and a list of tensors, often quantised, under llama.cpp's names.

1. Write a complete config.json from the metadata. Refuse metadata that is left over.
2. Compare the tensors with those of the model that config.json describes.
3. Dequantise the tensors, undo what llama.cpp's converter did to them, and round them to bfloat16.
4. Rebuild the tokenizer's files (gguf_tokenizer.py).
"""

import contextlib
import math
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from pop.checkpoints.config_json import READERS
from pop.checkpoints.fields import Fields
from pop.checkpoints.gguf_tokenizer import write_tokenizer
from pop.errors import CheckpointError, ConfigError, MissingExtra, PopError, UnsupportedError, import_extra, some
from pop.models import build
from pop.models.config import RopeConfig
from pop.models.layers import rope_frequencies
from pop.system.files import staged, write_json
from pop.system.progress import progress_bar

_HARMLESS = ("vocab_size", "rope.scaling.finetuned", "rope.scaling.original_context_length")


def import_gguf(file: str | Path, folder: str | Path, *, progress: bool = True) -> Path:
    """Convert a GGUF file into a new checkpoint directory with bfloat16 weights; return that directory.

    Args:
        file: A GGUF file of the architecture llama or gemma3. UnsupportedError names what `pop` does not read.
        folder: It must not exist, or be empty. It appears only when everything is written.
        progress: Whether to show a bar on stderr.
    """
    file, folder = Path(file), Path(folder)
    require_gguf()
    if not file.is_file():
        raise CheckpointError(f"there is no GGUF file {file}; give the path of one")
    with staged(folder) as partial:
        convert(file, partial, progress=progress)
    return folder


def convert(file: Path, folder: Path, *, progress: bool = True) -> None:
    """Write the checkpoint that the GGUF `file` holds into the existing `folder`."""
    source = GGUFFile(file)
    arch = source.get("general.architecture", str)
    if (kind := source.get("general.type", str, "model")) != "model":
        raise UnsupportedError(f"{file}: general.type is {kind!r}; only model files can be imported")
    if (count := source.get("split.count", int, 1)) > 1:
        raise UnsupportedError(f"{file} is one of {count} pieces; merge them with llama-gguf-split --merge")
    if arch not in ("llama", "gemma3"):
        raise UnsupportedError(f"{file}: the architecture {arch!r} is not supported (supported: llama, gemma3)")
    config = _config(source, arch)
    unknown = [key for key in source.unread if key.startswith(f"{arch}.") and key[len(arch) + 1 :] not in _HARMLESS]
    if unknown:  # any of them might change the model
        raise UnsupportedError(f"{file} sets {some(sorted(unknown))}, which is not supported")
    tensors = _tensors(source, arch, config)
    write_json(folder / "config.json", config)
    token_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", token_ids | {"_from_model_config": True})
    with source.sound():
        write_tokenizer(source, folder, config)
    weights = {}  # the whole model is in memory meanwhile, as it is when it runs
    with progress_bar(f"converting {source.path.name}", len(tensors), "tensors", progress) as step:
        for hf_name, name in tensors.items():
            weights[hf_name] = _hf_weight(source, config, name, hf_name)
            step(1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors lets only the owner read it


def require_gguf() -> Any:
    """Return the `gguf` package, or raise MissingExtra."""
    gguf = import_extra("gguf", "gguf >= 0.16.2", "gguf")
    if not hasattr(gguf.MODEL_ARCH, "GEMMA3"):
        raise MissingExtra(f"gguf {version('gguf')} is too old; run `pip install 'pop-prefill[gguf]'`")
    return gguf


class GGUFFile:
    """An open GGUF file: `get` reads its metadata, `shapes` and `values` its tensors."""

    def __init__(self, path: Path):
        gguf = require_gguf()

        class Reader(gguf.GGUFReader):
            def _get(self, offset, dtype, count=1, *args, **kwargs):
                part = super()._get(offset, dtype, count, *args, **kwargs)
                if len(part) != count:  # NumPy shortens slices silently, and the reader would loop over 2^60 items
                    raise ValueError("it ends too early")
                return part

        self.path = path
        with self.sound():
            self._reader = Reader(path)
        if self._reader.byte_order != "I":
            raise UnsupportedError(f"{path} is a big-endian GGUF file, which is not supported")
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.unread = set(self._reader.fields)  # keys that `get` has not been asked for
        # GGUF stores the innermost dimension first, HF the outermost.
        self.shapes = {name: tuple(tensor.shape.tolist()[::-1]) for name, tensor in self._tensors.items()}

    @contextlib.contextmanager
    def sound(self) -> Iterator[None]:
        """Turn any exception into a CheckpointError. The `gguf` package raises all kinds for a broken file."""
        try:
            with np.errstate(all="ignore"):
                yield
        except (PopError, OSError, MemoryError):
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{self.path} is not a sound GGUF file ({what}); fetch it again") from error

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        """Return the metadata value `key`, which must be of type `kind` and, if it is a number, not negative."""
        self.unread.discard(key)
        if key not in self._reader.fields:
            if default is ...:
                raise CheckpointError(f"{self.path} lacks the metadata {key}; fetch it again")
            return default
        with self.sound():
            value = self._reader.fields[key].contents()
        if type(value) is not kind or (kind in (int, float) and not 0 <= value < math.inf):
            raise CheckpointError(f"{self.path}: {key} is {str(value)[:60]!r}, not a valid {kind.__name__}")
        return _decimal(value) if kind is float else value

    def values(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor, dequantised and cast to `dtype`."""
        tensor = self._tensors[name]
        with self.sound():
            values = require_gguf().quants.dequantize(tensor.data, tensor.tensor_type)
            values = torch.from_numpy(np.array(values)).to(dtype).view(self.shapes[name])
            if not values.isfinite().all():
                raise ValueError(f"{name} has values that are not finite")
        return values


def _decimal(value: float) -> float:
    """Return the shortest decimal that rounds to the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _config(source: GGUFFile, arch: str) -> dict[str, Any]:
    """Return config.json, with the field names of transformers 4."""

    def get(key: str, kind: type, default: Any = ...) -> Any:
        return source.get(f"{arch}.{key}", kind, default)

    width, heads = get("embedding_length", int), get("attention.head_count", int)
    head_dim = get("attention.key_length", int, width // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if (value := get(key, int, head_dim)) != head_dim:
            raise UnsupportedError(f"{source.path}: {arch}.{key} is {value}; it must be the head width {head_dim}")
    base = get("rope.freq_base", float, {"llama": 1e4, "gemma3": 1e6}[arch])
    ends = [source.get(f"tokenizer.ggml.{name}_token_id", int, None) for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(token_id for token_id in ends if token_id is not None))  # without duplicates
    config = {
        "vocab_size": next(iter(source.shapes.get("token_embd.weight", ())), 0),
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length", int),
        "num_hidden_layers": get("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length", int),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon", float),
        "rope_theta": base,
        "rope_scaling": _rope_scaling(source, arch, base, head_dim),
        "tie_word_embeddings": "output.weight" not in source.shapes,
        "attention_bias": "blk.0.attn_q.bias" in source.shapes,
        "bos_token_id": source.get("tokenizer.ggml.bos_token_id", int, None),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": source.get("tokenizer.ggml.padding_token_id", int, None),
        "torch_dtype": "bfloat16",
    }
    if arch == "llama":
        return config | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "mlp_bias": "blk.0.ffn_up.bias" in source.shapes,
        }
    return config | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": get("attention.sliding_window", int),
        "sliding_window_pattern": get("attention.sliding_window_pattern", int, 6),
        "rope_local_base_freq": get("rope.freq_base_swa", float, 1e4),
        # The file does not say. As in llama.cpp, 62 layers mean the 27b model, which is the only exception.
        "query_pre_attn_scalar": width // max(heads, 1) if get("block_count", int) == 62 else head_dim,
    }


def _rope_scaling(source: GGUFFile, arch: str, base: float, head_dim: int) -> dict[str, Any] | None:
    """Return rope_scaling: None, linear, or Llama-3.1's, of which the file holds only the divisors."""
    factor = source.get(f"{arch}.rope.scale_linear", float, 1.0)  # the older key
    factor = source.get(f"{arch}.rope.scaling.factor", float, factor)
    kind = source.get(f"{arch}.rope.scaling.type", str, "linear" if factor != 1 else "none")
    if kind not in ("none", "linear"):
        raise UnsupportedError(f"{source.path}: {arch}.rope.scaling.type is {kind!r}, which is not supported")
    linear = {"rope_type": "linear", "factor": factor} if kind == "linear" and factor != 1 else None
    if arch != "llama" or "rope_freqs.weight" not in source.shapes:
        return linear
    # All Llama-3.1 models share the other parameters of RopeConfig. These must reproduce the divisors.
    divisors = source.values("rope_freqs.weight", torch.float32)
    factor = _decimal(divisors.flatten()[-1].item())
    original = source.get("llama.rope.scaling.original_context_length", int, 8192)
    rope = RopeConfig(base, "llama3", max(factor, 1.0), original_max_positions=original)
    expected = rope_frequencies(RopeConfig(base), head_dim, "cpu") / rope_frequencies(rope, head_dim, "cpu")
    if linear or divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-4, atol=0):
        raise UnsupportedError(f"{source.path}: rope_freqs.weight is not the RoPE scaling of Llama-3.1")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": original,
    }


def _tensors(source: GGUFFile, arch: str, config: dict[str, Any]) -> dict[str, str]:
    """Return HF name -> GGUF name of all tensors. Raise CheckpointError for a missing, surplus or mis-shaped one."""
    try:
        with torch.device("meta"):
            module = build(READERS[config["model_type"]](Fields(config)))
    except ConfigError as error:
        raise CheckpointError(f"{source.path} describes no model: {error}; fetch it again") from None
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    gguf = require_gguf()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config["num_hidden_layers"])
    tensors = {hf_name: names.get_name(hf_name, (".weight", ".bias")) for hf_name in shapes}
    known = {*tensors.values(), *(["rope_freqs.weight"] if arch == "llama" else [])}
    if missing := [name for name in tensors.values() if name not in source.shapes]:
        raise CheckpointError(f"{source.path} lacks the tensors {some(missing)}; fetch it again")
    if surplus := [name for name in source.shapes if name not in known]:
        raise CheckpointError(f"{source.path} has tensors that the architecture {arch} does not: {some(surplus)}")
    for hf_name, name in tensors.items():
        found, shape = source.shapes[name], shapes[hf_name]
        if found != shape:
            raise CheckpointError(f"{source.path}: {name} has the shape {found}, but the metadata imply {shape}")
    return tensors


def _hf_weight(source: GGUFFile, config: dict[str, Any], name: str, hf_name: str) -> torch.Tensor:
    """Return the bfloat16 tensor as HF stores it, with the changes of llama.cpp's converter undone."""
    if config["model_type"] == "gemma3_text" and name.endswith("norm.weight"):
        return (source.values(name, torch.float32) - 1).bfloat16()  # GGUF holds 1 + w, HF w
    weight = source.values(name, torch.bfloat16)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    projection = hf_name.split(".")[-2]
    if config["model_type"] == "llama" and projection in heads:
        # RoPE rotates pairs of rows of a head: (0, 1), (2, 3) ... in GGUF, (0, E/2), (1, E/2 + 1) ... in HF
        pairs = weight.view(heads[projection], -1, 2, math.prod(weight.shape[1:]))  # [H, E/2, 2, D or 1]
        weight = pairs.transpose(1, 2).reshape(weight.shape)  # [H, 2, E/2, D or 1] -> [H * E, D] or [H * E]
    return weight
