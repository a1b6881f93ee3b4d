"""From weight files to parameters: memory-mapped, and strict about names, shapes and dtypes.

`load_weights` reads safetensors files. First, a survey maps all of them and names all differences from the module in
one error. Then the weights are copied, so the files may change while the model runs. Safetensors files have no
checksums: a flipped bit is noticed only if a norm or a bias becomes infinite or NaN.
"""

import contextlib
import fnmatch
import os
import re
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pop.errors import CacheMemoryError, CheckpointError, reason_of, some
from pop.models.config import DTYPES, Config
from pop.system.files import read_json, read_tensors
from pop.system.progress import progress_bar

# Gemma-3 with a vision tower: patterns of the names that newer releases save, and the published names.
RENAMED = {
    r"model\.(language_model|vision_tower|multi_modal_projector)\.": r"\1.",
    r"vision_tower\.(?!vision_model\.)": "vision_tower.vision_model.",
    r"language_model\.lm_head\.": "lm_head.",
    r"language_model\.(?!model\.)": "language_model.model.",
}
ROPE_TABLES = ("rotary_emb.inv_freq", "rope.freqs")  # in old files; ours follow from the config
EMBEDDING = "embed_tokens.weight"  # the end of its name
HEAD = "lm_head.weight"
EXPERT_MATRICES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# What a folder or a repository may hold instead of weights: a pattern for the name, and what to do.
OTHERS = {
    "adapter_config.json": (
        "a LoRA adapter, which `python -m tools.convert BASE DIR --adapter FOLDER` in a checkout of pop merges"
    ),
    "pytorch_model*.bin": "a pickle, which can run code when it is read; convert it to safetensors",
    "*.gguf": "which `python -m tools.convert FILE DIR` in a checkout of pop converts",
    "params.json": "Meta's layout, which `python -m tools.convert FOLDER DIR` in a checkout of pop converts",
}
OF_LAYER = ".self_attn.o_proj."  # in a name of each layer, and in none of a vision tower
AGAIN = "move its folder away, and fetch it again"  # the folder may hold plans, and a known one is not fetched again
BAR_FROM = 2**30  # bytes; fewer load too quickly for a progress bar


@dataclass(frozen=True)
class Shard:
    """The part of a parameter that one of several processes holds (pop/backends/tensor_parallel.py)."""

    whole: Tensor  # the whole parameter, on the meta device
    axis: int  # along which it is cut. It counts from the end, where a single expert has the same axes
    width: int  # its length along that axis, or half of it for gate_up_proj
    share: range  # of each width, which the part has

    def of_whole(self, tensor: Tensor) -> Tensor:
        """Return a view of what the part has of a whole tensor, in the shape of `of_part`."""
        halves = tensor.unflatten(self.axis, (-1, self.width))  # [..., 1 or 2, width, ...]
        return halves.narrow(self.axis, self.share.start, len(self.share))

    def of_part(self, tensor: Tensor) -> Tensor:
        """Return a view of the part, with its halves apart."""
        return tensor.unflatten(self.axis, (-1, len(self.share)))  # [..., 1 or 2, share, ...]


