"""Selects the tokens that run at full depth because the prompt's last tokens attend to them (pop/pruning/selection.py).

All tokens of a prompt compete if they are in one step. Of a prompt in chunks, the tokens of earlier chunks compete only
if their states at the selecting layer were kept (step.py). Those that are selected run again, in the step of the last
chunk. Shape letters: pop/models/layers.py; T is the number of a prompt's tokens that compete.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group

from pop.pruning.selection import SELECTING, attention_received, most_attended
from pop_vllm.layers import queries_keys
from pop_vllm.step import Step


def select(step: Step, layer, h: Tensor) -> None:
    """Let the selected tokens of each prompt that ends in this step run at full depth from here on.

    h [N, D] enters `layer`, the selecting one.
    """
    batch = step.batch
    step.selecting = h
    ends_here = (batch.computed < batch.prompt) & (batch.prompt <= batch.ends)
    selected = []
    again = []
    next_index = len(h)
    for number in np.flatnonzero(ends_here).tolist():
        tokens = Competing.of(step, number, h)
        count = step.plan.num_selected(int(tokens.others.sum()))
        if count == 0:
            continue
        earlier = next_index + np.arange(tokens.num_earlier)
        own = batch.first[number] + np.arange(len(tokens.position) - tokens.num_earlier)
        index = step.to_device(np.concatenate((earlier, own)))  # [T]
        position = step.to_device(tokens.position)  # [T]
        chosen = most_attended_of(tokens, layer, position, count)  # [count]
        selected.append((index[chosen], number, position[chosen]))
        if tokens.num_earlier:
            again.append((number, int(tokens.position[0])))
            step.earlier += step.kept[number].entering
            next_index += tokens.num_earlier
    if selected:
        step.rows = step.rows_at(again)
    for chosen_tokens in selected:
        step.rows = step.rows.after(*chosen_tokens)


class Competing(NamedTuple):
    """The tokens of a prompt of which some are selected."""

    states: Tensor  # [T, D], enter the selecting layer
    position: np.ndarray  # [T], consecutive
    others: np.ndarray  # [T] bool: those that are not at full depth by their position
    num_earlier: int  # how many of them, the first ones, are of earlier steps

    @classmethod
    def of(cls, step: Step, number: int, h: Tensor) -> "Competing":
        """Those of the request with this number, which ends its prompt in the step. h [N, D]: see `select`."""
        computed = int(step.batch.computed[number])
        prompt = int(step.batch.prompt[number])
        first = int(step.batch.first[number])
        kept = step.kept[number]
        earlier = [] if kept is None else kept.selecting
        num_earlier = sum(len(states) for states in earlier)
        position = np.arange(computed - num_earlier, prompt)
        states = torch.cat((*earlier, h[first : first + prompt - computed]))
        return cls(states, position, ~step.plan.at_full_depth(position, prompt), num_earlier)


def most_attended_of(tokens: Competing, layer, position: Tensor, count: int) -> Tensor:
    """The indices [count] of the tokens that the prompt's last ones attend to most. `position` [T] is on the device."""
    q, k = queries_keys(layer, tokens.states, position)  # [T, H, E] and [T, K, E]
    received = attention_received(q[-SELECTING:], k, position[-SELECTING:], position, layer.self_attn.scaling)  # [T]
    if get_tensor_model_parallel_world_size() > 1:  # each rank has some of the heads
        group = get_tp_group().device_group
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX, group)
    others = torch.from_numpy(tokens.others).to(k.device)
    is_chosen = most_attended(received[None], others[None], torch.tensor([count], device=k.device))[0]  # [T]
    return (~is_chosen).to(torch.uint8).argsort(stable=True)[:count]  # nonzero would wait for the device
