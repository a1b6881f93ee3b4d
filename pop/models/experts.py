"""Mixtures of experts (Shazeer et al. 2017): a layer has many MLPs, and a router sends each token through a few.

    scores = softmax(gate(x))                 # over all experts, in float32
    shares, chosen = scores.topk(k)           # then the shares are normalised to a sum of one
    update = sum over i of shares[i] * experts[chosen[i]](x)

An expert is a SwiGLU MLP as in a dense layer, but narrower. A token costs the work of k experts, although the layer
holds the weights of all experts. Attribute names are the checkpoint's names. Shape letters, besides those of layers.py:

    N tokens    X experts    k experts of a token    I width inside an expert
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MixtureOfExperts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.per_token = config.experts.per_token
        self.gate = nn.Linear(config.hidden_size, config.experts.count, bias=False)  # the router
        self.experts = Experts(config)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        shares, chosen = self.gate(x).float().softmax(-1).topk(self.per_token)  # [B, T, k] each
        shares = (shares / shares.sum(-1, keepdim=True)).to(x.dtype)
        out = self.experts(x.flatten(0, 1), chosen.flatten(0, 1), shares.flatten(0, 1))  # [N, D]
        return out.view_as(x)


class Experts(nn.Module):
    """The weights of all experts. gate_up_proj holds the rows of gate, then those of up."""

    def __init__(self, config):
        super().__init__()
        X = config.experts.count
        D = config.hidden_size
        inner = config.experts.width
        self.gate_up_proj = nn.Parameter(torch.empty(X, 2 * inner, D))
        self.down_proj = nn.Parameter(torch.empty(X, D, inner))

    def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """x [N, D], the chosen experts [N, k] int64 and their shares [N, k] -> [N, D]."""
        return by_expert(x, chosen, shares, self.gate_up_proj, self.down_proj)


def by_expert(
    x: Tensor,
    chosen: Tensor,
    shares: Tensor,
    gate_up: Tensor,
    down: Tensor,
    linear=F.linear,
) -> Tensor:
    """Run each expert on its tokens: sort the pairs of a token and an expert by expert, and undo the order at the end.

    Args:
        x: [N, D].
        chosen: [N, k] int64, the experts of each token.
        shares: [N, k], their weights in the sum.
        gate_up: [X, 2 * I, D]. Experts that no token has chosen are not read.
        down: [X, D, I].
        linear: the product of tokens [1, n, D] with a matrix.

    Returns:
        [N, D].
    """
    k = chosen.shape[1]
    chosen = chosen.flatten()  # [N * k]
    order = chosen.argsort(stable=True)  # by expert
    counts = chosen.new_zeros(len(gate_up)).index_add(0, chosen, torch.ones_like(chosen))  # [X]
    # On a GPU, tolist waits for the device once. torch.bincount would wait twice more.
    tokens_by_expert = x[order // k].split(counts.tolist())
    outputs = []
    for expert, tokens in enumerate(tokens_by_expert):
        if len(tokens):
            inner = gated(linear(tokens[None], gate_up[expert]))  # [1, n, I]
            outputs.append(linear(inner, down[expert])[0])  # [n, D]
    return weighted(torch.cat(outputs), order, shares)


def weighted(out: Tensor, order: Tensor, shares: Tensor) -> Tensor:
    """Results [N * k, D] of pairs in an `order` [N * k], and the shares [N, k] of the pairs -> [N, D]."""
    out = torch.empty_like(out).index_copy(0, order, out)  # [N * k, D], in the order of the tokens
    out = out.unflatten(0, shares.shape)  # [N, k, D]
    return (out * shares[..., None]).sum(1)


def gated(both: Tensor) -> Tensor:
    """Numbers of gate, then those of up, together [..., 2 * I] -> silu(gate) * up [..., I]."""
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up
