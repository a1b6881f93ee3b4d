"""What all converters share: the shapes of the model that a config.json describes, and files of weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pop.checkpoints.config_json import READERS
from pop.checkpoints.fields import Fields
from pop.errors import CheckpointError, ConfigError
from pop.models import build


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in place."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def parameter_shapes(config: dict[str, Any], source: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter of the model that `config`, the contents of a config.json, describes.

    Raises CheckpointError, which names the `source`, if no model of `pop` has this config.
    """
    _, read = READERS[config["model_type"]]
    try:
        with torch.device("meta"):
            module = build(read(Fields(config)))
    except ConfigError as error:
        raise CheckpointError(f"{source} describes no model: {error}; fetch it again") from None
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def write_config(config: dict[str, Any], folder: Path) -> None:
    """Write config.json, and generation_config.json with the ids of its special tokens."""
    write_json(folder / "config.json", config)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    token_ids = {name: config.get(name) for name in names}
    write_json(folder / "generation_config.json", token_ids | {"_from_model_config": True})


def write_weights(weights: dict[str, torch.Tensor], file: Path) -> None:
    """Write a safetensors file into a folder that holds config.json."""
    save_file(weights, file, metadata={"format": "pt"})
    shutil.copymode(file.with_name("config.json"), file)  # safetensors lets only the owner read the file


def separated_halves(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of Q or K from RoPE on neighbours, rows (2i, 2i + 1) of a head, to RoPE on halves, (i, E/2 + i).

    Args:
        weight: [H * E, D], or the bias [H * E].
        head_dim: The width E of a head.
    """
    pairs = weight.unflatten(0, (-1, head_dim // 2, 2))  # [H * E, ...] -> [H, E/2, 2, ...]
    return pairs.transpose(1, 2).flatten(0, 2)  # [H, 2, E/2, ...] -> [H * E, ...]
