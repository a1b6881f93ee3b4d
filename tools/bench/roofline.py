"""The least time of a prefill on a machine of given rates, by the roofline model (Williams et al. 2009).

On a GPU, a part of the work with few tokens takes as long as its memory reads. For each chunk of the prompt, a part
reads its matrices and the K and V that its tokens attend to. Activations and writes are left out. So are the reads of a
vision tower, where the arithmetic of hundreds of patches takes longer.

    a kept layer, or the full-depth         qo + kv + mlp. T tokens read min(X, k·T) experts, on the assumption that no
    tokens of a pruned layer                two of them choose the same expert while others are left
    k and v of a pruned layer               2 · K·E·(D + R)
    codes and update of a group             2 · D·R and D·R
    the output head                         its matrix

    T(plan) = sum over parts of max(FLOPs / FLOPs per second, bytes / bytes per second)

In short prompts T(none) / T(plan) is less than the ratio of the FLOPs, because the matrices of a pruned layer are read
for few tokens. pop/pruning/cost.py counts the FLOPs and explains the letters.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from pop.pruning import cost
from pop.pruning.plan import Group, PrunePlan
from tools.bench.tower import vision_flops


class Machine(NamedTuple):
    """The rates of a machine, and how a prefill runs on it."""

    flops_per_s: float  # of a large matrix product
    bytes_per_s: float  # of memory reads
    itemsize: int = 2  # bytes of a weight, and of a number in the cache
    chunk_size: int | None = None  # tokens that run at once; None: the whole prompt


class Part(NamedTuple):
    """A part of the work: its FLOPs, and the numbers that it reads, which are weights, K and V."""

    flops: int
    numbers: int


def prefill_seconds(config, num_tokens: int, plan: PrunePlan, machine: Machine, patches: Sequence[int] = ()) -> float:
    """The least seconds of a prefill on a machine, with images of `patches` patches each."""
    total = 0.0
    for part in _parts(config, num_tokens, plan, patches, machine.chunk_size or num_tokens):
        arithmetic = part.flops / machine.flops_per_s
        reads = part.numbers * machine.itemsize / machine.bytes_per_s
        total += max(arithmetic, reads)
    return total


def speedup_limit(config, num_tokens: int, plan: PrunePlan, machine: Machine, patches: Sequence[int] = ()) -> float:
    """The speedup over a full prefill that the machine allows: T(none) / T(plan)."""
    full = prefill_seconds(config, num_tokens, PrunePlan.none(), machine, patches)
    return full / prefill_seconds(config, num_tokens, plan, machine, patches)


def _parts(config, num_tokens: int, plan: PrunePlan, patches: Sequence[int], chunk_size: int) -> Iterator[Part]:
    for begin in range(0, num_tokens, chunk_size):
        chunk = torch.zeros(num_tokens, dtype=torch.bool)
        chunk[begin : begin + chunk_size] = True
        for group in plan.groups(config.num_layers):
            yield from _group_parts(config, plan, group, chunk)
    selection = cost.selection_flops(config, num_tokens, plan)
    if selection:
        yield Part(selection, config.hidden_size * config.num_heads * config.head_dim)
    head = config.hidden_size * config.vocab_size
    yield Part(2 * head, head)
    if patches:
        yield Part(vision_flops(config, patches), 0)


def _group_parts(config, plan: PrunePlan, group: Group, chunk: torch.Tensor) -> Iterator[Part]:
    """What a group of layers does for the tokens in `chunk` [N] bool."""
    at_full_depth = cost.runs_group(plan, len(chunk), group)
    full_depth = at_full_depth & chunk
    projected = ~at_full_depth & chunk
    for index in group.layers:
        if full_depth.any():
            yield Part(cost.layer_flops(config, index, full_depth), _layer_reads(config, index, full_depth))
        if projected.any():
            weights = cost.projected_weights(config, cost.rank_of(plan))
            yield Part(2 * int(projected.sum()) * weights, weights)
    if full_depth.sum() < chunk.sum():
        weights = cost.code_weights(config, group, cost.rank_of(plan))
        yield Part(2 * int(chunk.sum()) * weights, weights)


def _layer_reads(config, index: int, full_depth: torch.Tensor) -> int:
    """The numbers that one layer reads for the tokens in `full_depth` [N] bool."""
    positions = full_depth.nonzero()[:, 0]
    since_the_last = positions.diff(prepend=positions.new_tensor([-1]))
    keys = since_the_last.clamp(max=config.windows[index] or len(full_depth)).sum()  # each is read once
    weights = cost.layer_weights(config, len(positions))
    return weights + 2 * int(keys) * config.num_kv_heads * config.head_dim