def load_weights(
    folder: Path,
    module: nn.Module,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    progress: bool,
    shards: dict[str, Shard] | None = None,
) -> None:
    """Fill a module on the meta device with the weights in a folder. Its parameters become contiguous and frozen.

    Args:
        folder: A checkpoint in the Hugging Face layout.
        module: The model. Its `config` helps to explain differences.
        dtype: The dtype that all parameters get.
        device: Where they are allocated.
        progress: Whether to show a bar on stderr for large weights.
        shards: For each parameter of which `module` has only a part, by name, which part that is. Only it is read.

    Raises CheckpointError, and leaves `module` unchanged, if the files are broken or do not fit the config.
    """
    shards = shards or {}
    parameters = dict(module.named_parameters())
    whole = parameters | {name: shard.whole for name, shard in shards.items()}
    sources = _survey(folder, module.config, whole)
    weights = {name: torch.empty(one.shape, dtype=dtype, device=device) for name, one in parameters.items()}
    targets = {}
    for name, weight in weights.items():
        for stored, slot in _slots(name, weight, sources.keys()).items():
            targets[stored] = (slot, shards.get(name))
    size = sum(weight.nbytes for weight in weights.values())
    step = max(size // 50, 2**20)
    with progress_bar("loading weights", size, "B", progress and size >= BAR_FROM) as advance:
        for source, target in _slices(sources, targets, step):
            target.copy_(source)
            advance(target.nbytes)
    for name, weight in weights.items():
        if weight.dim() == 1 and not weight.isfinite().all():
            raise CheckpointError(f"{folder}: {name} has NaN or infinite values in {dtype}; {AGAIN}")
    module.load_state_dict(weights, assign=True)
    module.requires_grad_(False)


def instead(names: Iterable[str]) -> str:
    """Return the end of a message about files that are missing: which of `names` is something else, and what to do."""
    for pattern, what in OTHERS.items():
        found = fnmatch.filter(names, pattern)
        if found:
            return f"; it holds {min(found)!r:.200}, {what}"
    return ""


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype of the first file's largest tensor. Without weights, which `load_weights` reports: float32."""
    with contextlib.suppress(ValueError):  # of which CheckpointError is one
        file = weight_files(folder)[0]
        largest = max(_map(file).values(), key=Tensor.numel)
        return largest.dtype
    return torch.float32


@dataclass(frozen=True)
class _Source:
    """Where a tensor is stored."""

    file: Path
    name: str  # in the file
    is_transposed: bool  # if it holds experts

    def laid_out(self, tensor: Tensor) -> Tensor:
        """Return a view of the stored tensor with the axes of the parameter."""
        return tensor.mT if self.is_transposed and tensor.dim() == 3 else tensor


def _slices(
    sources: dict[str, _Source], targets: dict[str, tuple[Tensor, Shard | None]], step: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what to copy, in parts of about `step` bytes: of a stored tensor, and of what it fills.

    A page of a mapped file counts as resident memory until the file is unmapped. The file is therefore mapped anew when
    about `step` bytes of it have been read.
    """
    file = None
    touched = 0  # bytes
    for name, source in sources.items():
        target, shard = targets[name]
        if not target.numel():  # of a process without a share
            continue
        if shard is not None:
            target = shard.of_part(target)
        for at in _places(target, step):
            if source.file != file or touched >= step:
                file = source.file
                tensors = _map(file)
                touched = 0
            tensor = source.laid_out(tensors[source.name])
            if shard is not None:
                tensor = shard.of_whole(tensor)
            part = tensor[at]
            yield part, target[at]
            touched += part.nbytes


def _places(tensor: Tensor, step: int) -> Iterator[tuple]:
    """Yield the places of parts that make up a tensor, as indices. A part has about `step` bytes."""
    row_bytes = tensor[0].nbytes
    if row_bytes > step and tensor.dim() > 1:
        for index, row in enumerate(tensor):
            for place in _places(row, step):
                yield index, *place
        return
    rows = max(1, step // row_bytes)
    for first in range(0, len(tensor), rows):
        yield (slice(first, first + rows),)


def _map(file: Path) -> dict[str, Tensor]:
    """Map the tensors of a weight file into memory: a page is read when it is first touched."""
    try:
        return read_tensors(file)[0]  # without the metadata
    except PermissionError:
        raise CheckpointError(f"{file} may not be read by this user; change its permissions") from None
    except Exception as error:  # corrupt bytes can raise nearly anything
        reason = reason_of(error)
        if "Cannot allocate memory" in reason:
            raise CacheMemoryError(f"{file} cannot be mapped into memory ({reason}); raise `ulimit -v`") from None
        raise CheckpointError(f"{file} is truncated or corrupt ({reason}); {AGAIN}") from None


def _survey(folder: Path, config: Config, parameters: dict[str, Tensor]) -> dict[str, _Source]:
    """Find the stored tensors that fill whole parameters on the meta device. One error names all differences.

    A head that is stored beside a tied embedding must be a copy of it. It is compared here, and not loaded.
    """
    stored = _stored(folder, parameters.keys())
    slots = {}
    for name, parameter in parameters.items():
        slots |= _slots(name, parameter, stored.keys())
    copy = stored.pop(HEAD, None) if config.tie_embeddings else None
    # Qwen3-VL's files hold transposed experts. Of a layer's two kinds of matrices one is not square, and shows it.
    stacks = [name for name, (_, _, tensor) in stored.items() if name in slots and tensor.dim() == 3]
    is_transposed = any(stored[name][2].shape != slots[name].shape for name in stacks)
    missing = [name for name in slots if name not in stored]
    surplus = []
    dtypes = []
    misfits = []
    sources = {}
    for name, (file, name_in_file, tensor) in stored.items():
        if name not in slots:
            surplus.append(name)
            continue
        source = _Source(file, name_in_file, is_transposed)
        wanted = list(slots[name].shape)
        if tensor.dtype not in DTYPES.values():
            dtypes.append(f"{name} ({tensor.dtype})")
        if list(source.laid_out(tensor).shape) != wanted:
            misfits.append(f"{name} is {list(tensor.shape)}, not {wanted}")
        sources[name] = source
    faults = {"missing": missing, "surplus": surplus, "of a wrong dtype": dtypes, "of a wrong shape": misfits}
    reasons = [f"{fault}: {some(names)}" for fault, names in faults.items() if names]
    if reasons:
        reasons = _causes(config, stored, missing) + reasons
        raise CheckpointError(f"the weights in {folder} are not those of its config: {'; '.join(reasons)}")
    if copy is not None:
        file, _, head = copy
        name = next(name for name in stored if name.endswith(EMBEDDING))
        embedding = stored[name][2]
        if not torch.equal(head.to(embedding.dtype), embedding):
            raise CheckpointError(f"{file}: {HEAD} should repeat {name}, but differs")
    return sources


def _causes(config: Config, stored: Iterable[str], missing: Iterable[str]) -> list[str]:
    """Return what may explain that the weights are not those of the config."""
    causes = []
    layers = {name.partition(OF_LAYER)[0] for name in stored if OF_LAYER in name}
    if len(layers) != config.num_layers:
        causes.append(f"num_hidden_layers is {config.num_layers} but {len(layers)} layers are stored")
    if HEAD in missing:
        causes.append("tie_word_embeddings is false")
    return causes


def _slots(name: str, parameter: Tensor, stored: Set[str]) -> dict[str, Tensor]:
    """Return what stored tensors fill, by their names: a parameter or, if experts are stored one by one, matrices."""
    experts, _, kind = name.rpartition(".")
    matrices = EXPERT_MATRICES.get(kind, ())
    if not any(f"{experts}.0.{matrix}.weight" in stored for matrix in matrices):
        return {name: parameter}
    slots = {}
    for matrix, part in zip(matrices, parameter.chunk(len(matrices), dim=1), strict=True):
        for expert, slot in enumerate(part):
            slots[f"{experts}.{expert}.{matrix}.weight"] = slot
    return slots


def _stored(folder: Path, parameters: Set[str]) -> dict[str, tuple[Path, str, Tensor]]:
    """Return the stored tensors by their published names, file by file, each with its file and its name there."""
    stored = {}
    for file in weight_files(folder):
        for name, tensor in _map(file).items():
            if name.endswith(ROPE_TABLES):
                continue
            published = name if name in parameters else published_name(name)
            if published in stored:
                raise CheckpointError(f"{file}: {some([name])} is stored twice; remove one of the copies")
            stored[published] = (file, name, tensor)
    return stored


def weight_files(folder: Path) -> list[Path]:
    """Find the weight files: those that an index names, or a single file, which takes precedence."""
    single = folder / "model.safetensors"
    index_file = folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index_file.is_file():
        raise CheckpointError(
            f"{folder} holds neither {single.name} nor {index_file.name}{instead(os.listdir(folder)) or f'; {AGAIN}'}"
        )
    files = [folder / shard for shard in shards_of(index_file)]
    for file in files:
        if not os.path.isfile(file):
            raise CheckpointError(f"{folder} lacks the shard {file.name!r:.200}; {AGAIN}")
    return files


def shards_of(index_file: Path) -> list[str]:
    """The names of the files that an index names."""
    weight_map = read_json(index_file, CheckpointError).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(v, str) for v in weight_map.values())):
        raise CheckpointError(f"{index_file} holds no weight_map of tensors to files; {AGAIN}")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        # The name comes from outside and must not lead out of the folder. The file may be a symbolic link.
        if not re.fullmatch(r"[^/\\:]+\.safetensors", shard):
            raise CheckpointError(f"{index_file} names {shard!r:.200}, not a plain *.safetensors name")
    return shards


def published_name(name: str) -> str:
    """Return the published name of a tensor in the Hugging Face layout, whichever release saved it."""
    for pattern, replacement in RENAMED.items():
        name = re.sub(rf"^{pattern}", replacement, name)
    return name
