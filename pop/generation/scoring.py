"""Log-likelihoods of given continuations."""

import torch
import torch.nn.functional as F

from pop.generation.sampling import check_finite
from pop.inputs.processors import Prepared
from pop.pruning.plan import PrunePlan
from pop.runner import Runner, padded
from pop.system.memory import to_device

SCORED_AT_ONCE = 256  # rows of logits [V] that are in memory together
PADDING = -100  # of labels, for which F.cross_entropy gives 0


def score(
    runner: Runner,
    contexts: list[list[int]],
    continuations: list[list[int]],
    media: list[list[Prepared]],
    plan: PrunePlan,
) -> list[float]:
    """Return log p(continuation | context) for each continuation. The rows of a batch run together.

    Args:
        runner: What computes.
        contexts: Token ids, one list for each continuation. A single context serves all continuations.
        continuations: Token ids, none of them empty.
        media: The images and videos of each context.
        plan: The resolved plan of the contexts.

    Raises:
        ContextOverflow: A row is too long.
        InputError: The logits are not finite.
    """
    B = len(continuations)
    rows = contexts if len(contexts) > 1 else contexts * B
    for context, continuation in zip(rows, continuations, strict=True):
        runner.check_fits(len(context) + len(continuation) - 1, "context plus continuation")
    tokens, lengths = padded(contexts)
    targets, ends = padded(continuations)  # [B, T], [B]
    T = targets.shape[1]
    room = tokens.shape[1] + T - 1  # the padding of the longest row may exceed the model's context

    cache = runner.unlimited_cache(len(contexts), room)
    logits = runner.prefill_prepared(tokens, cache, lengths, media, plan)  # [B, V] or [1, V]
    if len(contexts) < B and T > 1:  # for one token each, nothing is added to the cache
        single = cache
        cache = runner.unlimited_cache(B, room)
        cache.copy_from(single)

    labels = targets.where(torch.arange(T, device="cpu") < ends[:, None], PADDING)  # [B, T]
    targets, labels = to_device([targets, labels], runner.device)
    scores = -F.cross_entropy(logits.expand(B, -1), labels[:, 0], reduction="none").double()  # [B]
    step = max(1, SCORED_AT_ONCE // B)
    for begin in range(0, T - 1, step):
        end = min(begin + step, T - 1)
        logits = runner.extend(targets[:, begin:end], cache)  # [B, C, V]; each token predicts the next one
        losses = F.cross_entropy(logits.transpose(1, 2), labels[:, begin + 1 : end + 1], reduction="none")  # [B, C]
        scores -= losses.double().sum(1)
    check_finite(scores, "logits")
    return scores.tolist()
