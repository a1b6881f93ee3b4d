"""Tensor parallelism on torch.distributed: one model in N processes (ranks), each with a device of its own.

The cut is Megatron-LM's (Shoeybi et al. 2019). A rank holds whole heads of each attention and a share of each MLP's
width, so that a layer needs one sum over the ranks behind attention and one behind the MLP:

              q k v proj.    o_proj                gate, up proj.    down_proj
    rank 0    its heads      their columns ─┐      its rows          their columns ─┐
    rank 1    its heads      their columns ─┤      its rows          their columns ─┤
    ...                              all-reduce: h                          all-reduce: h

The residual stream h is whole on every rank, and so are norms and a vision tower. The embedding and the output head are
cut by vocabulary: a rank looks up the tokens that it holds, and a sum over the ranks has them all; each computes its
tokens' logits, and all are gathered, so that they are the same on all ranks to the last bit.

A rank's model is an ordinary one (pop/models) of fewer heads and a narrower MLP, in which five kinds of parts are
swapped: `Part` says what it holds and swaps them. Of a mixture of experts it has the router and all experts, each as
much narrower. Its KV cache holds its heads. Prefill, decode, pruning and compiling know nothing of it. All ranks run
the same program on the same inputs, and call the model in the same order.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import gc
import math
import os
import sys
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from pop import models
from pop.backends.cpu import Embedding, Linear, linear
from pop.backends.experts import Experts
from pop.checkpoints.weights import VISION, Shard
from pop.engine.cache import KVCache
from pop.errors import InputError

TIMEOUT = timedelta(minutes=10)  # that a rank waits for the others, whose disks or compilers may be slower


def launched() -> tuple[int, int]:
    """This process's rank and how many there are, as torchrun says; without it, 0 and 1."""
    if dist.is_available() and dist.is_torchelastic_launched():
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def join(device) -> tuple[int, int, torch.device | str | None]:
    """This process's rank, how many there are, and its device, for a model that all of them load together.

    The ranks are those of the process group, if there is one; else those that torchrun has started, and a group is
    made: NCCL on GPUs, gloo on CPUs. Without either it is one process. device: as in `pop.load`; of several GPUs a
    process takes the one of its local rank. Raises InputError.
    """
    if not (dist.is_available() and (dist.is_initialized() or launched()[1] > 1)):
        return 0, 1, device
    if device in (None, "cuda") and (device or torch.cuda.is_available()):
        number = int(os.environ.get("LOCAL_RANK", dist.get_rank() if dist.is_initialized() else 0))
        if number >= torch.cuda.device_count():
            raise InputError(
                f"this is process {number + 1} of its machine, which has {torch.cuda.device_count()} GPUs; start as "
                "many processes as there are, or use device='cpu'"
            )
        device = torch.device("cuda", number)
    if not dist.is_initialized():
        backend = "nccl" if str(device).startswith("cuda") else "gloo"  # what is no device is refused later
        if backend == "nccl":
            torch.cuda.set_device(device)
        try:
            dist.init_process_group(backend, timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            reason = str(error).split("\n")[0]
            raise InputError(f"the processes cannot form a group ({reason}); start them with torchrun") from None
        atexit.register(_leave)
    return dist.get_rank(), dist.get_world_size(), device


def _leave() -> None:
    with contextlib.suppress(Exception):  # it is left already, or the others are gone
        dist.destroy_process_group()
    gc.collect()  # a group that is still there when the interpreter ends aborts it


def end(status: int = 0) -> NoReturn:
    """End this process, one of a group that `pop.load` has made, with an exit status.

    It leaves the group and skips the end of the interpreter, at which a thread of the group that still waits for Python
    would abort a process that has succeeded (seen with gloo under load). Nothing else that is registered for the exit
    is run.
    """
    _leave()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads on
            stream.flush()
    os._exit(status)


class Part:
    """What rank `rank` of `size` holds of the model of `whole`, a config.

    config: of the rank's own model: fewer heads and a narrower MLP.
    kv_rows: which rows of the whole K and V projections are its, in order; of a K/V head that several ranks' query
    heads attend, each has a copy.
    shards: by the name of a parameter which part of it is the rank's; those without one are whole.

    Raises InputError where the number of query heads is not a multiple of `size`.
    """

    def __init__(self, whole, rank: int, size: int):
        self.whole, self.rank, self.size = whole, rank, size
        H, K, E = whole.num_heads, whole.num_kv_heads, whole.head_dim
        if H % size:
            raise InputError(
                f"the model has {H} query heads, which cannot be divided among {size} processes; start a number of "
                f"processes that divides {H}"
            )
        count, G = H // size, H // K
        # Query heads in blocks, as long as they can be for all heads of a block to share a K/V head.
        block = math.gcd(count, G)
        blocks = range(rank * count, (rank + 1) * count, block)
        heads = [first // G for first in blocks]
        self.kv_rows = [head * E + row for head in heads for row in range(E)]
        inner = _share(whole.intermediate_size, rank, size)
        sizes = {"num_heads": count, "num_kv_heads": len(heads), "intermediate_size": inner[1] - inner[0]}
        if (experts := getattr(whole, "experts", None)) is not None:
            of_expert = _share(experts.width, rank, size)
            sizes["experts"] = dataclasses.replace(experts, width=of_expert[1] - of_expert[0])
        self.config = dataclasses.replace(whole, **sizes)
        queries = Shard(0, H * E, ((rank * count * E, (rank + 1) * count * E),))
        keys = Shard(
            0, K * E, tuple((head * E, (head + 1) * E) for head in heads), tuple(first % G == 0 for first in blocks)
        )
        width = Shard(0, whole.intermediate_size, (inner,))
        words = Shard(0, whole.vocab_size, (_share(whole.vocab_size, rank, size),))
        self._kinds = {
            "q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": dataclasses.replace(queries, axis=1),
            "gate_proj": width, "up_proj": width, "down_proj": dataclasses.replace(width, axis=1),
            "embed_tokens": words, "lm_head": words,
        }  # fmt: skip
        if experts is not None:  # gate and up lie behind each other
            both = of_expert, tuple(experts.width + row for row in of_expert)
            self._kinds["experts.gate_up_proj"] = Shard(1, 2 * experts.width, both)
            self._kinds["experts.down_proj"] = Shard(2, experts.width, (of_expert,))
        self.shards: dict[str, Shard] = {}
        self.num_parameters = 0  # of the whole model

    def build(self) -> nn.Module:
        """The rank's model, without weights: on the meta device."""
        with torch.device("meta"):
            module = models.build(self.config)
            for name, old in list(module.named_modules()):
                parent, _, kind = name.rpartition(".")
                if name.startswith(VISION):
                    continue
                if kind in ("o_proj", "down_proj"):
                    new = RowParallelLinear(old.in_features, old.out_features, bias=old.bias is not None)
                elif kind == "experts":
                    new = ParallelExperts(self.config)
                elif kind in ("embed_tokens", "lm_head"):
                    new = (VocabularyParallelEmbedding if kind == "embed_tokens" else VocabularyParallelHead)(
                        self.whole.vocab_size, self.whole.hidden_size, self.rank, self.size
                    )
                else:
                    continue
                setattr(module.get_submodule(parent), kind, new)
        for name, parameter in module.named_parameters():
            *_, kind, last = name.split(".")
            shard = None if name.startswith(VISION) else self._kinds.get(kind) or self._kinds.get(f"{kind}.{last}")
            if shard is not None and shard.axis < parameter.dim():  # the sum's bias is whole
                self.shards[name] = shard
            self.num_parameters += math.prod(self.whole_shape(name, parameter))
        return module

    def whole_shape(self, name: str, parameter: torch.Tensor) -> tuple[int, ...]:
        """The shape of a parameter before it was cut."""
        shape = tuple(parameter.shape)
        return self.shards[name].whole_shape(shape) if name in self.shards else shape

    def samples(self, name: str, parameter: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Every step-th value of a whole, flattened parameter, as far as this rank answers for it, and its number.

        Of all ranks together each value comes once.
        """
        shard = self.shards.get(name)
        if shard is None:
            values = parameter.flatten()[::step][: None if self.rank == 0 else 0]
            return values, torch.arange(len(values), device=values.device)
        whole = shard.whole_shape(tuple(parameter.shape))
        numbers = torch.arange(0, math.prod(whole), step, device=parameter.device)
        place = list(torch.unravel_index(numbers, whole))
        here = shard.places().to(parameter.device)[place[shard.axis]]
        mine = here >= 0
        place[shard.axis] = here
        return parameter[tuple(index[mine] for index in place)], numbers[mine] // step

    def add_up(self, numbers: torch.Tensor) -> None:
        """Replace numbers by their sums over the ranks."""
        dist.all_reduce(numbers)

    def agree(self, tokens: torch.Tensor) -> None:
        """Replace tokens by those of the first rank: sampling may be seeded differently."""
        dist.broadcast(tokens, 0)

    def gather_heads(self, heads: torch.Tensor) -> torch.Tensor:
        """What each rank has for its K/V heads, [n, 2, rows, ...] -> for all of them, [n, 2, K * E, ...]."""
        parts = [torch.empty_like(heads, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, heads.contiguous())
        out = heads.new_empty(*heads.shape[:2], self.whole.num_kv_heads * self.whole.head_dim, *heads.shape[3:])
        for rank, part in enumerate(parts):
            out[:, :, Part(self.whole, rank, self.size).kv_rows] = part
        return out


class RowParallelLinear(Linear):
    """A linear layer of whose inputs each rank has a part: its product is a summand. The bias is whole."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = linear(x, self.weight)
        dist.all_reduce(out)
        return out if self.bias is None else out + self.bias


class ParallelExperts(Experts):
    """Experts of whose widths each rank has a part: what they add up to is a summand."""

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        out = super().forward(x, chosen, shares)
        dist.all_reduce(out)
        return out


class VocabularyParallelHead(Linear):
    """An output head of which each rank has the rows of some tokens."""

    def __init__(self, vocab_size: int, width: int, rank: int, size: int):
        first, last = _share(vocab_size, rank, size)
        super().__init__(width, last - first, bias=False)
        self.vocab_size, self.size = vocab_size, size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _gather_logits(super().forward(x), self.vocab_size, self.size)


class VocabularyParallelEmbedding(Embedding):
    """An embedding, and perhaps a tied head, of which each rank has the rows of some tokens."""

    def __init__(self, vocab_size: int, width: int, rank: int, size: int):
        first, last = _share(vocab_size, rank, size)
        super().__init__(last - first, width)
        self.first, self.vocab_size, self.size = first, vocab_size, size

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        rows = tokens - self.first
        here = (rows >= 0) & (rows < len(self.weight))
        h = super().forward(rows.where(here, 0)) * here[..., None]  # [B, T, D]
        dist.all_reduce(h)
        return h

    def unembed(self, x: torch.Tensor) -> torch.Tensor:
        return _gather_logits(super().unembed(x), self.vocab_size, self.size)


def _gather_logits(logits: torch.Tensor, vocab_size: int, size: int) -> torch.Tensor:
    """Each rank's logits [..., its tokens] -> all, [..., V]."""
    shares = [last - first for first, last in (_share(vocab_size, rank, size) for rank in range(size))]
    padded = F.pad(logits, (0, max(shares) - logits.shape[-1])).contiguous()  # a gathering takes equal parts
    parts = [torch.empty_like(padded) for _ in shares]
    dist.all_gather(parts, padded)
    return torch.cat([part[..., :share] for part, share in zip(parts, shares, strict=True)], dim=-1)


def _share(count: int, rank: int, size: int) -> tuple[int, int]:
    """Where the share of a rank begins and ends, if `count` are divided as evenly as can be; the last has most."""
    return rank * count // size, (rank + 1) * count // size


def bytes_per_device(
    config, size: int, *, dtype: torch.dtype, batch_size: int = 1, max_seq_len: int | None = None
) -> tuple[int, int]:
    """Bytes of the weights and of a KV cache on each of `size` devices (on the last, where they are not equal).

    config: of the whole model. max_seq_len: tokens a row; None takes the model's context. What comes on top are
    activations: some hundred MB for a chunk of a prompt.
    """
    part = Part(config, size - 1, size)
    weights = sum(parameter.numel() for parameter in part.build().parameters()) * dtype.itemsize
    return weights, KVCache.size_in_bytes(part.config, batch_size, max_seq_len or config.max_positions, dtype)
