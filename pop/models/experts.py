"""Mixtures of experts (Shazeer et al. 2017): a layer has many MLPs, and a router sends each token through a few.

    scores = softmax(gate(x))                 # of all experts, in float32
    shares, chosen = scores.topk(k)           # the shares made to add up to one, where the config says so
    update = sum of shares[i] * expert chosen[i] of x

An expert is a SwiGLU MLP, as in a dense layer, but narrow. A token's work is that of k experts, while the weights are
those of all. So prefill sorts the tokens by expert, and decode reads no more than the experts that a token takes.

Attribute names are the checkpoint's names. Shape letters of this file, besides those of layers.py:

    N tokens    X experts    k experts of a token    I width inside of an expert
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pop.models.layers import Linear, linear


class MixtureOfExperts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.per_token, self.normalised = config.experts.per_token, config.experts.normalised
        self.gate = Linear(config.hidden_size, config.experts.count, bias=False)  # the router
        self.experts = Experts(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, D] -> [B, T, D]."""
        shares, chosen = self.gate(x).float().softmax(-1).topk(self.per_token)  # [B, T, k] each
        if self.normalised:
            shares = shares / shares.sum(-1, keepdim=True)
        shares = shares.to(x.dtype)
        tokens = (tensor.flatten(0, 1) for tensor in (x, chosen, shares))  # [N, D], [N, k], [N, k]
        return self.experts(*tokens).view_as(x)


class Experts(nn.Module):
    """The weights of all experts, gate and up behind each other."""

    def __init__(self, config):
        super().__init__()
        X, D, inner = config.experts.count, config.hidden_size, config.experts.width
        self.gate_up_proj = nn.Parameter(torch.empty(X, 2 * inner, D))
        self.down_proj = nn.Parameter(torch.empty(X, D, inner))

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """x [N, D], the experts chosen [N, k] int64 and their shares [N, k] -> [N, D]."""
        if not torch.compiler.is_compiling():
            run = by_expert
        else:
            run = one_token if len(x) == 1 else by_expert_compiled
        return run(x, chosen, shares, self.gate_up_proj, self.down_proj)


def by_expert(
    x: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Each expert on its tokens: x [N, D], gate_up [X, 2 * I, D], down [X, D, I] -> [N, D]."""
    k = chosen.shape[1]
    order = chosen.flatten().argsort(stable=True)  # [N * k], of pairs of a token and an expert, expert by expert
    counts = chosen.flatten().bincount(minlength=len(gate_up)).tolist()
    parts = []
    for expert, part in enumerate(x[order // k].split(counts)):
        if len(part):
            gate, up = linear(part[None], gate_up[expert]).chunk(2, dim=-1)  # [1, n, I] each
            parts.append(linear(F.silu(gate) * up, down[expert])[0])  # [n, D]
    out = torch.cat(parts)[order.argsort()].unflatten(0, (-1, k))  # [N, k, D]
    return (out * shares[..., None]).sum(1)


# How many tokens an expert has is data: to the compiler all this is one operation.
by_expert_compiled = torch.library.custom_op("pop::by_expert", by_expert, mutates_args=())
by_expert_compiled.register_fake(lambda x, chosen, shares, gate_up, down: torch.empty_like(x))


def one_token(x, chosen, shares, gate_up, down):
    """The same for N = 1, written out: compiled, it reads the k experts' weights once, in their place."""
    chosen, shares = chosen[0], shares[0]
    gate, up = (gate_up[chosen] * x).sum(-1, dtype=torch.float32).to(x.dtype).chunk(2, dim=-1)  # [k, I] each
    inner = F.silu(gate) * up
    out = (down[chosen] * inner[:, None]).sum(-1, dtype=torch.float32)  # [k, D]
    return (out * shares[:, None]).sum(0, keepdim=True).to(x.dtype)  # [1, D]
