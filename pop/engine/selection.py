"""Which tokens of a batch a plan selects to run at full depth (pop/pruning/selection.py).

The number of selected tokens follows from lengths, so the CPU knows it. Only the device knows which tokens they are,
and nothing waits for it. Shape letters: pop/models/layers.py; T is the number of the longest prompt's tokens.
"""

import torch
from torch import Tensor

from pop.pruning.plan import SELECTING, PrunePlan
from pop.pruning.selection import attention_received, most_attended
from pop.system.memory import to_device


def select(module, plan: PrunePlan, h, rotary, lengths, others, counts) -> Tensor:
    """Select `counts` [B] of the tokens `others` [B, T] bool of prompts: [B, T] bool, on the device of h.

    h [B, T, D] enters the selecting layer. `rotary` are the rotary positions [B, T], or [3, B, T] by axis. These and
    the prompts' `lengths` [B] are on the CPU.
    """
    rotary, lengths, others, counts = to_device([rotary, lengths, others, counts], h.device)
    layer = module.layers[plan.selects_at]
    rope = module.rope(rotary)[layer.window]
    rows = torch.arange(len(h), device=h.device)[:, None]
    query = lengths[:, None] + torch.arange(-min(SELECTING, h.shape[1]), 0, device=h.device)  # [B, Q]
    position = query.clamp(min=0)  # a short prompt has fewer queries
    q = layer.queries_keys_values(h[rows, position], tuple(table[rows, position] for table in rope))[0]  # [B, Q, H, E]
    k = layer.keys_values(h, rope)[0]  # [B, T, K, E]
    key = torch.arange(h.shape[1], device=h.device)  # [T], of each row
    received = module.largest_of_processes(attention_received(q, k, query, key, layer.scale))
    return most_attended(received, others, counts)
