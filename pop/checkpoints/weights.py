"""Weight files to parameters: built on the meta device, memory-mapped, strict.

`load_weights` reads the Hugging Face layout (model.safetensors, or shards with an index) or Meta's own
(consolidated.NN.pth, a file for each tensor-parallel rank), in two passes. The *survey* maps all files, reads
no weight, compares names, shapes and dtypes with the module's, and names all differences in one error. The
*copy* fills new parameters that own their memory, so that files may be replaced under a running model.

A page of a mapped file counts as resident memory from its first touch until the file is unmapped. The copy
therefore goes in steps and maps the file anew after each: loading needs the weights' size and a few percent.

A safetensors file has no checksum: a flipped bit inside a weight is noticed only where it makes a norm or a
bias infinite or NaN. Meta's files are zip archives, and all their checksums are verified.
"""

import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from types import MappingProxyType

import torch
from safetensors import safe_open
from torch import nn

from pop.errors import CheckpointError
from pop.files import read_json
from pop.models.config import Config
from pop.progress import progress_bar

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# The names of a Gemma-3 with a vision tower in later saves of the reference implementation, as patterns, and as
# published.
RENAMED = {
    r"model\.(language_model|vision_tower|multi_modal_projector)\.": r"\1.",
    r"vision_tower\.(?!vision_model\.)": "vision_tower.vision_model.",
    r"language_model\.lm_head\.": "lm_head.",
    r"language_model\.(?!model\.)": "language_model.model.",
}
HARMLESS = ("rotary_emb.inv_freq", "rope.freqs")  # RoPE tables in old files; ours follow from the config
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"  # the former's name ends so
NO_SHARDS = MappingProxyType({})
BAR_FROM = 2**30  # bytes: below, a progress bar would only flicker


