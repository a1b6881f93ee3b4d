"""Which tokens of a batch a plan selects (pop/pruning/selection.py).

The number of selected tokens follows from lengths, so the CPU knows it. Only the device knows which tokens they are,
and nothing waits for it. Shape letters: pop/models/layers.py; T is the number of the longest prompt's tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pop.engine.attention import by_row
from pop.pruning.plan import SELECTING, PrunePlan
from pop.pruning.selection import attention_received, most_attended
from pop.system.memory import to_device


def received(layer, h, rope, lengths: Tensor, *earlier: Tensor) -> Tensor:
    """The attention [B, T] that the tokens of prompts h [B, T, D] of `lengths` [B] get from their last ones.

    earlier: The keys [B, N, K, E] of tokens before the prompts, and which are attended, [B, N]. Then it is [B, N + T].
    """
    k = layer.keys_values(h, rope)[0]  # [B, T, K, E]
    key = torch.arange(h.shape[1], device=h.device)  # [T], of each row
    if earlier:
        earlier_k, is_attended = earlier
        k = torch.cat((earlier_k, k), dim=1)
        # Each query is at position 0 or later, so 0 stands for every earlier token. -1: the token does not count.
        key = torch.cat((is_attended.long() - 1, key.expand(len(h), -1)), dim=1)
    query = lengths[:, None] + torch.arange(-SELECTING, 0, device=h.device)  # [B, Q], negative in a shorter prompt
    places = by_row(query.clamp(min=0))
    q, _, _ = layer.queries_keys_values(h[places], tuple(table[places] for table in rope))
    return attention_received(q, k, query, key, layer.scale)


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
