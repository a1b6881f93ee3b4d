"""What POP_PLAN says, and what a request says of it."""

import re

from pop import PrunePlan


def plan_of(value, num_layers: int) -> PrunePlan:
    """A plan from layers as in "10,12,19-29", or from anything that `pop.load` takes as `prune`.

    Raises:
        PlanError: It is none of these, or does not fit a model of num_layers layers.
    """
    if not isinstance(value, str) or not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)+|\d+-\d+", value):
        return PrunePlan.of(value, num_layers)
    layers = []
    for part in value.split(","):
        first, _, last = part.partition("-")
        layers.extend(range(int(first), int(last or first) + 1))
    return PrunePlan(layers).check(num_layers)


def may_prune(params) -> bool:
    """Whether a request may be pruned. Not if it asks for log-probabilities of its prompt, or opts out.

    Args:
        params: The request's SamplingParams, or None if it samples nothing.
    """
    if params is None or params.prompt_logprobs is not None:
        return False
    return (params.extra_args or {}).get("pop_plan") != "none"
