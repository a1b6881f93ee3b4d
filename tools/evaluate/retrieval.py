"""How many questions about a prompt contenders answer, many at a time, compared with the full model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from pop.calibration.questions import Question
from tools.common import Countdown
from tools.evaluate.contender import Contender
from tools.evaluate.text import LEAST, interval

TOKENS_AT_ONCE = 4096  # the most prompt tokens of a batch


def evaluate_retrieval(
    contenders: list[Contender],
    questions: dict[int, list[Question]],
    *,
    samples: int = 1000,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> dict:
    """Score every contender on all questions, and compare it with the first one, the full model.

    An answer is exact if greedy decoding gives each of its tokens that count, after the right tokens before it. Its
    log-probability is the sum over these tokens, in nats.

    Args:
        contenders: the contenders, the full model first.
        questions: by prompt length in tokens.
        samples: the number of bootstrap samples.
        seed: the seed of the bootstrap.
        progress: receives a line for each batch of each contender.

    Returns:
        {"questions", "rows": {contender: figures}}. The figures are exact and log_prob, means over all questions; share
        and difference, which compare these two with the full model's as {"value", "low", "high"}; and kinds, with
        {"questions", "exact", "log_prob"} for each pair "KIND LENGTH". The share is None if the full model has no
        exact answer. by_question has lists of kind, exact and log_prob.
    """
    marks = {contender.name: [] for contender in contenders}
    batches = list(_batches(questions))
    step = Countdown("retrieval, batch of a method", len(batches) * len(contenders), progress)
    for batch in batches:
        for contender in contenders:
            step()
            logits = contender.batch_logits([q.prompt for q in batch], [q.answer for q in batch])
            for row, question in zip(logits, batch, strict=True):
                marks[contender.name].append(_mark(row, question))
    kinds = [f"{question.kind} {length}" for length, group in questions.items() for question in group]
    full = np.array(marks[contenders[0].name])  # [N, 2]: exact and log-probability
    rows = {}
    for contender in contenders:
        values = np.array(marks[contender.name])
        rows[contender.name] = {
            **_means(values),
            "share": share_of(values[:, 0], full[:, 0], samples, seed),
            "difference": interval(values[:, 1] - full[:, 1], samples, seed),
            "kinds": _by_kind(values, kinds),
            "by_question": {"kind": kinds, "exact": values[:, 0].tolist(), "log_prob": values[:, 1].tolist()},
        }
    return {"questions": len(kinds), "rows": rows}


def _by_kind(values: np.ndarray, kinds: list[str]) -> dict[str, dict]:
    """The means of values [N, 2] by the kinds [N] of the questions."""
    found = {}
    for kind in dict.fromkeys(kinds):
        is_kind = np.array([kind == other for other in kinds])
        found[kind] = {"questions": int(is_kind.sum()), **_means(values[is_kind])}
    return found


def _batches(questions: dict[int, list[Question]]) -> Iterator[list[Question]]:
    for length, group in questions.items():
        step = max(1, TOKENS_AT_ONCE // length)
        for begin in range(0, len(group), step):
            yield group[begin : begin + step]


def _mark(logits: torch.Tensor, question: Question) -> tuple[float, float]:
    """Whether an answer is exact, and its log-probability, from the logits [C, V] that predict its tokens."""
    targets = torch.tensor(question.answer, device=logits.device)
    counted = torch.tensor(question.counted or [True] * len(targets), device=logits.device)
    is_exact = (logits.argmax(-1) == targets)[counted].all()
    log_probs = logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return float(is_exact), float(log_probs[counted].sum())


def _means(values: np.ndarray) -> dict:
    exact, log_prob = values.mean(axis=0)
    return {"exact": float(exact), "log_prob": float(log_prob)}


def share_of(exact: np.ndarray, full: np.ndarray, samples: int = 1000, seed: int = 0) -> dict | None:
    """The exact answers of a contender over the full model's. Few of these give no interval."""
    if full.sum() < LEAST:
        return {"value": float(exact.sum() / full.sum()), "low": None, "high": None} if full.any() else None
    return interval(np.stack((exact, full), axis=1), samples, seed, _ratio)


def _ratio(means: np.ndarray) -> np.ndarray:
    """Means [..., 2] -> [...]. NaN for a sample in which the full model answers nothing."""
    return means[..., 0] / np.where(means[..., 1] > 0, means[..., 1], np.nan)
