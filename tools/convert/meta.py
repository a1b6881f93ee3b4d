"""Meta's layout: params.json, weights in consolidated.NN.pth, and tokenizer.model.

This is the only code that reads a pickle. It is loaded with weights_only=True, so it can hold tensors and no code.
There is one file of weights for each rank of tensor parallelism. params.json leaves some facts open, and FACTORS and
`read_params` state them. The whole model is in memory meanwhile.
"""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from pop.checkpoints.config_json import read_fields
from pop.checkpoints.fields import Fields
from pop.errors import CheckpointError, ConfigError, some
from pop.system.files import refuse_pointers
from pop.system.progress import progress_bar
from tools.convert.checkpoint import parameter_shapes, separated_halves, write_config, write_weights
from tools.convert.meta_tokenizer import write_tokenizer

# The factor of the scaled RoPE by (dim, n_layers): of Llama-3.1 and 3.3, then of Llama-3.2, which ties its head.
FACTORS = {(4096, 32): 8.0, (8192, 80): 8.0, (16384, 126): 8.0, (2048, 16): 32.0, (3072, 28): 32.0}
LLAMA32_FACTOR = 32.0
NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
NEIGHBOURS = ("q_proj.weight", "k_proj.weight")  # in Meta's files, RoPE rotates neighbouring rows of a head
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Parts = list[torch.Tensor]  # one tensor's part in each file, by rank


def write(source: Path, folder: Path, progress: bool) -> None:
    """Write the checkpoint in the folder `source` into the existing `folder`, with weights in bfloat16.

    Raises ConfigError for params.json, CheckpointError for weights that are broken or not those of params.json, and
    TokenizerError for tokenizer.model.
    """
    refuse_pointers(source)
    config = read_fields(source / "params.json", read_params, None)
    shapes = parameter_shapes(config, source)
    stored = _read_parts(source)
    _drop_tied_head(stored, config, source)
    _check_names(stored, shapes, source)
    write_config(config, folder)
    weights = {}
    with progress_bar(f"converting {source.name}", len(shapes), "tensors", progress) as step:
        for name, shape in shapes.items():
            weight = _joined(name, stored.pop(name), shape, source).bfloat16()
            if name.endswith(NEIGHBOURS):
                weight = separated_halves(weight, config["head_dim"])
            weights[name] = weight.contiguous()
            step(1)
    write_weights(weights, folder / "model.safetensors")
    if (source / "tokenizer.model").is_file():
        write_tokenizer(source / "tokenizer.model", folder)


# ---- params.json ----


def read_params(fields: Fields) -> dict[str, Any]:
    """Return config.json for the params.json of Llama 3 or later. Older files lack vocab_size or rope_theta."""
    dim = fields.integer("dim")
    num_layers = fields.integer("n_layers")
    num_heads = fields.integer("n_heads")
    vocab_size = fields.integer("vocab_size")
    if dim % num_heads:
        raise ConfigError(f"dim ({dim}) is not a multiple of n_heads ({num_heads})")
    published_factor = FACTORS.get((dim, num_layers))
    rope_scaling = None
    if fields.boolean("use_scaled_rope"):
        if published_factor is None and "rope_scaling_factor" not in fields.left:
            where = f"dim {dim} with n_layers {num_layers} is not published"
            raise ConfigError(f"rope_scaling_factor is missing, and {where}")
        rope_scaling = {
            "rope_type": "llama3",
            "factor": fields.number("rope_scaling_factor", published_factor),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": dim,
        "intermediate_size": _mlp_width(fields, dim),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.integer("n_kv_heads", num_heads),
        "head_dim": dim // num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 131_072 if rope_scaling else 8192,
        "rms_norm_eps": fields.number("norm_eps", 1e-5),
        "rope_theta": fields.number("rope_theta"),
        "rope_scaling": rope_scaling,
        "tie_word_embeddings": published_factor == LLAMA32_FACTOR,
        "torch_dtype": "bfloat16",
    }
    if vocab_size == 128_256:  # Llama 3's tokenizer
        config["bos_token_id"] = 128_000
        config["eos_token_id"] = [128_001, 128_008, 128_009]
    return config


def _mlp_width(fields: Fields, dim: int) -> int:
    """A SwiGLU MLP has three matrices. At 2/3 of the width 4 * dim it is as large as a plain MLP with two."""
    multiple = fields.integer("multiple_of", 256)
    factor = fields.number("ffn_dim_multiplier", 1.0)
    width = int(factor * int(2 * (4 * dim) / 3))
    return (width + multiple - 1) // multiple * multiple  # rounded up


