"""Which tokens a plan selects to run at full depth: those that the prompt's last tokens attend to most.

This is `attention_scores` of pop/pruning/reference.py for a batch. The number of selected tokens follows from lengths,
so the CPU knows it. Only the device knows which tokens they are, and nothing waits for it. Shape letters:
pop/models/layers.py; Q is the number of queries, and T that of the longest prompt's tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pop.models.layers import Rope
from pop.pruning.plan import POOLED, SELECTING, PrunePlan
from pop.system.memory import to_device


def select(module, plan: PrunePlan, h, rotary, lengths, others, counts) -> Tensor:
    """Select `counts` [B] of the tokens `others` [B, T] bool of prompts: [B, T] bool, on the device of h.

    h [B, T, D] enters the selecting layer. `rotary` are the rotary positions [B, T], or [3, B, T] by axis. These and
    the prompts' `lengths` [B] are on the CPU.
    """
    rotary, lengths, others, counts = to_device([rotary, lengths, others, counts], h.device)
    layer = module.layers[plan.selects_at]
    rope = module.rope(rotary)[layer.window]
    received = module.largest_of_processes(attention_received(layer, h, rope, lengths))
    scores = F.avg_pool1d(F.pad(received[:, None], (POOLED - 1, 0)), POOLED, stride=1)[:, 0]  # [B, T]
    ranked = scores.masked_fill(~others, -1).argsort(dim=1, descending=True, stable=True)
    is_chosen = torch.arange(h.shape[1], device=h.device) < counts[:, None]  # [B, T], by rank
    return torch.zeros_like(others).scatter(1, ranked, is_chosen)


def attention_received(layer, h: Tensor, rope: Rope, lengths: Tensor) -> Tensor:
    """The most attention [B, T] that tokens of h [B, T, D] get from one of the last Q of `lengths` [B], in any head."""
    rows = torch.arange(len(h), device=h.device)[:, None]
    query = lengths[:, None] + torch.arange(-min(SELECTING, h.shape[1]), 0, device=h.device)  # [B, Q]
    at = query.clamp(min=0)  # a short prompt has fewer queries
    q = layer.queries_keys_values(h[rows, at], tuple(table[rows, at] for table in rope))[0]  # [B, Q, H, E]
    k = layer.keys_values(h, rope)[0]  # [B, T, K, E]
    q = q.unflatten(2, (k.shape[2], -1))  # [B, Q, K, G, E]
    products = layer.scale * torch.einsum("bqkge,btke->bkgqt", q.float(), k.float())
    attended = (torch.arange(h.shape[1], device=h.device) <= query[..., None])[:, None, None]  # [B, 1, 1, Q, T]
    weights = products.masked_fill(~attended, torch.finfo(products.dtype).min).softmax(-1)
    return weights.where(attended, 0).amax((1, 2, 3))
