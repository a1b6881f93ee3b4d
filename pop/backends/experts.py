"""Mixtures of experts without a loop over the experts: for GPUs, and as one operator for the compiler.

How many tokens an expert gets is known on the device only, and a loop over the experts waits for these numbers. Grouped
products read them on the device. A few tokens take copies of their experts' weights, which compiled code does not make.
Shapes: pop/models/experts.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pop.backends.cpu import linear
from pop.models import experts

FEW = 64  # pairs of a token and an expert; for more pairs, copies of the experts' weights take too much memory


class Experts(experts.Experts):
    """Experts with the fastest products, which can be compiled."""

    def forward(self, x, chosen, shares):
        run = fastest
        if torch.compiler.is_compiling():
            run = few_tokens if len(x) == 1 else fastest_operator  # one token is compiled separately anyway
        return run(x, chosen, shares, self.gate_up_proj, self.down_proj)


def fastest(x: Tensor, chosen: Tensor, shares: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Like pop.models.experts.by_expert. On GPUs, it does not wait for the device where that can be avoided."""
    if can_group(x, gate_up, down):
        return grouped(x, chosen, shares, gate_up, down)
    if chosen.numel() <= FEW and x.device.type != "cpu":
        return few_tokens(x, chosen, shares, gate_up, down)
    return experts.by_expert(x, chosen, shares, gate_up, down, linear)


# One operator for the compiler, which cannot follow a loop whose lengths are data.
fastest_operator = torch.library.custom_op("pop::fastest_experts", fastest, mutates_args=())
fastest_operator.register_fake(lambda x, *_: torch.empty_like(x))


def few_tokens(x: Tensor, chosen: Tensor, shares: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`by_expert` as multiply-and-sum. Compiled, it reads the weights of the chosen experts once, in place."""
    both = (gate_up[chosen] * x[:, None, None]).sum(-1, dtype=torch.float32)  # [N, k, 2 * I]
    inner = experts.gated(both.to(x.dtype))  # [N, k, I]
    out = (down[chosen] * inner[:, :, None]).sum(-1, dtype=torch.float32)  # [N, k, D]
    return (out * shares[..., None]).sum(1).to(x.dtype)  # [N, D]


def can_group(x: Tensor, *weights: Tensor) -> bool:
    """Whether torch has a grouped product for these tensors that does not wait for the device.

    On other capabilities it waits, by the source of torch 2.10 to 2.13.
    """
    if not (x.is_cuda and x.dtype == torch.bfloat16 and hasattr(F, "grouped_mm")):
        return False
    aligned = all(weight.shape[-1] * weight.itemsize % 16 == 0 for weight in weights)
    return aligned and torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def grouped(x: Tensor, chosen: Tensor, shares: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`by_expert` as two grouped products, over tokens sorted by expert."""
    k = chosen.shape[1]
    # [N * k] pairs of a token and an expert, sorted by expert. A GPU's radix sort is faster for small integers.
    chosen, order = chosen.flatten().to(torch.int16).sort()
    numbers = torch.arange(len(down), dtype=chosen.dtype, device=x.device)
    ends = torch.searchsorted(chosen, numbers, right=True, out_int32=True)  # [X], where each expert's pairs end
    both = F.grouped_mm(x[order // k], gate_up.transpose(1, 2), offs=ends)  # [N * k, 2 * I]
    out = F.grouped_mm(experts.gated(both), down.transpose(1, 2), offs=ends)  # [N * k, D]
    return experts.weighted(out, order, shares)
