"""From weight files to parameters: memory-mapped, and strict about names, shapes and dtypes.

`load_weights` reads safetensors files or Meta's (one consolidated.NN.pth for each tensor-parallel rank). A survey maps
all files and names all differences from the module in one error. Then the weights are copied, so the files may change
while the model runs. Safetensors files lack checksums: a flipped bit is noticed only if a norm or a bias becomes
infinite or NaN.
"""

import contextlib
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Set
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path, PureWindowsPath

import torch
from torch import nn

from pop.checkpoints import meta
from pop.errors import CheckpointError, some
from pop.models.config import Config
from pop.system.files import read_json, read_tensors
from pop.system.progress import progress_bar

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Gemma-3 with a vision tower: patterns of the names that newer releases save, and the published names.
RENAMED = {
    r"model\.(language_model|vision_tower|multi_modal_projector)\.": r"\1.",
    r"vision_tower\.(?!vision_model\.)": "vision_tower.vision_model.",
    r"language_model\.lm_head\.": "lm_head.",
    r"language_model\.(?!model\.)": "language_model.model.",
}
ROPE_TABLES = ("rotary_emb.inv_freq", "rope.freqs")  # in old files; ours follow from the config
VISION = ("vision_tower.", "multi_modal_projector.", "model.visual.")
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"  # a prefix may precede the former
EXPERT_MATRICES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")  # for messages
# What a folder or a repository may hold instead of weights: a pattern for the name, and what to do.
OTHERS = {
    "adapter_config.json": "a LoRA adapter, which pop.load(BASE, adapter=FOLDER) merges into its base model",
    "*.bin": "a pickle, which can run code when it is read; convert it to safetensors",
    "*.gguf": "which `pop import-gguf` converts",
}
QUANTISED = (".qweight", ".qzeros", ".absmax", ".SCB", ".weight_packed", ".weight_scale", ".weight_scale_inv")
BAR_FROM = 2**30  # bytes; fewer load too quickly for a progress bar


@dataclass(frozen=True)
class Shard:
    """The part of a parameter that one of several processes holds (pop/backends/tensor_parallel.py)."""

    axis: int  # along which the parameter is cut
    whole: int  # the length of the whole parameter along that axis
    spans: tuple[tuple[int, int], ...]  # ranges (begin, end) of the whole, whose concatenation is the part
    owned: tuple[bool, ...] = ()  # for each span, whether `places` counts it here, not in another process; () means all

    def whole_shape(self, part: tuple[int, ...]) -> tuple[int, ...]:
        return (*part[: self.axis], self.whole, *part[self.axis + 1 :])

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """The part of a whole parameter."""
        return torch.cat([whole.narrow(self.axis, begin, end - begin) for begin, end in self.spans], self.axis)

    def places(self) -> torch.Tensor:
        """Return [whole]: each index's position in the part, or -1 if another process owns it."""
        places, at = torch.full((self.whole,), -1), 0
        for number, (begin, end) in enumerate(self.spans):
            if not self.owned or self.owned[number]:
                places[begin:end] = torch.arange(at, at + end - begin)
            at += end - begin
        return places


