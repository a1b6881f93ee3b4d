"""Mixtures of experts as one operator for the compiler, since the number of tokens of an expert is data."""

import torch
import torch.nn.functional as F

from pop.backends.cpu import linear
from pop.models import experts


class Experts(experts.Experts):
    """Experts that can be compiled."""

    def forward(self, x, chosen, shares):
        if not torch.compiler.is_compiling():
            return experts.by_expert(x, chosen, shares, self.gate_up_proj, self.down_proj, linear)
        run = one_token if len(x) == 1 else by_expert
        return run(x, chosen, shares, self.gate_up_proj, self.down_proj)


@torch.library.custom_op("pop::by_expert", mutates_args=())
def by_expert(
    x: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Like pop.models.experts.by_expert, with faster products."""
    return experts.by_expert(x, chosen, shares, gate_up, down, linear)


by_expert.register_fake(lambda x, chosen, shares, gate_up, down: torch.empty_like(x))


def one_token(
    x: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """`by_expert` for N = 1 as multiply-and-sum. Compiled, it reads the weights of the k experts once, in place."""
    chosen, shares = chosen[0], shares[0]
    gate, up = (gate_up[chosen] * x).sum(-1, dtype=torch.float32).to(x.dtype).chunk(2, dim=-1)  # [k, I] each
    inner = F.silu(gate) * up
    out = (down[chosen] * inner[:, None]).sum(-1, dtype=torch.float32)  # [k, D]
    return (out * shares[:, None]).sum(0, keepdim=True).to(x.dtype)  # [1, D]
