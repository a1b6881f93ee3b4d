"""Which tokens a plan selects: those that the prompt's last tokens attend to most.

This is `attention_scores` of reference.py for a batch, in two steps. Processes that share a model's heads take the
maximum of their `attention_received` before they call `most_attended`. Code that runs pop's method on other people's
layers imports both as `pop.selection`. Shape letters: pop/models/layers.py; Q is the number of queries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pop.pruning.plan import POOLED, SELECTING

__all__ = ["SELECTING", "attention_received", "most_attended"]


def attention_received(q: Tensor, k: Tensor, query: Tensor, key: Tensor, scale: float) -> Tensor:
    """The most attention [..., T] that each token of a prompt gets from one of its queries, in any head.

    Args:
        q: The queries of some tokens, [..., Q, H, E].
        k: The keys of all tokens, [..., T, K, E].
        query, key: The positions of these tokens, [..., Q] and [..., T]. A negative number stands for padding.
        scale: Multiplies q k^T.
    """
    q = q.unflatten(-2, (k.shape[-2], -1))  # [..., Q, K, G, E]
    products = scale * torch.einsum("...qkge,...tke->...kgqt", q.float(), k.float())
    key = key[..., None, None, None, :]  # [..., 1, 1, 1, T]
    attended = (key >= 0) & (key <= query[..., None, None, :, None])  # [..., 1, 1, Q, T]
    masked = products.masked_fill(~attended, torch.finfo(products.dtype).min)
    # torch.compile generates other code for a sum of more than 4,096 numbers in float32, and compiles again for it. In
    # float64, one graph serves all lengths.
    weights = masked.softmax(-1, dtype=torch.float64)
    return weights.where(attended, 0).amax((-4, -3, -2)).float()


def most_attended(received: Tensor, others: Tensor, counts: Tensor) -> Tensor:
    """Select `counts` [B] of the tokens `others` [B, T] bool by the attention that they receive [B, T]: [B, T] bool.

    Padding before a prompt's tokens must have received none.
    """
    scores = F.avg_pool1d(F.pad(received, (POOLED - 1, 0)), POOLED, stride=1)  # [B, T]
    ranked = scores.masked_fill(~others, -1).argsort(dim=1, descending=True, stable=True)
    is_chosen = torch.arange(others.shape[1], device=others.device) < counts[:, None]  # [B, T], by rank
    return torch.zeros_like(others).scatter(1, ranked, is_chosen)