def load_weights(
    folder: str | Path,
    module: nn.Module,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    progress: bool,
    shards: dict[str, Shard] | None = None,
) -> None:
    """Fill a module on the meta device with the weights in a folder. Its parameters become contiguous and frozen.

    `shards` gives, by name, the part of a parameter that `module` has. Only that part is read. With `progress`, large
    weights show a bar. If the files do not fit the config, it raises CheckpointError and leaves `module` unchanged.
    """
    folder, shards = Path(folder), shards or {}
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    whole = {name: shards[name].whole_shape(s) if name in shards else s for name, s in shapes.items()}
    survey = _survey(folder, module.config, whole, shards)
    weights = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    size = sum(weight.nbytes for weight in weights.values())
    files, touched = {}, 0
    with progress_bar("loading weights", size, "B", progress and size >= BAR_FROM) as advance:
        for parts, target in sorted(survey, key=lambda pair: (pair[1].repeats, pair[0][0].file)):
            # A page of a mapped file counts as resident memory until the file is unmapped.
            if touched >= max(size // 50, 2**20):
                files, touched = {}, 0
            source = _read(parts, target, module.config.head_dim, files)
            weight = target.slice_of(weights[target.parameter])
            touched += source.nbytes
            if not target.repeats:
                weight.copy_(source)
                advance(weight.nbytes)
            elif not torch.equal(weight, source.to(weight)):
                where = f"{parts[0].file}: {parts[0].name}"
                raise CheckpointError(f"{where} should repeat {target.parameter}, but differs")
    for name, weight in weights.items():
        if weight.dim() == 1 and not weight.isfinite().all():
            raise CheckpointError(f"{folder}: {name} has NaN or infinite values in {dtype}; fetch it again")
    module.load_state_dict(weights, assign=True)
    module.requires_grad_(False)


def instead(names: Iterable[str]) -> str:
    """The end of a message about names of files that are not enough: which of them is something else."""
    found = ((name, what) for pattern, what in OTHERS.items() for name in sorted(names) if fnmatch(name, pattern))
    return next((f"; it holds {name!r:.200}, {what}" for name, what in found), "")


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of the first file's largest tensor. float32 if there are no weights, which `load_weights` reports."""
    with contextlib.suppress(CheckpointError, StopIteration):
        tensors = _map(next(iter(_weight_files(folder)))).values()
        largest = max(tensors, key=torch.Tensor.numel, default=torch.empty(0))
        return largest.dtype if largest.dtype in FLOATS else torch.float32
    return torch.float32


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file. `like` has its shape and dtype, and no values."""

    file: Path
    name: str
    like: torch.Tensor


@dataclass(frozen=True)
class _Target:
    """What a stored tensor fills: a parameter, or the matrix of one expert in it."""

    parameter: str
    shape: tuple[int, ...]  # of the stored tensor
    shard: Shard | None
    matrix: tuple[int, int, int] | None = None  # the expert, and which of how many matrices; None: all of the parameter
    repeats: bool = False  # another tensor fills the parameter, and this one must be equal

    def slice_of(self, parameter: torch.Tensor) -> torch.Tensor:
        if self.matrix is None:
            return parameter
        expert, number, count = self.matrix
        return parameter[expert].chunk(count)[number]


def _read(parts: list[_Stored], target: _Target, head_dim: int, files: dict[Path, dict]) -> torch.Tensor:
    """Return what parts of a tensor hold for a target. `files` keeps the tensors of files that are mapped."""
    for file in {part.file for part in parts} - files.keys():
        files[file] = _map(file)
    whole = _joined([files[part.file][part.name] for part in parts], target.shape)
    if parts[0].name.endswith(meta.INTERLEAVED):  # RoPE rotates rows (2i, 2i + 1) there, (i, E/2 + i) here
        whole = whole.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
    return whole if target.shard is None else target.shard.cut(whole)


def _joined(parts: list[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor | None:
    """Return the tensor of a shape that parts make: the only one, or those of Meta's files side by side.

    The published experts of Qwen3-VL are transposed. None means that the parts do not fit.
    """
    first = parts[0]
    if first.dim() != len(shape) or any(part.shape != first.shape for part in parts):
        return None
    if len(parts) > 1:
        joined = (torch.cat(parts, axis) for axis in range(len(shape)))
    else:
        joined = (first, first.mT if len(shape) == 3 else first)
    return next((whole for whole in joined if whole.shape == shape), None)


def _map(file: Path, checksums: bool = False) -> dict[str, torch.Tensor]:
    """Map the tensors of a weight file into memory: a page is read when it is first touched."""
    try:
        if file.suffix == ".pth":
            if checksums:
                with zipfile.ZipFile(file) as archive:
                    if any(entry.compress_type for entry in archive.infolist()) or archive.testzip():
                        raise ValueError("wrong checksum or compressed")
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        else:
            tensors, _ = read_tensors(file)
        dense = [t.is_cpu and t.layout == torch.strided and not t.is_nested for t in tensors.values()]
        if not all(dense) or not all(isinstance(name, str) for name in tensors):
            raise ValueError("not a dictionary of dense tensors")
    except pickle.UnpicklingError:  # torch's message advises to load the file without weights_only
        raise CheckpointError(f"{file} holds more than tensors, or is corrupt; it is not loaded") from None
    except Exception as error:  # corrupt bytes can raise nearly anything
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise CheckpointError(f"{file} is truncated or corrupt, fetch it again ({reason:.200})") from None
    return tensors


def _survey(
    folder: Path, config: Config, shapes: dict[str, tuple[int, ...]], shards: dict[str, Shard]
) -> list[tuple[list[_Stored], _Target]]:
    """Match the stored tensors with the parameters, given by name and shape. One error names all differences."""
    stored = _stored(folder, shapes.keys())
    wanted = _wanted(shapes, shards, stored.keys())
    if config.tie_embeddings and HEAD in stored:
        embedding = next(name for name in shapes if name.endswith(EMBEDDING))
        wanted[HEAD] = replace(wanted[embedding], repeats=True)
    found, dtypes, misfits = [], [], []
    surplus = [name for name in stored if name not in wanted]
    missing = [name for name in wanted if name not in stored]
    for name in [name for name in stored if name in wanted]:
        parts, target = stored[name], wanted[name]
        dtypes += [f"{name} ({part.like.dtype})" for part in parts if part.like.dtype not in FLOATS]
        likes = [part.like for part in parts]
        if all(like.shape == target.shape for like in likes):  # several of Meta's files have the same norms
            found += [([part], replace(target, repeats=target.repeats or part != parts[0])) for part in parts]
        elif _joined(likes, target.shape) is not None:
            found.append((parts, target))
        else:
            sizes = " + ".join(str(list(like.shape)) for like in likes)
            misfits.append(f"{name} is {sizes}, not {list(target.shape)}")
    if missing or surplus or dtypes or misfits:
        reasons = []
        layers = {m[0] for name in stored if not name.startswith(VISION) and (m := re.match(r".*?layers\.\d+\.", name))}
        if len(layers) != config.num_layers:
            reasons.append(f"num_hidden_layers is {config.num_layers} but {len(layers)} layers are stored")
        if any(name.endswith(QUANTISED) for name in surplus):
            reasons.append("they are quantised, so take the original ones")
        if HEAD in missing:
            reasons.append("tie_word_embeddings is false")
        if misfits:
            sizes = [f"{name} {getattr(config, name)}" for name in SIZES if hasattr(config, name)]
            reasons.append(f"the config has {', '.join(sizes)}")
        files = {part.file for parts in stored.values() for part in parts if part.file.suffix == ".pth"}
        if misfits and files:  # each file has a part of each matrix
            reasons.append(f"there are {len(files)} files consolidated.*.pth, perhaps not all")
        faults = {"missing": missing, "surplus": surplus, "of a wrong dtype": dtypes, "of a wrong shape": misfits}
        reasons += [f"{fault}: {some(names)}" for fault, names in faults.items() if names]
        raise CheckpointError(f"the weights in {folder} are not those of its config: {'; '.join(reasons)}")
    return found


def _wanted(shapes: dict[str, tuple[int, ...]], shards: dict[str, Shard], stored: Set[str]) -> dict[str, _Target]:
    """Return what each tensor to look for fills: a parameter, or one expert's matrix if they are stored one by one."""
    wanted = {}
    for name, shape in shapes.items():
        experts, _, kind = name.rpartition(".")
        matrices, shard = EXPERT_MATRICES.get(kind, ()), shards.get(name)
        if not any(f"{experts}.0.{matrix}.weight" in stored for matrix in matrices):
            wanted[name] = _Target(name, shape, shard)
            continue
        if shard is not None:  # it has the same rows of gate and of up
            shard = replace(shard, axis=shard.axis - 1, spans=shard.spans[:1])
        size = shape[1] // len(matrices), shape[2]
        for expert in range(shape[0]):
            for number, matrix in enumerate(matrices):
                target = _Target(name, size, shard, (expert, number, len(matrices)))
                wanted[f"{experts}.{expert}.{matrix}.weight"] = target
    return wanted


def _stored(folder: Path, parameters: Set[str]) -> dict[str, list[_Stored]]:
    """Collect what is stored for each parameter: one tensor, or in Meta's layout one from each file."""
    stored = {}
    for file, names in _weight_files(folder).items():
        tensors = _map(file, checksums=True)
        if names is not None and (astray := tensors.keys() ^ names):
            raise CheckpointError(f"{file} and the index beside it disagree about {some(sorted(astray))}")
        for name, tensor in tensors.items():
            if file.suffix == ".pth":
                parameter = meta.parameter_name(name)
            else:
                parameter = name if name in parameters else published_name(name)
            if not name.endswith(ROPE_TABLES):
                part = _Stored(file, name, torch.empty_like(tensor, device="meta"))
                stored.setdefault(parameter, []).append(part)
    return stored


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """Find the weight files and, if there is an index, the names of their tensors. A single file takes precedence."""
    index_file = folder / "model.safetensors.index.json"
    if os.path.isfile(folder / "model.safetensors"):
        return {folder / "model.safetensors": None}
    if os.path.isfile(index_file):
        index = read_json(index_file, CheckpointError).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(shard, str) for shard in index.values()):
            raise CheckpointError(f"{index_file} holds no weight_map of tensors to files; fetch it again")
        shards = sorted(set(index.values()))
        for shard in shards:  # a name from outside, which must not leave the folder; the file may be a symbolic link
            if PureWindowsPath(shard).name != shard or not shard.endswith(".safetensors"):
                raise CheckpointError(f"{index_file} names {shard!r:.200}, not a plain *.safetensors name")
            if not os.path.isfile(folder / shard):
                raise CheckpointError(f"{folder} lacks the shard {shard!r:.200}; fetch it")
        return {folder / shard: {name for name in index if index[name] == shard} for shard in shards}
    files = sorted(folder.glob("consolidated.*.pth"))  # if one is missing, the parts of matrices do not fit
    if not files:
        kinds = f"such as model.safetensors or consolidated.00.pth{instead(os.listdir(folder))}"
        raise CheckpointError(f"{folder} holds no weights, {kinds}")
    return dict.fromkeys(files)


def published_name(name: str) -> str:
    """Return the published name of a tensor in the Hugging Face layout, whichever release saved it."""
    for pattern, replacement in RENAMED.items():
        name = re.sub(rf"^{pattern}", replacement, name)
    return name
