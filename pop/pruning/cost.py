"""The cost of a prefill, counted from shapes, and the largest speedup that pruning can reach.

A product of matrices [n, i] and [i, o] is n·i·o multiply-adds, and a multiply-add is two floating point operations
(FLOPs). Norms, rotations, activations and softmax are left out: they grow with D, not with D². Shape letters are those
of pop/models/layers.py. I is the width inside the MLP, and N tokens fill an empty cache.

    one token through a whole layer         q and o     2 · D·H·E
    (multiply-adds)                         k and v     2 · D·K·E
                                            MLP         3 · D·I         gate, up, down
                                            or experts  D·X + 3 · D·k·I (a token takes k of X experts)
    a token at position p attends           QK' and PV  2 · H·E · (p + 1), or 2 · H·E · window if that is less
    the output head, on one row             D·V

In a kept layer all N tokens do all of this. They attend N(N+1)/2 positions, the lower triangle. With a window they
attend a band of it. Products that an implementation computes outside of these are not counted.

In a pruned layer only the W full-depth tokens do all of this. P of the other tokens do k and v: once from one input
(taps = 1), or from two inputs with the refit projections of two taps. With corrections of rank R, these k and v are
2 · K·E·(D + R), and in each group of pruned layers, all N tokens need taps·D·R more. An update of h after a group is
taps·D·D, or R·D, for all N tokens. P is N - W. With a window, P is the window - 1 tokens before the prompt's last
full-depth tokens, since no later token attends the rest.

Tokens that the plan selects are counted as if they were evenly spread. From the selecting layer on, they are among the
W tokens, and P is N - W, even with a window. To select them, the last Q tokens attend all tokens at that layer, by its
own q and k. If it is pruned and has refit projections, these k are not among those of the P tokens.

    F(plan) = 2 · [ sum over kept layers    (N·(qo + kv + mlp) + attention of all N)
                  + sum over pruned layers  (P·taps·kv + W·(qo + kv + mlp) + attention of the W)
                  + sum over their groups   (N·(codes + update))
                  + selection               (Q·D·H·E + Q·N·H·E, and N·D·K·E)
                  + D·V ]

Images come first, and no plan makes them cheaper. A vision tower of width C with L' layers turns the P patches of each
image, or of each frame pair of a video, into M tokens. All patches attend all patches:

    blocks                                  L' · (P · (4·C² + 2·C·I') + 2 · P²·C)
    patches to vectors                      P · C · values of a patch
    vectors to tokens                       M tokens through a matrix or a small network

F(none) / F(plan) is the speedup of a prefill whose time is all arithmetic, at one rate.

On a GPU, a part of the work with few tokens takes as long as its memory reads. For each chunk of the prompt, a part
reads its matrices and the K and V that its tokens attend. Activations and writes are left out.

    a kept layer, or the full-depth         qo + kv + mlp. T tokens read min(X, k·T) experts, on the assumption that no
    tokens of a pruned layer                two of them choose the same expert while others are left
    k and v of a pruned layer               taps · kv, or D·K·E + R·K·E twice
    codes and update of a group             taps·D·R and D·R, or taps·D·D
    the output head, the vision tower       their matrices

    T(plan) = sum over parts of max(FLOPs / FLOPs per second, bytes / bytes per second)

This is the roofline model (Williams et al. 2009). In short prompts T(none) / T(plan) is the smaller ratio, because the
matrices of a pruned layer are read for W tokens.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from pop.models.config import Qwen3VisionConfig
from pop.pruning.plan import SELECTING, PrunePlan


class Machine(NamedTuple):
    """The rates of a machine, and how a prefill runs on it."""

    flops_per_s: float  # of a large matrix product
    bytes_per_s: float  # of memory reads
    itemsize: int = 2  # bytes of a weight, and of a number in the cache
    chunk_size: int | None = None  # tokens that run at once; None: the whole prompt


def prefill_flops(config, num_tokens: int, plan: PrunePlan, patches: Sequence[int] = ()) -> int:
    """FLOPs of prefilling one prompt of num_tokens tokens, up to its boundary token's logits.

    `patches` has the number of patches of each image, or frame pair of a video, in the prompt.
    """
    return sum(flops for flops, _ in _parts(config, num_tokens, plan, patches))


def prefill_seconds(config, num_tokens: int, plan: PrunePlan, machine: Machine, patches: Sequence[int] = ()) -> float:
    """The least seconds of a prefill on a machine. Other arguments as in `prefill_flops`."""
    parts, bytes_per_s = _parts(config, num_tokens, plan, patches, machine.chunk_size), machine.bytes_per_s
    return sum(max(flops / machine.flops_per_s, machine.itemsize * n / bytes_per_s) for flops, n in parts)


def speedup_limit(
    config, num_tokens: int, plan: PrunePlan, patches: Sequence[int] = (), machine: Machine | None = None
) -> float:
    """The speedup over a full prefill that the shapes allow: T(none) / T(plan), or F(none) / F(plan) without a machine.

    Other arguments as in `prefill_flops`.
    """
    cost = prefill_flops if machine is None else partial(prefill_seconds, machine=machine)
    return cost(config, num_tokens, PrunePlan.none(), patches=patches) / cost(config, num_tokens, plan, patches=patches)


def _parts(
    config, num_tokens: int, plan: PrunePlan, patches: Sequence[int], chunk_size: int | None = None
) -> Iterator[tuple[int, int]]:
    """The parts of a prefill, each with its FLOPs and the numbers that it reads: weights, K and V."""
    experts = getattr(config, "experts", None)
    sparse = () if experts is None else experts.layers
    late = [n for n in plan.layers if n > (plan.selects_at or 0)]  # they run selected tokens too
    layers = Counter(((n in plan.layers) + (n in late), window, n in sparse) for n, window in enumerate(config.windows))
    D, KV, refit = config.hidden_size, 2 * config.num_kv_heads * config.head_dim, plan.corrections
    rank = 0 if refit is None else refit.rank
    by_group = []  # of each group of pruned layers: the first one, and the weights of its codes and its update
    for group in plan.groups(config.num_layers):
        if group.corrections is not None:
            update = 0 if group.corrections.update is None else D * rank
            by_group.append((group.layers[0], 2 * D * rank + update))
    refit = KV * (D + rank)  # weights of a pruned layer
    last = num_tokens - plan.full_depth_last  # the first of the prompt's last full-depth tokens
    others = range(num_tokens)[plan.full_depth_first : max(last, 0)]
    count = plan.num_selected(len(others))
    selected = {others[(2 * number + 1) * len(others) // (2 * count)] for number in range(count)}
    for begin in range(0, num_tokens, chunk_size or num_tokens):
        tokens = range(num_tokens)[begin:][:chunk_size]
        by_position = [p for p in tokens if p < plan.full_depth_first or p >= last]
        runs = tokens, by_position, sorted({*by_position, *selected.intersection(tokens)})
        for first, weights in by_group:
            if len(runs[1 + (first in late)]) < len(tokens):
                yield 2 * len(tokens) * weights, weights
        for (kind, window, is_sparse), count in layers.items():
            flops, numbers = _layer(config, window, is_sparse, runs[kind])
            yield count * flops, count * numbers
            if kind:
                # With a window, only what the last full-depth tokens attend.
                begins = begin if window is None or (selected and kind == 2) else last - window + 1
                projected = sum(p >= begins for p in tokens) - sum(p >= begins for p in runs[kind])
                yield count * 2 * projected * refit, count * refit * bool(projected)
    if selected:
        queries = config.num_heads * config.head_dim
        Q = min(SELECTING, num_tokens)
        yield 2 * (Q * queries * (D + num_tokens)), D * queries
    head = config.hidden_size * config.vocab_size
    yield 2 * head, head
    yield _vision(config, patches)


def _layer(config, window: int | None, is_sparse: bool, positions: Sequence[int]) -> tuple[int, int]:
    """FLOPs and reads of one layer for the tokens at `positions`, in order.

    is_sparse: the layer has a mixture of experts in place of the MLP.
    """
    if not positions:
        return 0, 0
    D, E, H, K = config.hidden_size, config.head_dim, config.num_heads, config.num_kv_heads
    T, X, k, inner = len(positions), 1, 1, config.intermediate_size  # a dense MLP is the only expert
    if is_sparse:
        X, k, inner = config.experts.count, config.experts.per_token, config.experts.width
    expert, shared = 3 * D * inner, 2 * D * H * E + 2 * D * K * E + is_sparse * D * X
    attended = sum(min(p + 1, window or p + 1) for p in positions)
    keys = sum(min(p - before, window or p + 1) for before, p in pairwise((-1, *positions)))  # each once
    return 2 * (T * (shared + k * expert) + attended * 2 * H * E), shared + min(X, k * T) * expert + keys * 2 * K * E


def _vision(config, patches: Sequence[int]) -> tuple[int, int]:
    """FLOPs and reads of the vision tower and the projector after it."""
    if not patches:
        return 0, 0
    vision, P = config.vision, sum(patches)
    C, inner = vision.hidden_size, vision.intermediate_size
    if isinstance(vision, Qwen3VisionConfig):
        # Squares of patches go through two matrices, and again for each DeepStack layer.
        square, values = vision.merge_size**2, vision.patch_values
        M, merging = P // square, (1 + len(vision.deepstack)) * square * C * (square * C + vision.out_size)
    else:
        values = 3 * vision.patch_size**2
        M, merging = len(patches) * vision.tokens_per_image, C * config.hidden_size
    encoding = values * C + vision.num_layers * (4 * C**2 + 2 * C * inner)  # weights that each patch uses
    attention = vision.num_layers * sum(2 * C * count**2 for count in patches)
    return 2 * (P * encoding + attention + M * merging), encoding + merging
