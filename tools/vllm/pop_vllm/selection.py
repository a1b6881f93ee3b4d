"""Selects the tokens that run at full depth because the prompt's last tokens attend to them (pop/pruning/selection.py).

All tokens of a prompt compete if they are in one step. Of a prompt in chunks, the tokens of earlier chunks compete only
if their states at the selecting layer were kept (step.py). Those that are selected run again, in the step of the last
chunk. Shape letters: pop/models/layers.py; T is the number of a prompt's tokens that compete.
"""

import numpy as np
import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group

from pop.pruning.plan import SELECTING
from pop.pruning.selection import attention_received, most_attended
from pop_vllm.layers import queries_keys
from pop_vllm.step import Step


def select(step: Step, layer, h: Tensor) -> None:
    """Let the selected tokens of each prompt that ends in this step run at full depth from here on.

    h [N, D] enters `layer`, the selecting one.
    """
    batch = step.batch
    step.selecting = h
    selected = []
    again = []
    for number in np.flatnonzero((batch.computed < batch.prompt) & (batch.prompt <= batch.ends)):
        kept = step.kept[number]
        earlier = kept.selecting if kept else []
        begin = batch.computed[number] - sum(len(states) for states in earlier)
        position = np.arange(begin, batch.prompt[number])  # [T]
        others = ~step.plan.at_full_depth(position, batch.prompt[number])
        count = step.plan.num_selected(int(others.sum()))
        if not count:
            continue
        num_again = batch.computed[number] - begin
        num_own = len(position) - num_again
        first = batch.first[number]
        offset = len(h) + sum(len(states) for states in step.earlier)
        index = np.concatenate((np.arange(offset, offset + num_again), np.arange(first, first + num_own)))  # [T]
        position, others, index = (step.to_device(array) for array in (position, others, index))
        chosen = chosen_of(layer, torch.cat((*earlier, h[first : first + num_own])), position, others, count)
        selected.append((index[chosen], int(number), position[chosen]))
        if earlier:
            again.append((int(number), begin))
            step.earlier += kept.entering
    if selected:
        step.rows = step.rows_at(again)
    for tokens in selected:
        step.rows = step.rows.after(*tokens)


def chosen_of(layer, h: Tensor, position: Tensor, others: Tensor, count: int) -> Tensor:
    """The indices [count] of the selected ones among tokens with states h [T, D].

    Args:
        layer: The selecting layer.
        h: [T, D], enters the layer.
        position: [T], of the tokens in their sequence.
        others: [T] bool, the tokens to select from.
        count: How many of them.
    """
    q, k = queries_keys(layer, h, position)  # [T, H, E] and [T, K, E]
    query = torch.arange(len(h), device=h.device)[-SELECTING:]
    received = attention_received(q[None, -SELECTING:], k[None], query[None], layer.self_attn.scaling)  # [1, T]
    if get_tensor_model_parallel_world_size() > 1:  # each rank has some of the heads
        group = get_tp_group().device_group
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX, group)
    is_chosen = most_attended(received, others[None], torch.tensor([count], device=h.device))[0]  # [T]
    return (~is_chosen).to(torch.uint8).argsort(stable=True)[:count]  # nonzero would wait for the device
