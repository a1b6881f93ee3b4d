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
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path, PureWindowsPath
from typing import Any

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
    "adapter_config.json": "a LoRA adapter, which `python -m tools.convert BASE DIR --adapter FOLDER` merges",
    "*.bin": "a pickle, which can run code when it is read; convert it to safetensors",
    "*.gguf": "which `python -m tools.convert FILE DIR` converts",
    "params.json": "Meta's layout, which `python -m tools.convert FOLDER DIR` converts",
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
    survey = _survey(folder, module.config, whole)
    pieces = [cut for piece in survey for cut in _cut(piece, shards.get(piece.parameter))]
    weights = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    size = sum(weight.nbytes for weight in weights.values())
    with progress_bar("loading weights", size, "B", progress and size >= BAR_FROM) as advance:
        for piece, row, source in _steps(pieces, step=max(size // 50, 2**20)):
            target = _slice(weights[piece.parameter], piece.target_at)[row : row + len(source)]
            if not piece.repeats:
                target.copy_(source)
                advance(target.nbytes)
            elif not torch.equal(target, source.to(target)):
                raise CheckpointError(f"{piece.file}: {piece.name} should repeat {piece.parameter}, but differs")
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
class _Piece:
    """A slice of a stored tensor, and the slice of a parameter that it fills. Both give a range for some axes."""

    file: Path
    name: str
    parameter: str
    source_at: dict[int, slice] = field(default_factory=dict)
    target_at: dict[int, slice] = field(default_factory=dict)
    repeats: bool = False  # another piece fills the parameter, and this one must be equal
    interleaved: int = 0  # the head width E of Meta's Q and K
    one_expert: bool = False  # one expert's matrix; the parameter has those of all experts
    transposed: bool = False  # all experts' matrices, transposed

    def source(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of the tensor to copy, laid out like the parameter."""
        if self.one_expert:
            tensor = tensor[None]
        if self.transposed:
            tensor = tensor.transpose(1, 2)
        tensor = _slice(tensor, self.source_at)
        if self.interleaved:  # RoPE rotates rows (2i, 2i + 1) of a head in Meta's files, (i, E/2 + i) in ours
            tensor = tensor.unflatten(0, (-1, self.interleaved // 2, 2)).transpose(1, 2).flatten(0, 2)
        return tensor


def _slice(tensor: torch.Tensor, ranges: dict[int, slice]) -> torch.Tensor:
    return tensor[tuple(ranges.get(axis, slice(None)) for axis in range(tensor.dim()))]


def _cut(piece: _Piece, shard: Shard | None) -> Iterator[_Piece]:
    """Yield what a piece and a shard of its parameter have in common."""
    if shard is None:
        yield piece
        return
    axis, at = shard.axis, 0
    filled = piece.target_at.get(axis, slice(0, shard.whole))
    for first, last in shard.spans:
        low, high = max(filled.start, first), min(filled.stop, last)
        if low < high:
            source_at = {axis: slice(low - filled.start, high - filled.start)}
            target_at = piece.target_at | {axis: slice(at + low - first, at + high - first)}
            yield replace(piece, source_at=source_at, target_at=target_at)
        at += last - first


def _steps(pieces: list[_Piece], step: int) -> Iterator[tuple[_Piece, int, torch.Tensor]]:
    """Yield each piece in slices (piece, first row, rows), with about `step` bytes of the files resident.

    A page of a mapped file counts as resident memory until the file is unmapped, so the files are mapped anew.
    """
    file, touched = None, 0
    for piece in pieces:
        row, rows = 0, 1
        while row < rows:
            if piece.file != file or touched >= step:
                file, tensors, touched = piece.file, _map(piece.file), 0
            source = piece.source(tensors[piece.name])
            rows = len(source)
            part = source[row : row + max(1, (step - touched) // source[0].nbytes)]
            yield piece, row, part
            row, touched = row + len(part), touched + part.nbytes


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


def _survey(folder: Path, config: Config, shapes: dict[str, tuple[int, ...]]) -> list[_Piece]:
    """Match the stored tensors with the parameters, given by name and shape. One error names all differences."""
    stored = _stored(folder, config.head_dim, shapes.keys())
    wanted = _wanted(shapes, stored.keys())
    if config.tie_embeddings and HEAD in stored:
        embedding = next(name for name in shapes if name.endswith(EMBEDDING))
        wanted[HEAD] = shapes[embedding], {"parameter": embedding, "repeats": True}
    pieces, dtypes, misfits = [], [], []
    surplus = [name for name in stored if name not in wanted]
    missing = [name for name in wanted if name not in stored]
    for name in [name for name in stored if name in wanted]:
        parts, (shape, special) = stored[name], wanted[name]
        dtypes += [f"{name} ({tensor.dtype})" for _, tensor in parts if tensor.dtype not in FLOATS]
        fitting = _fit(parts, shape)
        if not fitting:
            found = " + ".join(str(list(tensor.shape)) for _, tensor in parts)
            misfits.append(f"{name} is {found}, not {list(shape)}")
        pieces += [replace(piece, **special) for piece in fitting]
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
        files = {piece.file for parts in stored.values() for piece, _ in parts if piece.file.suffix == ".pth"}
        if misfits and files:  # each file has a part of each matrix
            reasons.append(f"there are {len(files)} files consolidated.*.pth, perhaps not all")
        faults = {"missing": missing, "surplus": surplus, "of a wrong dtype": dtypes, "of a wrong shape": misfits}
        reasons += [f"{fault}: {some(names)}" for fault, names in faults.items() if names]
        raise CheckpointError(f"the weights in {folder} are not those of its config: {'; '.join(reasons)}")
    return sorted(pieces, key=lambda piece: (piece.repeats, piece.file))


def _wanted(shapes: dict[str, tuple[int, ...]], stored: Set[str]) -> dict[str, tuple[tuple[int, ...], dict[str, Any]]]:
    """Return the shape of each tensor to look for, and the fields of its `_Piece` that are special.

    These are the parameters. A parameter that holds all experts is replaced if the experts are stored one by one.
    """
    wanted = {}
    for name, shape in shapes.items():
        experts, _, kind = name.rpartition(".")
        matrices = EXPERT_MATRICES.get(kind, ())
        if not any(f"{experts}.0.{matrix}.weight" in stored for matrix in matrices):
            wanted[name] = shape, {}
            continue
        rows = shape[1] // len(matrices)
        for expert in range(shape[0]):
            for number, matrix in enumerate(matrices):
                target_at = {0: slice(expert, expert + 1), 1: slice(number * rows, (number + 1) * rows)}
                special = {"parameter": name, "target_at": target_at, "one_expert": True}
                wanted[f"{experts}.{expert}.{matrix}.weight"] = (rows, shape[2]), special
    return wanted


def _stored(folder: Path, head_dim: int, parameters: Set[str]) -> dict[str, list[tuple[_Piece, torch.Tensor]]]:
    """Collect what is stored for each parameter: one tensor, or in Meta's layout one from each file."""
    stored = {}
    for file, names in _weight_files(folder).items():
        tensors = _map(file, checksums=True)
        if names is not None and (astray := tensors.keys() ^ names):
            raise CheckpointError(f"{file} and the index beside it disagree about {some(sorted(astray))}")
        for name, tensor in tensors.items():
            parameter, interleaved = name, 0
            if file.suffix == ".pth":
                parameter = meta.parameter_name(name)
                interleaved = head_dim if name.endswith(meta.INTERLEAVED) else 0
            elif name not in parameters:
                parameter = published_name(name)
            if not name.endswith(ROPE_TABLES):
                piece = _Piece(file, name, parameter, interleaved=interleaved)
                stored.setdefault(parameter, []).append((piece, tensor))
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
    files = sorted(folder.glob("consolidated.*.pth"))
    for rank, file in enumerate(files):
        if file.name != f"consolidated.{rank:02d}.pth":
            raise CheckpointError(f"{folder} holds {file.name}, but no consolidated.{rank:02d}.pth; fetch it")
    if not files:
        kinds = f"such as model.safetensors or consolidated.00.pth{instead(os.listdir(folder))}"
        raise CheckpointError(f"{folder} holds no weights, {kinds}")
    return dict.fromkeys(files)


def published_name(name: str) -> str:
    """Return the published name of a tensor in the Hugging Face layout, whichever release saved it."""
    for pattern, replacement in RENAMED.items():
        name = re.sub(rf"^{pattern}", replacement, name)
    return name


def _fit(parts: list[tuple[_Piece, torch.Tensor]], whole: tuple[int, ...]) -> list[_Piece]:
    """Make parts fill a whole: side by side, as Meta cuts matrices, or as copies. [] means that they do not fit."""
    shapes = {tuple(tensor.shape) for _, tensor in parts}
    part, ranks = shapes.pop(), len(parts)
    if shapes or not part or (parts[0][0].interleaved and part[0] % parts[0][0].interleaved):
        return []
    if part == whole:
        return [replace(piece, repeats=rank > 0) for rank, (piece, _) in enumerate(parts)]
    if len(part) == 3 and (part[0], part[2], part[1]) == whole:
        return [replace(parts[0][0], transposed=True)]  # experts of Qwen3-VL, as published
    for axis, size in enumerate(part):
        if (*part[:axis], size * ranks, *part[axis + 1 :]) == whole:
            return [replace(p, target_at={axis: slice(r * size, (r + 1) * size)}) for r, (p, _) in enumerate(parts)]
    return []
