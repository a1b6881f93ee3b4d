"""Which tokens of a batch a plan selects to run at full depth (pop/pruning/selection.py).

The number of selected tokens follows from lengths, so the CPU knows it. Only the device knows which tokens they are,
and nothing waits for it. Shape letters: pop/models/layers.py; T is the number of the longest prompt's tokens.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pop.pruning.plan import SELECTING, PrunePlan
from pop.pruning.selection import attention_received, most_attended
from pop.system.memory import to_device


def received(layer, h, rope, lengths: Tensor) -> Tensor:
    """The attention [B, T] that the tokens of prompts h [B, T, D] of `lengths` [B] get from their last ones."""
    k = layer.keys_values(h, rope)[0]  # [B, T, K, E]
    key = torch.arange(h.shape[1], device=h.device)  # [T], of each row
    q, query = last_queries(layer, h, rope, lengths)
    return attention_received(q, k, query, key, layer.scale)


def received_by_all(earlier_k: Tensor, is_attended: Tensor, layer, h, rope, lengths: Tensor) -> Tensor:
    """The same for earlier tokens with keys earlier_k [B, N, K, E], some attended [B, N], and prompts: [B, N + T]."""
    T = h.shape[1]
    N = earlier_k.shape[1]
    k = torch.cat((earlier_k, layer.keys_values(h, rope)[0]), dim=1)  # [B, N + T, K, E]
    key = torch.arange(N + T, device=h.device).where(F.pad(is_attended, (0, T), value=True), -1)  # [B, N + T]
    q, query = last_queries(layer, h, rope, lengths)
    query = torch.where(query < 0, query, query + N)
    return attention_received(q, k, query, key, layer.scale)


def last_queries(layer, h, rope, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The queries [B, Q, H, E] of prompts' last tokens, and their places [B, Q], negative where a prompt has fewer."""
    rows = torch.arange(len(h), device=h.device)[:, None]
    query = lengths[:, None] + torch.arange(-SELECTING, 0, device=h.device)
    place = query.clamp(min=0)
    q, _, _ = layer.queries_keys_values(h[rows, place], tuple(table[rows, place] for table in rope))
    return q, query


def select(module, plan: PrunePlan, h, rotary, lengths, others, counts, received: Callable = received) -> Tensor:
    """Select `counts` [B] of the tokens `others` [B, T] bool of prompts: [B, T] bool, on the device of h.

    h [B, T, D] enters the selecting layer. `rotary` are the rotary positions [B, T], or [3, B, T] by axis. These and
    the prompts' `lengths` [B] are on the CPU. If `received` also knows N earlier tokens, `others` and the result have
    them too: [B, N + T].
    """
    rotary, lengths, others, counts = to_device([rotary, lengths, others, counts], h.device)
    layer = module.layers[plan.selects_at]
    scores = received(layer, h, module.rope(rotary)[layer.window], lengths)
    return most_attended(module.largest_of_processes(scores), others, counts)
