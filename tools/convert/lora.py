"""LoRA adapters as PEFT saves them, merged into a base model: W becomes W + s B A (Hu et al. 2021).

The result has the files of the base model, with other weights. Only plain LoRA is supported. A field of
adapter_config.json that asks for more is refused by name. So is a tensor that is not the A or the B of a linear layer.
"""

import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from pop.checkpoints.config_json import read_config, read_fields
from pop.checkpoints.fields import Fields
from pop.checkpoints.weights import published_name, weight_files
from pop.errors import CheckpointError, ConfigError, some
from pop.system.files import read_tensors, refuse_pointers
from pop.system.progress import progress_bar
from tools.convert.checkpoint import write_weights

# These fields are about training, or they repeat what the tensors show: which layers have an A and a B, of which rank.
# Other fields must be off.
UNUSED = """
    peft_version auto_mapping base_model_name_or_path revision task_type inference_mode
    r rank_pattern target_modules exclude_modules layers_to_transform layers_pattern
    lora_dropout runtime_config loftq_config eva_config corda_config megatron_core qalora_group_size
""".split()  # noqa: SIM905
INITS = (True, "gaussian", "eva", "orthogonal")  # others change the base model's weights as well
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HEAD = "lm_head.weight"
COPIED = (".json", ".model", ".jinja")  # the files of a checkpoint beside its weights
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Update:
    """What an adapter does to one matrix.

    a: A [r, in]. b: B [out, r]. scale: s. base: the matrix [out, in] to change, which PEFT stores of a head; None
    means the base model's.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    base: torch.Tensor | None

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W + s B A, computed in float32 and rounded once to the dtype of `weight`."""
        base = weight if self.base is None else self.base.to(weight.dtype)
        product = self.b.float() @ self.a.float()
        return (base.float() + self.scale * product).to(weight.dtype)


def write(base: Path, adapter: Path, folder: Path, progress: bool) -> None:
    """Write the checkpoint in the folder `base`, with the adapter in the folder `adapter` merged, into `folder`.

    Raises ConfigError or CheckpointError, which names what is not plain LoRA or does not fit the base model.
    """
    config = read_config(base)
    files = weight_files(base)
    shapes = {}
    for file in files:
        tensors = _read(file)
        shapes |= {published_name(name): tuple(tensor.shape) for name, tensor in tensors.items()}
    if config.tie_embeddings:
        shapes.pop(HEAD, None)
    updates = read_adapter(adapter, shapes)
    for path in sorted(base.iterdir()):
        if path.is_file() and path.suffix in COPIED and not path.name.startswith("adapter_"):
            shutil.copyfile(path, folder / path.name)
    with progress_bar(f"merging {adapter.name}", len(files), "files", progress) as step:
        for file in files:
            tensors = _read(file)
            for name in tensors:
                update = updates.get(published_name(name))
                if update is not None:
                    tensors[name] = update.merged(tensors[name])
                    if not tensors[name].isfinite().all():
                        dtype = tensors[name].dtype
                        raise CheckpointError(f"{name} with {adapter} merged overflows {dtype}; merge into float32")
            write_weights(tensors, folder / file.name)
            step(1)


def _read(file: Path) -> dict[str, torch.Tensor]:
    try:
        tensors, _ = read_tensors(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); fetch it again") from None
    return tensors


def read_adapter(folder: Path, shapes: Shapes) -> dict[str, Update]:
    """Read the adapter in a folder.

    Args:
        folder: It holds adapter_config.json and adapter_model.safetensors.
        shapes: The shapes of the base model's tensors, by their published names.

    Returns:
        The updates by the name of the tensor that they change.
    """
    refuse_pointers(folder)
    advice = "; merge the adapter with PEFT, and load the result"
    scaling = read_fields(folder / "adapter_config.json", _read_scaling, None, advice)
    file = folder / "adapter_model.safetensors"
    if not file.exists() and (folder / "adapter_model.bin").exists():
        raise CheckpointError(f"{folder} holds a pickle, adapter_model.bin; save the adapter with PEFT as safetensors")
    tensors = _read(file)
    updates = {}
    faults = []
    for name, tensor in sorted(tensors.items()):
        match = re.fullmatch(r"base_model\.model\.(.+)\.(lora_A|lora_B|base_layer)\.weight", name)
        layer = match[1] if match else ""
        parameter = published_name(f"{layer}.weight")
        if len(shapes.get(parameter, ())) != 2:
            faults.append(f"{name} is not of a linear layer of this model{_about_head(parameter)}")
            continue
        a = tensors.get(f"base_model.model.{layer}.lora_A.weight")
        b = tensors.get(f"base_model.model.{layer}.lora_B.weight")
        base = tensors.get(f"base_model.model.{layer}.base_layer.weight")
        if a is None or b is None:
            absent = "lora_A" if a is None else "lora_B"
            faults.append(f"{name} comes without its {absent}")
            continue
        out_width, in_width = shapes[parameter]
        rank = a.shape[0] if a.dim() and a.shape[0] else 1
        wanted = {"lora_A": (rank, in_width), "lora_B": (out_width, rank), "base_layer": (out_width, in_width)}[
            match[2]
        ]
        if tensor.shape != wanted:
            faults.append(f"{name} is {list(tensor.shape)}, not {list(wanted)}")
        elif tensor.dtype not in FLOATS or not tensor.isfinite().all():
            faults.append(f"{name} does not hold finite floating-point numbers")
        else:
            updates[parameter] = Update(a, b, scaling.factor(layer, rank), base)
    if not tensors:
        faults.append("it is empty")
    if faults:
        step = "give the base model that it was trained on, or merge it with PEFT and load the result"
        raise CheckpointError(f"{file} does not fit this model: {some(faults, '; ')}; {step}")
    return updates


def _about_head(parameter: str) -> str:
    if parameter != HEAD:
        return ""
    return " (its head is its embedding: tie_word_embeddings)"


@dataclass(frozen=True)
class Scaling:
    """The factor s = alpha / r of each layer, or alpha / √r (rsLoRA).

    alphas: alpha by the end of a layer's name. The first that fits counts, and the last one, "", fits all.
    """

    alphas: dict[str, float]
    by_root: bool

    def factor(self, layer: str, rank: int) -> float:
        alpha = next(alpha for end, alpha in self.alphas.items() if f".{layer}".endswith(end))
        return alpha / math.sqrt(rank) if self.by_root else alpha / rank


def _read_scaling(fields: Fields) -> Scaling:
    fields.left = {name: value for name, value in fields.left.items() if value and name not in UNUSED}
    fields.fixed(peft_type="LORA", bias="none")
    if fields.left.get("init_lora_weights") in INITS:
        del fields.left["init_lora_weights"]
    patterns = fields.part("alpha_pattern")
    expressions = [name for name in patterns.left if not re.fullmatch(r"[\w.]+", name)]
    if expressions:
        raise ConfigError(f"alpha_pattern has {some(expressions)}; only names of layers are supported")
    alphas = {f".{name}": patterns.number(name) for name in list(patterns.left)}
    alphas[""] = fields.number("lora_alpha")
    return Scaling(alphas, fields.boolean("use_rslora"))
