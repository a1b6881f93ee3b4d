"""Mixtures of experts (Shazeer et al. 2017): a layer has many MLPs, and a router sends each token through a few.

    scores = softmax(gate(x))                 # over all experts, in float32
    shares, chosen = scores.topk(k)           # the shares are normalised to a sum of one if the config says so
    update = sum of shares[i] * expert chosen[i] of x

An expert is a SwiGLU MLP as in a dense layer, but narrow. A token costs the work of k experts, although the layer holds
the weights of all. Attribute names are the checkpoint's names. Shape letters of this file, besides those of layers.py:

    N tokens    X experts    k experts of a token    I width inside an expert
"""

import torch
import torch.nn.functional as F
from torch import nn


class MixtureOfExperts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.per_token, self.normalised = config.experts.per_token, config.experts.normalised
        self.gate = nn.Linear(config.hidden_size, config.experts.count, bias=False)  # the router
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
    """The weights of all experts. gate_up_proj holds the rows of gate, then those of up."""

    def __init__(self, config):
        super().__init__()
        X, D, inner = config.experts.count, config.hidden_size, config.experts.width
        self.gate_up_proj = nn.Parameter(torch.empty(X, 2 * inner, D))
        self.down_proj = nn.Parameter(torch.empty(X, D, inner))

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """x [N, D], the chosen experts [N, k] int64 and their shares [N, k] -> [N, D]."""
        return by_expert(x, chosen, shares, self.gate_up_proj, self.down_proj)


def by_expert(
    x: torch.Tensor,
    chosen: torch.Tensor,
    shares: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    linear=F.linear,
) -> torch.Tensor:
    """Each expert on its tokens: x [N, D], chosen and shares [N, k], gate_up [X, 2 * I, D], down [X, D, I] -> [N, D]"""
    k = chosen.shape[1]
    chosen = chosen.flatten()  # [N * k] pairs of a token and an expert
    order = chosen.argsort(stable=True)  # by expert
    # On a GPU, tolist waits for it; bincount would do so twice more.
    counts = chosen.new_zeros(len(gate_up)).index_add(0, chosen, torch.ones_like(chosen)).tolist()
    outputs = []
    for expert, tokens in enumerate(x[order // k].split(counts)):
        if len(tokens):
            gate, up = linear(tokens[None], gate_up[expert]).chunk(2, dim=-1)  # [1, n, I] each
            outputs.append(linear(F.silu(gate) * up, down[expert])[0])  # [n, D]
    out = torch.cat(outputs)[order.argsort()].unflatten(0, (-1, k))  # [N, k, D]
    return (out * shares[..., None]).sum(1)
