"""GGUF files: a table of metadata and a list of tensors, often quantised, under llama.cpp's names.

1. Write config.json from the metadata. Metadata of the architecture that nothing has read are refused.
2. Compare the tensors with the parameters of the model that config.json describes.
3. Write the tokenizer's files (gguf_tokenizer.py).
4. Dequantise the tensors, undo what llama.cpp's converter did to them, and round them to bfloat16.

The whole model is in memory meanwhile, as it is when it runs. The files are read with the package `gguf`.
"""

import contextlib
import math
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from pop.errors import CheckpointError, MissingExtra, PopError, UnsupportedError, import_extra, some
from pop.models.config import RopeConfig
from pop.models.layers import rope_frequencies
from pop.system.progress import progress_bar
from tools.convert.checkpoint import parameter_shapes, separated_halves, write_config, write_weights
from tools.convert.gguf_tokenizer import write_tokenizer

ARCHITECTURES = ("llama", "gemma3")
HARMLESS = ("vocab_size", "rope.scaling.finetuned", "rope.scaling.original_context_length")  # metadata to ignore
ROPE_FREQUENCIES = "rope_freqs.weight"  # the divisors of Llama-3.1's scaled RoPE


def write(file: Path, folder: Path, progress: bool) -> None:
    """Write the checkpoint in the GGUF `file` into the existing `folder`, with weights in bfloat16.

    Raises UnsupportedError, which names what `pop` does not run, or CheckpointError for a file that is not sound.
    """
    source = GGUFFile(file)
    arch = _supported_architecture(source)
    config = _config(source, arch)
    _refuse_unread(source, arch)
    tensors = _match_tensors(source, arch, config)
    write_config(config, folder)
    with source.sound():
        write_tokenizer(source, folder, config)
    weights = {}
    with progress_bar(f"converting {file.name}", len(tensors), "tensors", progress) as step:
        for hf_name, name in tensors.items():
            weights[hf_name] = _hf_weight(source, config, name, hf_name)
            step(1)
    write_weights(weights, folder / "model.safetensors")