@dataclass(frozen=True)
class Shard:
    """The part of a parameter that one of several processes holds (pop/backends/tensor_parallel.py): ranges along an axis.

    whole: the parameter's whole length along `axis`. spans: (begin, end) in the whole, one behind the other in the
    part. owned: whether this process answers for a span that others have, too; (): for all of them.
    """

    axis: int
    whole: int
    spans: tuple[tuple[int, int], ...]
    owned: tuple[bool, ...] = ()

    def whole_shape(self, part: tuple[int, ...]) -> tuple[int, ...]:
        return (*part[: self.axis], self.whole, *part[self.axis + 1 :])

    def places(self) -> torch.Tensor:
        """[whole], where in the part each index along the axis is; -1: nowhere, or another process answers for it."""
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
    shards: Mapping[str, Shard] = NO_SHARDS,
) -> None:
    """Fill `module`, built on the meta device from the config in `folder`, with the weights in `folder`.

    Afterwards every parameter is contiguous, has `dtype`, lies on `device` and needs no gradient. `progress`
    shows a bar on stderr for large weights, if tqdm is installed. shards: which part of a parameter the module has, by
    name, if not the whole; nothing else is read. Raises CheckpointError, `module` untouched.
    """
    folder = Path(folder)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    whole = {name: shards[name].whole_shape(s) if name in shards else s for name, s in shapes.items()}
    pieces = [cut for piece in _survey(folder, module.config, whole) for cut in _cut(piece, shards)]
    weights = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    size = sum(weight.nbytes for weight in weights.values())
    with progress_bar("loading weights", size, "B", progress and size >= BAR_FROM) as advance:
        for piece, row, source in _steps(pieces, step=max(size // 50, 2**20)):
            target = piece.target(weights[piece.parameter])[row : row + len(source)]
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


@dataclass(frozen=True)
class _Piece:
    """A stored tensor, or the slices `source_at` of it, and the parameter it fills, or the slices `target_at` of it."""

    file: Path
    name: str
    parameter: str
    source_at: tuple[slice, ...] = ()
    target_at: tuple[slice, ...] = ()
    repeats: bool = False  # the parameter is filled already, and this must be equal to it
    interleaved: int = 0  # the head width E of Meta's Q and K
    one_expert: bool = False  # a matrix of one expert, of which the parameter has all
    transposed: bool = False  # all experts' matrices, the other way round

    def target(self, parameter: torch.Tensor) -> torch.Tensor:
        """The part of the parameter to fill, as a view shaped like `source`."""
        part = parameter[self.target_at]
        return part.unflatten(0, (-1, 2, self.interleaved // 2)).transpose(1, 2) if self.interleaved else part

    def source(self, tensor: torch.Tensor) -> torch.Tensor:
        """RoPE rotates rows (2i, 2i + 1) of a head in Meta's files, (i, E/2 + i) in ours."""
        tensor = tensor[None] if self.one_expert else tensor.transpose(1, 2) if self.transposed else tensor
        tensor = tensor[self.source_at]
        return tensor.unflatten(0, (-1, self.interleaved // 2, 2)) if self.interleaved else tensor


def _cut(piece: _Piece, shards: Mapping[str, Shard]) -> Iterator[_Piece]:
    """What of a piece falls into the part of its parameter that the module has."""
    if (shard := shards.get(piece.parameter)) is None:
        yield piece
        return
    place = (*piece.target_at, *[slice(None)] * 3)[shard.axis]
    begin, end, _ = place.indices(shard.whole)
    at = 0
    for first, last in shard.spans:
        low, high = max(begin, first), min(end, last)
        if low < high:
            source_at = _narrow(piece.source_at, shard.axis, low - begin, high - begin)
            target_at = _narrow(piece.target_at, shard.axis, at + low - first, at + high - first)
            yield replace(piece, source_at=source_at, target_at=target_at)
        at += last - first


def _narrow(at: tuple[slice, ...], axis: int, begin: int, end: int) -> tuple[slice, ...]:
    """`at`, with begin:end along an axis."""
    at = [*at, *[slice(None)] * (axis + 1 - len(at))]
    at[axis] = slice(begin, end)
    return tuple(at)


def _steps(pieces: list[_Piece], step: int) -> Iterator[tuple[_Piece, int, torch.Tensor]]:
    """Each piece in slices (piece, first row, rows), with about `step` bytes of the files resident."""
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
    """The tensors of a weight file, memory-mapped: a page is read when it is first touched."""
    try:
        if file.suffix == ".pth":
            if checksums:
                with zipfile.ZipFile(file) as archive:
                    if any(entry.compress_type for entry in archive.infolist()) or archive.testzip():
                        raise ValueError("wrong checksum or compressed")
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        else:
            with safe_open(file, framework="pt") as handle:
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        dense = [t.is_cpu and t.layout == torch.strided and not t.is_nested for t in tensors.values()]
        if not all(dense) or not all(isinstance(name, str) for name in tensors):
            raise ValueError("not a dictionary of dense tensors")
    except pickle.UnpicklingError:  # torch's own words advise to load it all the same
        raise CheckpointError(f"{file} holds more than tensors, or is corrupt; it is not loaded") from None
    except Exception as error:  # corrupt bytes can raise nearly anything
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise CheckpointError(f"{file} is truncated or corrupt, fetch it again ({reason:.200})") from None
    return tensors


# The config's fields that make the shape of a weight; that of a norm is hidden_size.
HEADS, KV_HEADS = "num_attention_heads * head_dim", "num_key_value_heads * head_dim"
DIMENSIONS = {
    "embed_tokens": ("vocab_size", "hidden_size"), "lm_head": ("vocab_size", "hidden_size"),
    "q_proj": (HEADS, "hidden_size"), "o_proj": ("hidden_size", HEADS),
    "k_proj": (KV_HEADS, "hidden_size"), "v_proj": (KV_HEADS, "hidden_size"),
    "gate_proj": ("intermediate_size", "hidden_size"), "up_proj": ("intermediate_size", "hidden_size"),
    "down_proj": ("hidden_size", "intermediate_size"),
    "q_norm": ("head_dim",), "k_norm": ("head_dim",),
    "gate": ("num_experts", "hidden_size"),
    "experts.gate_up_proj": ("num_experts", "2 * moe_intermediate_size", "hidden_size"),
    "experts.down_proj": ("num_experts", "hidden_size", "moe_intermediate_size"),
}  # fmt: skip
VISION = ("vision_tower.", "multi_modal_projector.", "model.visual.")  # shaped by vision_config
META_NAMES = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
}  # fmt: skip


def _survey(folder: Path, config: Config, wanted: dict[str, tuple[int, ...]]) -> list[_Piece]:
    """Match what is stored with the names and shapes of the parameters; one error names all that does not fit."""
    stored = _stored(folder, config.head_dim, wanted.keys())
    wanted, places = _one_by_one(wanted, stored.keys())
    missing = [name for name in wanted if name not in stored]
    embedding = next((name for name in wanted if name.endswith(EMBEDDING)), EMBEDDING)
    surplus, dtypes, shapes, pieces = [], [], [], []
    for name, parts in stored.items():
        # A head beside a tied embedding is superfluous, and no contradiction if it repeats the embedding.
        tied = name == HEAD and config.tie_embeddings
        if (whole := wanted.get(embedding if tied else name)) is None:
            surplus.append(name)
            continue
        dtypes += [f"{name} ({tensor.dtype})" for _, tensor in parts if tensor.dtype not in FLOATS]
        if not (fitting := _fit(parts, whole)):
            found = " + ".join(str(list(tensor.shape)) for _, tensor in parts)
            *_, kind, last = name.split(".")
            fields = DIMENSIONS.get(kind) or DIMENSIONS.get(f"{kind}.{last}", ("hidden_size",))
            fields = " x ".join(fields[: len(whole)])
            if name in places:
                fields = fields.replace("intermediate", "moe_intermediate")
            if name.startswith(VISION):
                fields = "the sizes of vision_config"
            shapes.append(f"{name} is {found}, not {list(whole)} = {fields}")
        if tied:
            fitting = [replace(piece, parameter=embedding, repeats=True) for piece in fitting]
        elif name in places:
            parameter, target_at = places[name]
            fitting = [replace(p, parameter=parameter, target_at=target_at, one_expert=True) for p in fitting]
        pieces += fitting

    faults = {"missing": missing, "surplus": surplus, "of a wrong dtype": dtypes, "of a wrong shape": shapes}
    if any(faults.values()):
        layer = r"(language_model\.)?model\.(language_model\.)?layers\.\d+\."
        layers = len({match[0] for name in stored if (match := re.match(layer, name))})
        depth = f"num_hidden_layers is {config.num_layers} but {layers} layers are stored"
        reasons = [depth] if layers != config.num_layers else []
        reasons += ["tie_word_embeddings is false"] if HEAD in missing else []
        meta_files = {piece.file for parts in stored.values() for piece, _ in parts if piece.file.suffix == ".pth"}
        if shapes and meta_files:  # each matrix is cut between the files
            reasons.append(f"there are {len(meta_files)} files consolidated.*.pth, perhaps not all")
        reasons += [f"{kind}: {_some(names)}" for kind, names in faults.items() if names]
        raise CheckpointError(f"the weights in {folder} are not those of its config: {'; '.join(reasons)}")
    return sorted(pieces, key=lambda piece: (piece.repeats, piece.file))


def _one_by_one(wanted: dict[str, tuple[int, ...]], stored: Set[str]) -> tuple[dict[str, tuple[int, ...]], dict]:
    """The names and shapes that are wanted, where experts are stored one by one those of each.

    And for these, by name, the parameter that has all experts, and which slices of it are this one's.
    """
    names, places = {}, {}
    for name, shape in wanted.items():
        experts, _, kind = name.rpartition(".")
        matrices = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(kind, ("",))
        if f"{experts}.0.{matrices[0]}.weight" not in stored:
            names[name] = shape
            continue
        rows = shape[1] // len(matrices)
        for expert in range(shape[0]):
            for number, matrix in enumerate(matrices):
                one = f"{experts}.{expert}.{matrix}.weight"
                names[one] = (rows, shape[2])
                places[one] = name, (slice(expert, expert + 1), slice(number * rows, (number + 1) * rows))
    return names, places


def _stored(folder: Path, head_dim: int, wanted: Set[str]) -> dict[str, list[tuple[_Piece, torch.Tensor]]]:
    """What is stored for each parameter: one tensor, or in Meta's layout one from each file."""
    files, index = _weight_files(folder)
    stored = {}
    for file in files:
        tensors = _map(file, checksums=True)
        if index is not None and (astray := tensors.keys() ^ {n for n in index if index[n] == file.name}):
            raise CheckpointError(f"{file} and the index beside it disagree about {_some(sorted(astray))}")
        for name, tensor in tensors.items():
            meta = file.suffix == ".pth"
            parameter = _hf_name(name) if meta else name if name in wanted else published_name(name)
            rotated = meta and parameter != name and parameter.endswith((".q_proj.weight", ".k_proj.weight"))
            piece = _Piece(file, name, parameter, interleaved=head_dim if rotated else 0)
            if not name.endswith(HARMLESS):
                stored.setdefault(parameter, []).append((piece, tensor))
    return stored


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files, and the index (tensor -> shard) where there is one.

    As in the reference implementation an unsharded file goes first. A shard may be a symlink (download caches
    make them), but its name comes from outside and must be a plain one: no path, no way out of the folder.
    """
    index_file = folder / "model.safetensors.index.json"
    if os.path.isfile(folder / "model.safetensors"):
        return [folder / "model.safetensors"], None
    if os.path.isfile(index_file):
        index = read_json(index_file, CheckpointError).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(shard, str) for shard in index.values()):
            raise CheckpointError(f"{index_file} holds no weight_map of tensors to files; fetch it again")
        shards = sorted(set(index.values()))
        for shard in shards:
            if PureWindowsPath(shard).name != shard or not shard.endswith(".safetensors"):
                raise CheckpointError(f"{index_file} names {shard!r:.200}, not a plain *.safetensors name")
            if not os.path.isfile(folder / shard):
                raise CheckpointError(f"{folder} lacks the shard {shard!r:.200}; fetch it")
        return [folder / shard for shard in shards], index
    files = sorted(folder.glob("consolidated.*.pth"))
    for rank, file in enumerate(files):
        if file.name != f"consolidated.{rank:02d}.pth":
            raise CheckpointError(f"{folder} holds {file.name}, but no consolidated.{rank:02d}.pth; fetch it")
    if not files:
        raise CheckpointError(f"{folder} holds no weights, such as model.safetensors or consolidated.00.pth")
    return files, None


def _hf_name(name: str) -> str:
    """Meta's name of a tensor in our terms. A name that is not Meta's is kept, and will be surplus."""
    match = re.fullmatch(r"(layers\.\d+\.|)(.+)\.weight", name)
    if not match or match[2] not in META_NAMES:
        return name
    return ("model." if match[1] else "") + match[1] + META_NAMES[match[2]] + ".weight"


def published_name(name: str) -> str:
    """The published name of a tensor in the Hugging Face layout, whichever release has saved it."""
    for pattern, replacement in RENAMED.items():
        name = re.sub(rf"^{pattern}", replacement, name)
    return name


def _fit(parts: list[tuple[_Piece, torch.Tensor]], whole: tuple[int, ...]) -> list[_Piece]:
    """Lay parts side by side (Meta cuts matrices by rows or columns) or over each other (norms); else []."""
    shapes = {tuple(tensor.shape) for _, tensor in parts}
    part, ranks = shapes.pop(), len(parts)
    if shapes or not part or (parts[0][0].interleaved and part[0] % parts[0][0].interleaved):
        return []
    if part == whole:
        return [replace(piece, repeats=rank > 0) for rank, (piece, _) in enumerate(parts)]
    if len(part) == 3 and (part[0], part[2], part[1]) == whole:
        return [replace(parts[0][0], transposed=True)]  # experts of Qwen3-VL, as published
    axes = [a for a, n in enumerate(part) if (*part[:a], n * ranks, *part[a + 1 :]) == whole]
    if not axes:
        return []
    axis, size = axes[0], part[axes[0]]
    return [replace(p, target_at=_narrow((), axis, r * size, (r + 1) * size)) for r, (p, _) in enumerate(parts)]


def _some(items: list[str]) -> str:
    named = ", ".join(ascii(item)[1:-1][:200] for item in items[:5])  # names in a file may hold anything
    return named + (f" and {len(items) - 5} more" if len(items) > 5 else "")
