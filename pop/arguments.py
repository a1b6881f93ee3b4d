"""What `pop.load` and `pop.Model` are told, checked: each raises a PopError, or gives back what is meant."""

from __future__ import annotations

import torch

from pop.errors import ContextOverflow, InputError, PlanError, check_count
from pop.pruning.plan import PrunePlan


def check_dtype(dtype: torch.dtype, config) -> None:
    if dtype == torch.float16 and config.overflows_float16:
        raise InputError(
            f"the activations of the {config.family} family overflow float16; "
            "load it with dtype=torch.bfloat16 or dtype=torch.float32"
        )


def checked_plan(prune, num_layers: int) -> PrunePlan:
    if prune is None:
        return PrunePlan.none()
    if isinstance(prune, str) and prune == "default":
        return PrunePlan.deepest(num_layers, 1 / 3)
    if isinstance(prune, PrunePlan):
        return prune.check(num_layers)
    if isinstance(prune, (int, float)):
        return PrunePlan.deepest(num_layers, prune)
    raise PlanError(f"the plan is {prune!r}; it must be 'default', None, a fraction of the layers, or a PrunePlan")


def check_compile(compile) -> None:
    if not isinstance(compile, bool) and compile != "auto":
        raise InputError(f"compile is {compile!r}; it is 'auto', True or False")


def checked_max_seq_len(max_seq_len, config) -> int:
    if max_seq_len is None:
        return config.max_positions
    if check_count("max_seq_len", max_seq_len) > config.max_positions:
        raise ContextOverflow(f"max_seq_len is {max_seq_len}, but the model's context is {config.max_positions} tokens")
    return int(max_seq_len)
