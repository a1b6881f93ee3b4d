"""Which tokens a plan selects to run at full depth: those that the prompt's last tokens attend to most.

This is `attention_scores` of reference.py for a batch, in two steps. Processes that share a model's heads take the
maximum of their `attention_received` before they call `most_attended`. Shape letters: pop/models/layers.py; Q is the
number of queries, and T that of the longest prompt's tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pop.pruning.plan import POOLED


def attention_received(q: Tensor, k: Tensor, query: Tensor, scale: float) -> Tensor:
    """The most attention [B, T] that each token of a prompt gets from one of its queries, in any head.

    Args:
        q: The queries of some tokens, [B, Q, H, E].
        k: The keys of all tokens, [B, T, K, E].
        query: Which tokens the queries are of, [B, Q]. A negative number stands for a query that does not count.
        scale: Multiplies q k^T.
    """
    q = q.unflatten(2, (k.shape[2], -1))  # [B, Q, K, G, E]
    products = scale * torch.einsum("bqkge,btke->bkgqt", q.float(), k.float())
    attended = torch.arange(k.shape[1], device=k.device) <= query[..., None]  # [B, Q, T]
    attended = attended[:, None, None]  # [B, 1, 1, Q, T]
    weights = products.masked_fill(~attended, torch.finfo(products.dtype).min).softmax(-1)
    return weights.where(attended, 0).amax((1, 2, 3))


def most_attended(received: Tensor, others: Tensor, counts: Tensor) -> Tensor:
    """Select `counts` [B] of the tokens `others` [B, T] bool by the attention that they receive [B, T]: [B, T] bool."""
    scores = F.avg_pool1d(F.pad(received[:, None], (POOLED - 1, 0)), POOLED, stride=1)[:, 0]  # [B, T]
    ranked = scores.masked_fill(~others, -1).argsort(dim=1, descending=True, stable=True)
    is_chosen = torch.arange(others.shape[1], device=others.device) < counts[:, None]  # [B, T], by rank
    return torch.zeros_like(others).scatter(1, ranked, is_chosen)
