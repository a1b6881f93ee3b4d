"""Log-likelihoods of continuations, many at a time: each context is prefilled once, by the model's plan."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

import torch
import torch.nn.functional as F

import pop
from pop import engine
from pop.generation.sampling import check_finite

LOGITS_AT_ONCE = 512  # rows of logits [V] that scoring keeps in memory together

Request = tuple[list[int], list[int]]  # the token ids of a context and of a continuation


def score(
    model: pop.Model, contexts: list[list[int]], continuations: list[list[list[int]]]
) -> list[list[tuple[float, bool]]]:
    """The log-likelihood of every continuation of each context, and whether it is the greedy continuation.

    The contexts are prefilled once, as one batch, with the model's plan. The n-th continuations of all contexts are
    appended together at full depth. Then the cache returns to the contexts, and the next continuations overwrite them.

    Args:
        model: the model.
        contexts: the token ids of B contexts.
        continuations: for each context, a list of continuations, each a list of token ids.

    Returns:
        For each context, a pair for each of its continuations.

    Raises InputError if the logits overflow.
    """
    lengths = [len(context) for context in contexts]
    longest = max(len(continuation) for group in continuations for continuation in group)
    cache = model.new_cache(len(contexts), max(lengths) + longest - 1)
    padded = [context + [0] * (max(lengths) - len(context)) for context in contexts]
    boundary = None  # logits [B, V] of the token after each context
    # After a continuation longer than a chunk, sliding-window layers no longer hold the end of the context.
    forgets = longest - 1 > cache.chunk_size and any(model.config.windows)
    results: list[list[tuple[float, bool]]] = [[] for _ in contexts]
    for turn in zip_longest(*continuations, fillvalue=[]):  # one continuation of each context
        if boundary is None or forgets:
            cache.reset()
            boundary = model.prefill(padded, cache, lengths=lengths)
            prefilled = cache.lengths
        scores = _score_turn(model, boundary, cache, turn)
        for row, continuation in enumerate(turn):
            if continuation:
                results[row].append(scores[row])
        cache.lengths = prefilled
    return results


def _score_turn(model, boundary: torch.Tensor, cache, continuations) -> list[tuple[float, bool]]:
    """Append one continuation to each row of the cache, or nothing for an empty list.

    boundary: the logits [B, V] that predict the first tokens.
    """
    B = len(continuations)
    T = max(len(continuation) for continuation in continuations)
    device = boundary.device
    # Rows are padded on the right: under a causal mask, padding changes nothing before it.
    targets = [tokens + [0] * (T - len(tokens)) for tokens in continuations]
    targets = torch.tensor(targets, device=device)  # [B, T]
    lengths = torch.tensor([len(tokens) for tokens in continuations], device=device)
    real = torch.arange(T, device=device) < lengths[:, None]  # [B, T]
    log_probs = torch.zeros(B, dtype=torch.float64, device=device)
    greedy = torch.ones(B, dtype=torch.bool, device=device)
    logits = boundary[:, None]  # [B, C, V], of the C targets from `begin` on
    begin = 0
    step = max(1, LOGITS_AT_ONCE // B)
    while True:
        end = begin + logits.shape[1]
        target = targets[:, begin:end]  # [B, C]
        counts = real[:, begin:end]
        losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
        log_probs -= losses.double().where(counts, 0).sum(1)
        greedy &= ((logits.argmax(-1) == target) | ~counts).all(1)
        if end == T:
            check_finite(log_probs, "logits")
            return list(zip(log_probs.tolist(), greedy.tolist(), strict=True))
        begin = end
        logits = engine.extend(model.module, targets[:, begin - 1 : T - 1][:, :step], cache)


def rolling_windows(tokens: list[int], prefix: int, length: int) -> Iterator[Request]:
    """Cut a text into windows of `length` tokens: (context, continuation) pairs that predict each token once.

    The context is the token before the continuation. In the last of several windows, it is as many tokens as fit.

    Args:
        tokens: the token ids of the text.
        prefix: the token id before the text.
        length: the tokens of a window.
    """
    inputs = [prefix, *tokens]  # inputs[n] is followed by tokens[n]
    for begin in range(0, len(tokens), length):
        end = min(begin + length, len(tokens))
        yield inputs[max(0, end - length) : begin + 1], tokens[begin:end]
