"""LoRA adapters as PEFT saves them, merged into the linear layers of a model: W becomes W + s B A (Hu et al. 2021).

Everything that is not plain LoRA is refused by name: a field of adapter_config.json that asks for more, and a tensor
that is not the A or the B of a linear layer.
"""

import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from pop.checkpoints.config_json import read_fields
from pop.checkpoints.fields import Fields
from pop.checkpoints.weights import FLOATS, Shard, published_name
from pop.errors import CheckpointError, ConfigError, some
from pop.system.files import read_tensors, refuse_pointers

# Fields about training, and about which layers have an A and a B, and of which rank, which the tensors say as well.
# Other fields must be off.
UNUSED = (
    *("peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("r", "rank_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("lora_dropout", "runtime_config", "loftq_config", "eva_config", "corda_config", "megatron_core"),
    "qalora_group_size",
)
INITS = (True, "gaussian", "eva", "orthogonal")  # others change the base model's weights as well
# By parameter: A [r, in], B [out, r], the base model's matrix [out, in], which PEFT stores of a head only, and s.
Adapter = dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, float]]


def read_adapter(folder: Path, module: nn.Module, shards: dict[str, Shard]) -> Adapter:
    """Read the adapter in a folder for a module, which may be on the meta device. `shards` is as in `load_weights`.

    Raises ConfigError or CheckpointError, which names what is not plain LoRA or does not fit the module.
    """
    refuse_pointers(folder)
    advice = "; merge the adapter with PEFT, and load the result"
    alphas, root = read_fields(folder / "adapter_config.json", _read_alphas, None, advice)
    file = folder / "adapter_model.safetensors"
    try:
        tensors, _ = read_tensors(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); fetch the adapter again") from None
    linears = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    adapter, faults = {}, []
    for name, tensor in sorted(tensors.items()):
        match = re.fullmatch(r"base_model\.model\.(.+)\.(lora_A|lora_B|base_layer)\.weight", name)
        layer, kind = match.groups() if match else ("", "")
        published = published_name(f"{layer}.weight").removesuffix(".weight")  # of transformers 4
        linear = layer if layer in linears else published
        if linear not in linears:
            tied = " (its head is its embedding: tie_word_embeddings)" if layer.endswith("lm_head") else ""
            faults.append(f"{name} is not of a linear layer of this model{tied}")
            continue
        parameter, shape = f"{linear}.weight", tuple(linears[linear].weight.shape)
        shape = shards[parameter].whole_shape(shape) if parameter in shards else shape  # [out, in]
        alpha = next(alpha for end, alpha in alphas.items() if f".{layer}".endswith(end))
        a, b, whole = (tensors.get(f"base_model.model.{layer}.{k}.weight") for k in ("lora_A", "lora_B", "base_layer"))
        r = (a.shape[0] if a is not None and a.dim() else 0) or 1
        wanted = {"lora_A": [r, shape[1]], "lora_B": [shape[0], r], "base_layer": list(shape)}
        if a is None or b is None:
            faults.append(f"{name} comes without its lora_{'A' if a is None else 'B'}")
        elif list(tensor.shape) != wanted[kind]:
            faults.append(f"{name} is {list(tensor.shape)}, not {wanted[kind]}")
        elif tensor.dtype not in FLOATS or not tensor.isfinite().all():
            faults.append(f"{name} does not hold finite floating-point numbers")
        else:
            adapter[parameter] = a, b, whole, alpha / (math.sqrt(r) if root else r)
    if faults or not adapter:
        step = "give the base model that it was trained on, or merge it with PEFT and load the result"
        raise CheckpointError(f"{file} does not fit this model: {some(faults or ['it is empty'], '; ')}; {step}")
    return adapter


def _read_alphas(fields: Fields) -> tuple[dict[str, float], bool]:
    """Read alpha, by the end of a layer's name (the first that fits), and whether s is alpha / √r."""
    fields.left = {name: value for name, value in fields.left.items() if value and name not in UNUSED}
    fields.fixed(peft_type="LORA", bias="none")
    if fields.left.get("init_lora_weights") in INITS:
        del fields.left["init_lora_weights"]
    part = fields.part("alpha_pattern")
    if patterns := [name for name in part.left if not re.fullmatch(r"[\w.]+", name)]:
        raise ConfigError(f"alpha_pattern has {some(patterns)}; only names of layers are supported")
    alphas = {f".{name}": part.number(name) for name in list(part.left)}
    return alphas | {"": fields.number("lora_alpha")}, fields.boolean("use_rslora")


@torch.no_grad()
def merge_adapter(adapter: Adapter, module: nn.Module, shards: dict[str, Shard]) -> None:
    """Add s B A to the weights in place. The sum is computed in float32 and rounded to the weights' dtype."""
    for name, (a, b, whole, scale) in adapter.items():
        weight = module.get_parameter(name)
        cut = shards[name].cut if name in shards else (lambda matrix: matrix)
        if whole is not None:
            weight.copy_(cut(whole))
        update = scale * (b.to(weight.device, torch.float32) @ a.to(weight.device, torch.float32))
        weight.copy_(weight.float() + cut(update))
