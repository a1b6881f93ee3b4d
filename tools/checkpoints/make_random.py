"""Write a checkpoint of full size with random weights, to measure loading, memory and speed without the real one.

    python -m tools.checkpoints.make_random llama3.1-8b FOLDER
    python -m tools.checkpoints.make_random llama3.1-70b FOLDER --layers 4
    python -m tools.checkpoints.make_random path/to/config.json FOLDER

Names, shapes, dtypes, order and shards are those of the published files, so each file has the published size to the
byte. Only text models with experts differ: the published files have each expert by itself. Weights have variance
1 / columns and norms are one, so values stay in range at any depth. The same seed gives the same files. A tokenizer is
not written, so prompts are token ids. FOLDER must not exist. It appears once everything is written.
"""

import argparse
import json
import math
import re
import shutil
import sys
from pathlib import Path

import torch

from pop.checkpoints.config_json import read_config
from pop.errors import CheckpointError, InputError, check_count
from pop.models import build
from pop.system.files import staged
from tools.common import exit_status
from tools.convert.checkpoint import write_json

SHARD_BYTES = 5_000_000_000  # the most bytes of tensors in a shard, unless a single tensor is larger
PIECE = 2**24  # values made at a time, which bounds the memory
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # their names in safetensors

# name -> layers, width, MLP width, heads, RoPE factor, tied head; all have 8 key-value heads
LLAMAS = {
    "llama3.1-8b": (32, 4096, 14336, 32, 8.0, False),
    "llama3.1-70b": (80, 8192, 28672, 64, 8.0, False),
    "llama3.1-405b": (126, 16384, 53248, 128, 8.0, False),
    "llama3.2-1b": (16, 2048, 8192, 32, 32.0, True),
    "llama3.2-3b": (28, 3072, 8192, 24, 32.0, True),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.checkpoints.make_random", description=__doc__.split("\n")[0])
    parser.add_argument("model", help=f"{', '.join(LLAMAS)}, or the path of a config.json")
    parser.add_argument("folder", type=Path, help="the directory to make")
    parser.add_argument("--layers", type=int, help="write only N layers", metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files (0)", metavar="N")
    args = parser.parse_args(argv)

    def write():
        size = write_checkpoint(config_of(args.model, args.layers), args.folder, args.seed)
        print(f"{args.folder}: {size:,} bytes of weights")

    return exit_status("make_random", write)


def config_of(model: str, layers: int | None = None) -> dict:
    """The fields of config.json of a known model, or of a file, with `layers` layers if given."""
    if model in LLAMAS:
        config = _llama_config(*LLAMAS[model])
    else:
        try:
            config = json.loads(Path(model).read_text(encoding="utf-8"))
            config["num_hidden_layers"]
        except (OSError, ValueError, LookupError, TypeError):
            known = ", ".join(LLAMAS)
            raise InputError(f"{model!r} is neither a config.json with num_hidden_layers nor one of {known}") from None
    if layers is not None:
        config["num_hidden_layers"] = check_count("--layers", layers)
    return config


def _llama_config(layers: int, width: int, mlp: int, heads: int, factor: float, tied: bool) -> dict:
    rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": width // heads,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": {**rope, "original_max_position_embeddings": 8192},
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
    }


def write_checkpoint(config: dict, folder: Path, seed: int = 0) -> int:
    """Write config.json, the weights and their index into the new `folder`; return the bytes of the weight files."""
    with staged(folder) as partial:
        write_json(partial / "config.json", config)
        dtype = read_config(partial).dtype
        shards = plan(tensors_of(partial), dtype.itemsize)
        files = {name: header(shard, dtype) for name, shard in shards.items()}
        size = sum(len(files[name]) + _nbytes(shard, dtype) for name, shard in shards.items())
        if size > (free := shutil.disk_usage(partial).free):
            raise CheckpointError(
                f"{folder} needs {size:,} bytes, but its disk has {free:,} free; choose another place"
            )
        random = torch.Generator().manual_seed(seed)
        for name, shard in shards.items():
            print(f"writing {name} ...", file=sys.stderr)
            with (partial / name).open("wb") as file:
                file.write(files[name])
                for tensor in sorted(shard):
                    for piece in pieces(tensor, shard[tensor], random):
                        file.write(memoryview(piece.to(dtype).view(torch.uint8).numpy()))
        if len(shards) > 1:
            total = sum(_nbytes(shard, dtype) for shard in shards.values())
            weight_map = {tensor: name for name, shard in shards.items() for tensor in sorted(shard)}
            write_json(
                partial / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
            )
    return size


def tensors_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor of the model that config.json in `folder` describes, in the published order.

    There, a layer's norms follow its matrices. The order decides where the shards are cut.
    """
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in build(read_config(folder)).named_parameters()}

    def place(name: str) -> tuple[int, bool]:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer is None:
            return (-1 if "embed_tokens" in name else 2**30), False
        return int(layer[1]), "norm" in name.split(".")[3]

    return {name: shapes[name] for name in sorted(shapes, key=place)}


def plan(tensors: dict[str, tuple[int, ...]], itemsize: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """File name -> its tensors, in order. A new shard begins where one more tensor would exceed SHARD_BYTES."""
    shards, used = [{}], 0
    for name, shape in tensors.items():
        nbytes = math.prod(shape) * itemsize
        if shards[-1] and used + nbytes > SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][name] = shape
        used += nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{n:05}-of-{len(shards):05}.safetensors": shard for n, shard in enumerate(shards, start=1)}


def header(tensors: dict[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """The header of a safetensors file: the size of its JSON, and the JSON, which says where each tensor is."""
    described, begin = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(tensors):
        end = begin + math.prod(tensors[name]) * dtype.itemsize
        described[name] = {"dtype": DTYPES[dtype], "shape": list(tensors[name]), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def pieces(name: str, shape: tuple[int, ...], random: torch.Generator):
    """The values of a tensor in float32, in flat pieces of at most PIECE values."""
    count = math.prod(shape)
    for begin in range(0, count, PIECE):
        size = min(PIECE, count - begin)
        yield torch.ones(size) if len(shape) == 1 else torch.randn(size, generator=random) / math.sqrt(shape[-1])


def _nbytes(tensors: dict[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    return sum(math.prod(shape) for shape in tensors.values()) * dtype.itemsize


if __name__ == "__main__":
    sys.exit(main())
