"""Tensor parallelism on torch.distributed: one model in N processes (ranks), each on its own device.

As in Megatron-LM (Shoeybi et al. 2019), a rank holds whole attention heads and a share of each MLP's width. A layer
needs two sums over the ranks, one after attention and one after the MLP. README.md in this folder has a diagram.

Every rank has the whole residual stream h, all norms of it and any vision tower. The embedding and the output head are
cut by vocabulary. A rank's model is an ordinary one (pop/models) with fewer heads and a narrower MLP, in which `Part`
swaps the modules that communicate. All ranks call it in the same order, and get the same logits to the last bit.
"""

import atexit
import contextlib
import dataclasses
import gc
import os
import sys
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import pop.models as models
from pop.backends.cpu import Embedding, Linear, linear
from pop.backends.experts import Experts
from pop.checkpoints.weights import Shard
from pop.errors import InputError, reason_of
from pop.models.olmo2 import HeadsNorm

OF_KV_HEADS = ("k_proj", "v_proj", "k_norm")  # their rows are those of key-value heads, of which ranks may have copies


def launched() -> tuple[int, int]:
    """This process's rank and the number of ranks, as torchrun gives them. Without torchrun: 0 and 1."""
    if dist.is_available() and dist.is_torchelastic_launched():
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def join(device) -> tuple[int, int, torch.device | str | None]:
    """Join the ranks that load a model together. Returns this process's rank, their number, and this process's device.

    The ranks are those of the process group if there is one, and otherwise those that torchrun has started. The latter
    get a group: NCCL's on GPUs, gloo's on CPUs. With several GPUs, a process takes the one with its local rank.

    Raises:
        InputError: There are too few GPUs, or the ranks cannot reach each other.
    """
    if not (dist.is_available() and (dist.is_initialized() or launched()[1] > 1)):
        return 0, 1, device
    if device == "cuda" or (device is None and torch.cuda.is_available()):
        device = _local_gpu()
    on_gpu = torch.cuda.is_available() and str(device).startswith("cuda")  # an invalid device is refused later
    if on_gpu:
        device = torch.device(device)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _form_group(device if on_gpu else None)
    return dist.get_rank(), dist.get_world_size(), device


