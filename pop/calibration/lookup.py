"""Which layers look answers up: of an answer in the prompt, how many tokens each layer would select."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pop.calibration.passes import Pass
from pop.errors import InputError
from pop.pruning.plan import PrunePlan

Pair = tuple[list[int], list[int]]  # the token ids of a prompt and of its answer


@torch.no_grad()
def found_by_layer(model, prompt: list[int], answer: list[int], share: float, last: int) -> Tensor | None:
    """The share of an answer's tokens that each layer would select, [L], where the answer first occurs.

    None: the prompt does not hold the answer, or only in its end.

    Args:
        model: A pop.Model. Its plan plays no part.
        prompt, answer: Token ids.
        share: Of the tokens to select from: all but the first one and the last ones.
        last: How many tokens the prompt's end has, at least 1. They are at full depth anyway.
    """
    T = len(prompt)
    size = len(answer)
    begins = range(T - last - size + 1)
    begin = next((begin for begin in begins if prompt[begin : begin + size] == answer), None)
    if begin is None:
        return None
    model_pass = Pass(model.module, torch.tensor([prompt]))
    h = model_pass.embed()
    found = []
    for index in range(model.config.num_layers):
        # The pruned layer need not exist: a plan selects only before one.
        plan = PrunePlan(
            (index + 1,), full_depth_first=1, full_depth_last=last, full_depth_selected=share, selecting_layer=index
        )
        selected = model_pass.selected(plan, h, T)
        found.append(selected[0, begin : begin + size].float().mean())
        h = model_pass.run_layer(index, h)
    return torch.stack(found).cpu()


def selecting_scores(model, pairs: Sequence[Pair], share: float, last: int) -> Tensor:
    """The mean of `found_by_layer` over pairs of a prompt and its answer, [L]. The layer of the highest should select.

    Chance finds as many tokens as the share. Raises InputError if no prompt holds its answer before its end.
    """
    rows = [found_by_layer(model, *pair, share, last) for pair in pairs]
    found = [row for row in rows if row is not None]
    if not found:
        raise InputError(
            f"no prompt holds its answer before its last {last} tokens; "
            "give a smaller last, or prompts with the answers"
        )
    return torch.stack(found).mean(0)
