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
(taps = 1), or from two inputs with the refit projections of two taps. P is N - W. With a window, P is the window - 1
tokens before the prompt's last full-depth tokens, since no later token attends the rest.

    F(plan) = 2 · [ sum over kept layers    (N·(qo + kv + mlp) + attention of all N)
                  + sum over pruned layers  (P·taps·kv + W·(qo + kv + mlp) + attention of the W)
                  + D·V ]

Images come first, and no plan makes them cheaper. A vision tower of width C with L' layers turns the P patches of each
image, or of each frame pair of a video, into M tokens. All patches attend all patches:

    blocks                                  L' · (P · (4·C² + 2·C·I') + 2 · P²·C)
    patches to vectors                      P · C · values of a patch
    vectors to tokens                       M tokens through a matrix or a small network

F(none) / F(plan) is the speedup of a prefill whose time is all arithmetic, at one rate.
"""

from collections import Counter
from collections.abc import Sequence

from pop.models.config import Qwen3VisionConfig
from pop.pruning.plan import PrunePlan


def prefill_flops(config, num_tokens: int, plan: PrunePlan, patches: Sequence[int] = ()) -> int:
    """FLOPs of prefilling one prompt of num_tokens tokens, up to its boundary token's logits.

    `patches` has the number of patches of each image, or frame pair of a video, in the prompt.
    """
    everyone = range(num_tokens)
    full_depth = [p for p in everyone if p < plan.full_depth_first or p >= num_tokens - plan.full_depth_last]
    taps = 1 if plan.projections is None else plan.projections.taps
    skipping = num_tokens - len(full_depth)
    experts = getattr(config, "experts", None)
    sparse = () if experts is None else experts.layers
    layers = Counter((n in plan.layers, window, n in sparse) for n, window in enumerate(config.windows))
    flops = 2 * config.hidden_size * config.vocab_size + vision_flops(config, patches)
    for (pruned, window, is_sparse), count in layers.items():
        needed = skipping if window is None else min(skipping, window - 1)
        tokens = (full_depth, taps * needed) if pruned else (everyone, 0)
        flops += count * _layer_flops(config, window, is_sparse, *tokens)
    return flops


def speedup_limit(config, num_tokens: int, plan: PrunePlan, patches: Sequence[int] = ()) -> float:
    """The speedup over a full prefill that the shapes allow. Arguments as in `prefill_flops`."""
    full = prefill_flops(config, num_tokens, PrunePlan.none(), patches)
    return full / prefill_flops(config, num_tokens, plan, patches)


def vision_flops(config, patches: Sequence[int]) -> int:
    """FLOPs of the vision tower and the projector after it. `patches`: of each image, or frame pair of a video."""
    if not patches:
        return 0
    vision, P = config.vision, sum(patches)
    C, inner = vision.hidden_size, vision.intermediate_size
    blocks = vision.num_layers * (P * (4 * C**2 + 2 * C * inner) + sum(2 * C * count**2 for count in patches))
    if isinstance(
        vision, Qwen3VisionConfig
    ):  # squares of patches through two matrices, and again for each DeepStack layer
        square, values = vision.merge_size**2, vision.patch_values
        merging = (1 + len(vision.deepstack)) * P // square * square * C * (square * C + vision.out_size)
    else:
        values = 3 * vision.patch_size**2
        merging = len(patches) * vision.tokens_per_image * C * config.hidden_size
    return 2 * (P * values * C + blocks + merging)


def _layer_flops(config, window: int | None, is_sparse: bool, positions, projected: int) -> int:
    """FLOPs of one layer: the tokens at `positions` run all of it, and K and V are projected `projected` more times.

    is_sparse: the layer has a mixture of experts in place of the MLP.
    """
    D, E = config.hidden_size, config.head_dim
    H, K = config.num_heads, config.num_kv_heads
    inner = config.experts.per_token * config.experts.width if is_sparse else config.intermediate_size
    projections = len(positions) * 2 * D * H * E + (len(positions) + projected) * 2 * D * K * E
    mlp = len(positions) * (3 * D * inner + (D * config.experts.count if is_sparse else 0))
    attention = sum(p + 1 if window is None else min(p + 1, window) for p in positions) * 2 * H * E
    return 2 * (projections + mlp + attention)