# ---- Weights ----


def _read_parts(source: Path) -> dict[str, Parts]:
    """Return the parts of each tensor by its name in Hugging Face's layout, mapped into memory."""
    files = sorted(source.glob("consolidated.*.pth"))
    if not files:
        raise CheckpointError(f"{source} holds no weights, such as consolidated.00.pth; fetch them")
    stored = {}
    for rank, file in enumerate(files):
        if file.name != f"consolidated.{rank:02d}.pth":
            raise CheckpointError(f"{source} holds {file.name}, but no consolidated.{rank:02d}.pth; fetch it")
        for name, tensor in load(file).items():
            if not name.endswith("rope.freqs"):  # a table in old files, which follows from the config
                stored.setdefault(hf_name(name), []).append(tensor)
    return stored


def hf_name(name: str) -> str:
    """Return the name of one of Meta's tensors in Hugging Face's layout. An unknown name stays as it is."""
    match = re.fullmatch(r"(layers\.\d+\.|)(.+)\.weight", name)
    if match is None or match[2] not in NAMES:
        return name
    layer = f"model.{match[1]}" if match[1] else ""
    return f"{layer}{NAMES[match[2]]}.weight"


def load(file: Path) -> dict[str, torch.Tensor]:
    """Map the tensors of a file into memory. Its checksums must hold, because torch does not look at them."""
    try:
        with zipfile.ZipFile(file) as archive:
            if any(entry.compress_type for entry in archive.infolist()) or archive.testzip():
                raise ValueError("wrong checksum or compressed")
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        for name, tensor in tensors.items():
            is_dense = tensor.is_cpu and tensor.layout == torch.strided and not tensor.is_nested
            if not isinstance(name, str) or not is_dense:
                raise ValueError("not a dictionary of dense tensors")
    except pickle.UnpicklingError:  # torch's message advises to load the file without weights_only
        raise CheckpointError(f"{file} holds more than tensors, or is corrupt; it is not read") from None
    except Exception as error:  # corrupt bytes can raise nearly anything
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise CheckpointError(f"{file} is truncated or corrupt, fetch it again ({reason:.200})") from None
    return tensors


def _drop_tied_head(stored: dict[str, Parts], config: dict[str, Any], source: Path) -> None:
    """Leave out a head that repeats the embedding, if the model's head is its embedding."""
    if not config["tie_word_embeddings"] or "lm_head.weight" not in stored:
        return
    head = stored.pop("lm_head.weight")
    embedding = stored.get("model.embed_tokens.weight", [])
    if len(head) != len(embedding) or not all(map(torch.equal, head, embedding)):
        raise CheckpointError(f"{source}: output.weight should repeat tok_embeddings.weight, but differs")


def _check_names(stored: dict[str, Parts], shapes: dict[str, tuple[int, ...]], source: Path) -> None:
    """Raise CheckpointError, which names all missing and surplus tensors, and those that hold no floats."""
    faults = {
        "missing": [name for name in shapes if name not in stored],
        "surplus": [name for name in stored if name not in shapes],
        "of a wrong dtype": [name for name, parts in stored.items() if parts[0].dtype not in FLOATS],
    }
    reasons = [f"{fault}: {some(names)}" for fault, names in faults.items() if names]
    if reasons:
        raise CheckpointError(f"the weights in {source} are not those of its params.json: {'; '.join(reasons)}")


def _joined(name: str, parts: Parts, shape: tuple[int, ...], source: Path) -> torch.Tensor:
    """Join the ranks' parts of a tensor, which are copies of it, or its pieces side by side along one axis."""
    if all(part.shape == shape for part in parts):
        if any(not torch.equal(part, parts[0]) for part in parts[1:]):  # one part may hold NaN
            raise CheckpointError(f"{source}: {name} should be the same in all files, but differs")
        return parts[0]
    one_shape = len({part.shape for part in parts}) == 1
    if one_shape and parts[0].dim() == len(shape):
        for axis, size in enumerate(parts[0].shape):
            side_by_side = (*parts[0].shape[:axis], size * len(parts), *parts[0].shape[axis + 1 :])
            if side_by_side == shape:
                return torch.cat(parts, axis)
    found = " + ".join(str(list(part.shape)) for part in parts)
    files = f"there are {len(parts)} files consolidated.*.pth, perhaps not all"
    raise CheckpointError(f"{source}: {name} is {found}, not {list(shape)}; {files}")