def require_gguf() -> ModuleType:
    """Return the package `gguf`, or raise MissingExtra."""
    gguf = import_extra("gguf", "gguf >= 0.16.2", "demo")
    if not hasattr(gguf.MODEL_ARCH, "GEMMA3"):
        raise MissingExtra(f"gguf {version('gguf')} is too old; run `pip install 'pop-prefill[demo]'`")
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
            self.reader = Reader(path)
        if self.reader.byte_order != "I":
            raise UnsupportedError(f"{path} is a big-endian GGUF file, which is not supported")
        self._tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        self.unread = set(self.reader.fields)  # keys that `get` has not been asked for
        # GGUF stores the innermost dimension first, Hugging Face's layout the outermost.
        self.shapes = {name: tuple(tensor.shape.tolist()[::-1]) for name, tensor in self._tensors.items()}

    @contextlib.contextmanager
    def sound(self) -> Iterator[None]:
        """Turn any exception into a CheckpointError. The package `gguf` raises all kinds for a broken file."""
        try:
            with np.errstate(all="ignore"):
                yield
        except (PopError, OSError, MemoryError):
            raise
        except NotImplementedError as error:
            raise UnsupportedError(
                f"{self.path} has tensors of a type that the package gguf cannot read ({error}); take another file"
            ) from None
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{self.path} is not a sound GGUF file ({what}); fetch it again") from error

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        """Return the metadata value `key`, which must be of type `kind` and, if it is a number, not negative."""
        self.unread.discard(key)
        if key not in self.reader.fields:
            if default is ...:
                raise CheckpointError(f"{self.path} lacks the metadata {key}; fetch it again")
            return default
        with self.sound():
            value = self.reader.fields[key].contents()
        is_number = kind in (int, float)
        if type(value) is not kind or (is_number and not 0 <= value < math.inf):
            raise CheckpointError(f"{self.path}: {key} is {str(value)[:60]!r}, not a valid {kind.__name__}")
        return _shortest_decimal(value) if kind is float else value

    def values(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor, dequantised and cast to `dtype`."""
        tensor = self._tensors[name]
        with self.sound():
            values = require_gguf().quants.dequantize(tensor.data, tensor.tensor_type)
            values = torch.from_numpy(np.array(values)).to(dtype).view(self.shapes[name])
            if not values.isfinite().all():
                raise ValueError(f"{name} has values that are not finite")
        return values


def _shortest_decimal(value: float) -> float:
    """Return the shortest decimal that rounds to the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _supported_architecture(source: GGUFFile) -> str:
    kind = source.get("general.type", str, "model")
    if kind != "model":
        raise UnsupportedError(f"{source.path}: general.type is {kind!r}; only model files can be converted")
    pieces = source.get("split.count", int, 1)
    if pieces > 1:
        raise UnsupportedError(f"{source.path} is one of {pieces} pieces; merge them with llama-gguf-split --merge")
    arch = source.get("general.architecture", str)
    if arch not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedError(f"{source.path}: the architecture {arch!r} is not supported (supported: {known})")
    return arch


def _refuse_unread(source: GGUFFile, arch: str) -> None:
    """Refuse metadata of the architecture that `_config` has not read, because any of them might change the model."""
    harmless = {f"{arch}.{name}" for name in HARMLESS}
    unread = [key for key in source.unread if key.startswith(f"{arch}.") and key not in harmless]
    if unread:
        raise UnsupportedError(f"{source.path} sets {some(sorted(unread))}, which is not supported")


def _config(source: GGUFFile, arch: str) -> dict[str, Any]:
    """Return the contents of config.json, with the field names of transformers 4."""

    def get(key: str, kind: type, default: Any = ...) -> Any:
        return source.get(f"{arch}.{key}", kind, default)

    width = get("embedding_length", int)
    heads = get("attention.head_count", int)
    head_dim = get("attention.key_length", int, width // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        value = get(key, int, head_dim)
        if value != head_dim:
            raise UnsupportedError(f"{source.path}: {arch}.{key} is {value}; it must be the head width {head_dim}")
    rope_base = get("rope.freq_base", float, {"llama": 1e4, "gemma3": 1e6}[arch])
    embedding = source.shapes.get("token_embd.weight", (0,))
    config = {
        "vocab_size": embedding[0],
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length", int),
        "num_hidden_layers": get("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length", int),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon", float),
        "rope_theta": rope_base,
        "rope_scaling": _rope_scaling(source, arch, rope_base, head_dim),
        "tie_word_embeddings": "output.weight" not in source.shapes,
        "attention_bias": "blk.0.attn_q.bias" in source.shapes,
        "bos_token_id": source.get("tokenizer.ggml.bos_token_id", int, None),
        "eos_token_id": _end_tokens(source),
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
    # The file does not state the scale of the scores. As in llama.cpp, 62 layers mean the 27b model, the one exception.
    is_27b = config["num_hidden_layers"] == 62
    return config | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": get("attention.sliding_window", int),
        "sliding_window_pattern": get("attention.sliding_window_pattern", int, 6),
        "rope_local_base_freq": get("rope.freq_base_swa", float, 1e4),
        "query_pre_attn_scalar": width // max(heads, 1) if is_27b else head_dim,
    }


def _end_tokens(source: GGUFFile) -> int | list[int] | None:
    """Return the ids of the tokens that end a text, a turn and a message, without duplicates."""
    ends = []
    for name in ("eos", "eot", "eom"):
        token_id = source.get(f"tokenizer.ggml.{name}_token_id", int, None)
        if token_id is not None and token_id not in ends:
            ends.append(token_id)
    if len(ends) == 1:
        return ends[0]
    return ends or None


def _rope_scaling(source: GGUFFile, arch: str, base: float, head_dim: int) -> dict[str, Any] | None:
    """Return rope_scaling: None, linear, or Llama-3.1's, of which the file holds only the divisors."""
    older_factor = source.get(f"{arch}.rope.scale_linear", float, 1.0)
    factor = source.get(f"{arch}.rope.scaling.factor", float, older_factor)
    kind = source.get(f"{arch}.rope.scaling.type", str, "linear" if factor != 1 else "none")
    if kind not in ("none", "linear"):
        raise UnsupportedError(f"{source.path}: {arch}.rope.scaling.type is {kind!r}, which is not supported")
    linear = None
    if kind == "linear" and factor != 1:
        linear = {"rope_type": "linear", "factor": factor}
    if arch != "llama" or ROPE_FREQUENCIES not in source.shapes:
        return linear
    # All Llama-3.1 models share the other parameters of RopeConfig. These must reproduce the divisors.
    divisors = source.values(ROPE_FREQUENCIES, torch.float32)
    factor = _shortest_decimal(divisors.flatten()[-1].item())
    original = source.get("llama.rope.scaling.original_context_length", int, 8192)
    rope = RopeConfig(base, "llama3", max(factor, 1.0), original_max_positions=original)
    expected = rope_frequencies(RopeConfig(base), head_dim, "cpu") / rope_frequencies(rope, head_dim, "cpu")
    if linear or divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-4, atol=0):
        raise UnsupportedError(f"{source.path}: {ROPE_FREQUENCIES} is not the RoPE scaling of Llama-3.1")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": original,
    }


def _match_tensors(source: GGUFFile, arch: str, config: dict[str, Any]) -> dict[str, str]:
    """Return the name in GGUF of each parameter. Raise CheckpointError for a missing, surplus or mis-shaped tensor."""
    shapes = parameter_shapes(config, source.path)
    gguf = require_gguf()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config["num_hidden_layers"])
    tensors = {hf_name: names.get_name(hf_name, (".weight", ".bias")) for hf_name in shapes}
    known = set(tensors.values())
    if arch == "llama":
        known.add(ROPE_FREQUENCIES)
    missing = [name for name in tensors.values() if name not in source.shapes]
    if missing:
        raise CheckpointError(f"{source.path} lacks the tensors {some(missing)}; fetch it again")
    surplus = [name for name in source.shapes if name not in known]
    if surplus:
        raise CheckpointError(f"{source.path} has tensors that the architecture {arch} does not: {some(surplus)}")
    for hf_name, name in tensors.items():
        found = source.shapes[name]
        shape = shapes[hf_name]
        if found != shape:
            raise CheckpointError(f"{source.path}: {name} has the shape {found}, but the metadata imply {shape}")
    return tensors


def _hf_weight(source: GGUFFile, config: dict[str, Any], name: str, hf_name: str) -> torch.Tensor:
    """Return a tensor in bfloat16 as Hugging Face's layout stores it, with llama.cpp's changes undone."""
    if config["model_type"] == "gemma3_text" and name.endswith("norm.weight"):
        return (source.values(name, torch.float32) - 1).bfloat16()  # GGUF holds 1 + w
    weight = source.values(name, torch.bfloat16)
    if config["model_type"] == "llama" and hf_name.split(".")[-2] in ("q_proj", "k_proj"):
        return separated_halves(weight, config["head_dim"])
    return weight