def _local_gpu() -> torch.device:
    """The GPU of this machine that has this process's local rank."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    number = int(os.environ.get("LOCAL_RANK", rank))
    count = torch.cuda.device_count()
    if number >= count:
        raise InputError(f"process {number + 1} of a machine with {count} GPUs has none; give device='cpu'")
    return torch.device("cuda", number)


def _form_group(gpu: torch.device | None) -> None:
    """Make a process group of the ranks that torchrun has started: for this GPU, or for CPUs."""
    ten_minutes = timedelta(minutes=10)  # other ranks may read or compile more slowly
    try:
        dist.init_process_group("gloo" if gpu is None else "nccl", timeout=ten_minutes, device_id=gpu)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the processes cannot form a group ({reason_of(error)}); start them with torchrun") from None
    atexit.register(_at_exit)


def _at_exit() -> None:
    if hasattr(sys, "last_value"):  # Python has printed an exception that nothing caught
        end(1)
    _leave()


def _leave() -> None:
    with contextlib.suppress(Exception):  # the group may be left already, or the others may be gone
        dist.destroy_process_group()
    gc.collect()  # a group that exists when the interpreter ends aborts the process


def end(status: int = 0) -> NoReturn:
    """Leave the group and end this process with an exit status, without the interpreter's usual shutdown.

    In that shutdown, a thread of the group that waits for Python can abort a process that has succeeded. This was seen
    with gloo under load. Other functions that are registered with atexit do not run.

    A process that has failed does not leave the group: NCCL would wait for the others, which may wait for this process
    in a collective. Once it has ended, torchrun ends them.
    """
    if status == 0:
        _leave()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the reader may be gone
            stream.flush()
    os._exit(status)


def add_up(numbers: Tensor) -> Tensor:
    """Replace numbers by their sums over the ranks, and return them."""
    dist.all_reduce(numbers)
    return numbers


def largest(numbers: Tensor) -> Tensor:
    """Replace numbers by their maxima over the ranks, and return them."""
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return numbers


class Part:
    """The part of a model that one rank holds.

    Args:
        whole: The config of the whole model.
        rank, size: Of this process, and the number of ranks.

    Raises:
        InputError: Ranks would hold parts of heads. `size` must divide the number of query heads H, and it must divide
            the number of key-value heads K or be a multiple of it.

    Attributes:
        config: Of the rank's own model.
        kv_rows: The rank's rows of the whole K and V projections. With more ranks than key-value heads, several ranks
            hold a copy of the same head.
        shards: By parameter's name, which part the rank has. A parameter without a shard is whole.
        num_parameters: Of the whole model.
    """

    def __init__(self, whole, rank: int, size: int):
        H = whole.num_heads
        K = whole.num_kv_heads
        E = whole.head_dim
        if H % size or (K % size and size % K):
            raise InputError(
                f"{size} processes cannot share {H} query heads and {K} key-value heads evenly; "
                "start a number that divides both"
            )
        self.whole = whole
        self.rank = rank
        self.size = size
        self.shards: dict[str, Shard] = {}  # filled by `build`, as is the next
        self.num_parameters = 0
        self.copies = max(1, size // K)  # ranks that hold the same key-value head
        kv_heads = max(1, K // size)
        kv_begin = rank // self.copies * kv_heads * E
        self.kv_rows = range(kv_begin, kv_begin + kv_heads * E)
        sizes = {
            "num_heads": H // size,
            "num_kv_heads": kv_heads,
            "intermediate_size": len(self._share(whole.intermediate_size)),
        }
        experts = getattr(whole, "experts", None)
        if experts is not None:
            sizes["experts"] = dataclasses.replace(experts, width=len(self._share(experts.width)))
        self.config = dataclasses.replace(whole, **sizes)

    def build(self) -> nn.Module:
        """Build the rank's model on the meta device, and fill `shards` and `num_parameters`."""
        with torch.device("meta"):
            model = models.build(self.config)
            whole = models.build(self.whole)
        model.largest_of_processes = largest
        for name, module in model.named_modules():
            kind = name.rpartition(".")[2]
            if isinstance(module, HeadsNorm):
                module.__class__ = ParallelHeadsNorm
            if kind in PARALLEL:  # nothing in a vision tower has such a name
                module.__class__ = PARALLEL[kind]
            if kind in ("embed_tokens", "lm_head"):  # the config keeps the whole vocabulary
                vocab_size = self.whole.vocab_size
                tokens = self._share(vocab_size)
                module.before = tokens.start  # how many tokens other ranks have, before these and after them
                module.after = vocab_size - tokens.stop
                module.weight = nn.Parameter(module.weight[tokens.start : tokens.stop])
        for (name, parameter), of_whole in zip(model.named_parameters(), whole.parameters(), strict=True):
            self.num_parameters += of_whole.numel()
            for axis in range(-of_whole.dim(), 0):
                if parameter.shape[axis] != of_whole.shape[axis]:
                    self.shards[name] = self._shard(name, of_whole, axis)
        return model

    def _shard(self, name: str, whole: Tensor, axis: int) -> Shard:
        """Which rows or columns of a whole parameter the rank has."""
        *_, kind, last = name.split(".")
        width = whole.shape[axis]
        if last == "gate_up_proj":  # of each expert: gate's rows, then those of up
            width //= 2
        return Shard(whole, axis, width, self.kv_rows if kind in OF_KV_HEADS else self._share(width))

    def _share(self, count: int) -> range:
        """The rank's share of `count`, which is divided as evenly as possible."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def agree(self, seeds: list[int], device: torch.device) -> list[int]:
        """The first rank's seeds. With them all ranks sample the same tokens, since they have the same logits."""
        numbers = torch.tensor(seeds, device=device)
        dist.broadcast(numbers, 0)
        return numbers.tolist()

    def gather_heads(self, heads: Tensor) -> Tensor:
        """Each rank's values for its K/V heads [n, 2, rows, ...] -> those of all heads [n, 2, K * E, ...]."""
        parts = [torch.empty_like(heads, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, heads.contiguous())
        return torch.cat(parts[:: self.copies], dim=2)


class RowParallelLinear(Linear):
    """A linear layer with some columns of the matrix. The ranks' products are summed. Each rank has the whole bias."""

    def forward(self, x: Tensor) -> Tensor:
        out = add_up(linear(x, self.weight))
        return out if self.bias is None else out + self.bias


class ParallelHeadsNorm(HeadsNorm):
    """OLMo-2's norm over all heads, of which a rank has some.

    Every head is on the same number of ranks, so the mean over all heads is the mean of the ranks' means.
    """

    def mean_square(self, x: Tensor) -> Tensor:
        return add_up(super().mean_square(x)) / dist.get_world_size()


class ParallelExperts(Experts):
    """Experts with a share of their widths. The ranks' results are summed."""

    def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        return add_up(super().forward(x, chosen, shares))


class VocabularyParallelHead(Linear):
    """An output head with the rows of some tokens. The ranks' logits are gathered."""

    def forward(self, x: Tensor) -> Tensor:
        return _gather_logits(super().forward(x), self)


class VocabularyParallelEmbedding(Embedding):
    """An embedding with the rows of some tokens, which may serve as a tied head. The ranks' embeddings are summed."""

    def forward(self, tokens: Tensor) -> Tensor:
        rows = tokens - self.before
        here = (rows >= 0) & (rows < len(self.weight))
        return add_up(super().forward(rows.where(here, 0)) * here[..., None])  # [B, T, D]; zero for others' tokens

    def unembed(self, x: Tensor) -> Tensor:
        return _gather_logits(super().unembed(x), self)


PARALLEL = {
    "o_proj": RowParallelLinear, "down_proj": RowParallelLinear, "experts": ParallelExperts,
    "embed_tokens": VocabularyParallelEmbedding, "lm_head": VocabularyParallelHead,
}  # fmt: skip


def _gather_logits(logits: Tensor, module) -> Tensor:
    """A rank's logits [..., its tokens] -> all logits [..., V]."""
    return add_up(F.pad(logits, (module.before, module.after)))
