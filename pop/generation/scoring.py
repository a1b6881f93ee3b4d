"""The log-likelihood of a continuation."""

import torch
import torch.nn.functional as F

from pop import engine
from pop.inputs.processors import Prepared
from pop.pruning.plan import PrunePlan

TOKENS_AT_ONCE = 256  # of the continuation, whose logits [T, V] are in memory together


def log_likelihood(
    model, context: list[int], media: list[Prepared], continuation: list[int], plan: PrunePlan | None
) -> float:
    """log p(continuation | context) of token ids, as `Model.score` describes it. media: what the context shows."""
    length = len(context) + len(continuation) - 1
    model.check_fits(length, "context plus continuation")
    cache = model.new_cache(1, length)
    logits = model.prefill([context], cache, images=[media], plan=plan)  # [1, V]
    targets = torch.tensor(continuation, device=model.device)
    total = _log_prob(logits, targets[:1])
    inputs, following = targets[None, :-1], targets[1:]
    for begin in range(0, len(following), TOKENS_AT_ONCE):
        part = slice(begin, begin + TOKENS_AT_ONCE)
        logits = engine.extend(model.module, inputs[:, part], cache, model._stages(1))[0]  # [T, V]
        total += _log_prob(logits, following[part])
    return total


def _log_prob(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """The summed log-probability of targets [T] by logits [T, V]."""
    return -F.cross_entropy(logits, targets, reduction="none").double().sum().item()
