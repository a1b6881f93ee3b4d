"""Mixtures of experts without a loop over the experts: for GPUs, and as one operator for the compiler.

The number of tokens of an expert is data. A loop waits for these numbers. Grouped products read them on the device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pop.backends.cpu import linear
from pop.models import experts

FEW = 64  # pairs of a token and an expert; for more, copies of the experts' weights take too much memory


class Experts(experts.Experts):
    """Experts with the fastest products, which can be compiled."""

    def forward(self, x, chosen, shares):
        if not torch.compiler.is_compiling():
            run = fastest
        else:
            run = few_tokens if len(x) == 1 else by_expert
        return run(x, chosen, shares, self.gate_up_proj, self.down_proj)


def fastest(x, chosen, shares, gate_up, down):
    """Like pop.models.experts.by_expert. On GPUs, it does not wait for the device where that can be avoided."""
    if x.device.type == "cpu":
        return experts.by_expert(x, chosen, shares, gate_up, down, linear)
    if can_group(x, gate_up, down):
        return grouped(x, chosen, shares, gate_up, down)
    if chosen.numel() <= FEW:
        return few_tokens(x, chosen, shares, gate_up, down)
    return experts.by_expert(x, chosen, shares, gate_up, down)


@torch.library.custom_op("pop::by_expert", mutates_args=())
def by_expert(x: Tensor, chosen: Tensor, shares: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`fastest` as one operator."""
    return fastest(x, chosen, shares, gate_up, down)


by_expert.register_fake(lambda x, chosen, shares, gate_up, down: torch.empty_like(x))


def few_tokens(x: Tensor, chosen: Tensor, shares: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`by_expert` as multiply-and-sum. Compiled, it reads the weights of the chosen experts once, in place."""
    gate, up = (gate_up[chosen] * x[:, None, None]).sum(-1, dtype=torch.float32).to(x.dtype).chunk(2, dim=-1)
    inner = F.silu(gate) * up  # [N, k, I]
    out = (down[chosen] * inner[:, :, None]).sum(-1, dtype=torch.float32)  # [N, k, D]
    return (out * shares[..., None]).sum(1).to(x.dtype)  # [N, D]


def can_group(x: Tensor, *weights: Tensor) -> bool:
    """Whether torch has a grouped product for these tensors that does not wait for the device (torch 2.10 to 2.13)."""
    aligned = all(weight.shape[-1] * weight.element_size() % 16 == 0 for weight in weights)
    if not (x.is_cuda and x.dtype == torch.bfloat16 and aligned and hasattr(F, "grouped_mm")):
        return False
    return torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def grouped(x: Tensor, chosen: Tensor, shares: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`by_expert` as two grouped products, over tokens sorted by expert."""
    k = chosen.shape[1]
    # [N * k] pairs of a token and an expert, sorted by expert. A GPU's radix sort is faster for small integers.
    chosen, order = chosen.flatten().to(torch.int16).sort()
    numbers = torch.arange(len(down), dtype=chosen.dtype, device=x.device)
    ends = torch.searchsorted(chosen, numbers, right=True, out_int32=True)  # [X], where each expert's pairs end
    gate, up = F.grouped_mm(x[order // k], gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)  # [N * k, I] each
    out = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)  # [N * k, D]
    out = torch.empty_like(out).index_copy(0, order, out).unflatten(0, (-1, k))  # [N, k, D]
    return (out * shares[..., None]).sum(1)
