"""The loss on text: windows of a prompt and a continuation, compared with the full model token by token."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch

from pop.calibration.texts import LEFT_OUT
from pop.errors import InputError
from tools.common import ROOT, Countdown
from tools.evaluate.contender import Contender

MEASURES = ("nll", "kl", "kl_first", "same", "same_first")
LEAST = 5  # windows that an interval needs


# ---- Domains and windows ----


def read_domains(texts: list[str]) -> dict[str, list[Path]]:
    """The files of each domain, from --text's values NAME=FILE[,FILE...].

    Without values: each file of tools/evaluate/texts is a domain, and modules of Python's library are "code".
    """
    if not texts:
        domains = {path.stem: [path] for path in sorted((ROOT / "tools" / "evaluate" / "texts").glob("*.txt"))}
        return {**domains, "code": [Path(find_spec(name).origin) for name in sorted(LEFT_OUT)]}
    domains = {}
    for text in texts:
        name, _, files = text.partition("=")
        if not name or not files or name == "all":
            raise InputError(f"--text is {text!r}; write NAME=FILE or NAME=FILE,FILE, and any name but all")
        domains.setdefault(name, []).extend(Path(file) for file in files.split(","))
    return domains


def read_text(files: list[Path]) -> str:
    """The text of UTF-8 files, joined by blank lines."""
    pieces = []
    for file in files:
        try:
            pieces.append(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise InputError(f"{file} cannot be read as text ({reason}); check the path") from None
    return "\n\n".join(pieces)


def spread_windows(tokens: list[int], size: int, count: int, bos_id: int | None = None) -> list[list[int]]:
    """Disjoint windows, evenly spread over `tokens`.

    Args:
        tokens: the token ids of a text.
        size: the tokens of a window.
        count: how many windows to cut at most. Fewer fit into a short text.
        bos_id: if given, each window begins with it, as every prompt of such a model does.
    """
    head = [] if bos_id is None else [bos_id]
    length = size - len(head)
    count = min(count, len(tokens) // length)
    steps = max(count - 1, 1)
    begins = [(len(tokens) - length) * index // steps for index in range(count)]
    return [[*head, *tokens[begin : begin + length]] for begin in begins]


# ---- Figures ----


def evaluate_text(
    contenders: list[Contender],
    domains: dict[str, list[list[int]]],
    prompt_tokens: int,
    *,
    samples: int = 1000,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, dict]:
    """Compare all contenders with the first one, the full model.

    One window's logits of the full model and of one contender are in memory at a time.

    Args:
        contenders: the contenders, the full model first.
        domains: windows of token ids by domain, all equally long.
        prompt_tokens: how many tokens of a window are the prompt. The rest is the continuation.
        samples: the number of bootstrap samples.
        seed: the seed of the bootstrap.
        progress: receives a line for each window.

    Returns:
        {domain: {"windows", "continuation_tokens", "rows": {contender: figures}}}. With several domains, "all" pools
        their windows. The figures are perplexity, and perplexity_change, kl, kl_first, same and same_first, each as
        {"value", "low", "high"}. low and high are None for fewer than five windows. by_window has lists of MEASURES.
    """
    records = {name: [] for name in domains}
    step = Countdown("text, window", sum(map(len, domains.values())), progress)
    for name, windows in domains.items():
        for window in windows:
            step()
            prompt = window[:prompt_tokens]
            continuation = window[prompt_tokens:]
            full = contenders[0].logits(prompt, continuation).double().log_softmax(-1)  # [C, V]
            rows = [_measure(full, full, continuation)]
            for contender in contenders[1:]:
                log_probs = contender.logits(prompt, continuation).double().log_softmax(-1)
                rows.append(_measure(full, log_probs, continuation))
            records[name].append(rows)
    if len(domains) > 1:
        records = {"all": [rows for domain in records.values() for rows in domain], **records}
    lengths = {len(window) - prompt_tokens for windows in domains.values() for window in windows}
    result = {}
    for name, record in records.items():
        values = np.array(record)  # [windows, contenders, measures]
        result[name] = {
            "windows": len(values),
            "continuation_tokens": len(values) * max(lengths),
            "rows": {
                contender.name: {
                    **_summary(values[:, index], values[:, 0], samples, seed),
                    "by_window": dict(zip(MEASURES, values[:, index].T.tolist(), strict=True)),
                }
                for index, contender in enumerate(contenders)
            },
        }
    return result


def _measure(full: torch.Tensor, log_probs: torch.Tensor, targets: list[int]) -> list[float]:
    """The MEASURES of one window, from the log-probabilities [C, V] of the full model and of a contender.

    Each is a mean over the continuation, or the value at its first token.
    """
    nll = -log_probs.gather(1, torch.tensor(targets, device=log_probs.device)[:, None])[:, 0]  # [C]
    kl = (full.exp() * (full - log_probs)).sum(-1).clamp(min=0)  # [C]; rounding can leave a sum just below zero
    same = (full.argmax(-1) == log_probs.argmax(-1)).double()
    return [float(x) for x in (nll.mean(), kl.mean(), kl[0], same.mean(), same[0])]


def _summary(values: np.ndarray, full: np.ndarray, samples: int, seed: int) -> dict:
    """The figures of one contender's row, from its windows [N, measures] and the full model's."""
    columns = dict(zip(MEASURES, values.T, strict=True))
    nll = columns.pop("nll")
    return {
        "perplexity": float(np.exp(nll.mean())),
        "perplexity_change": interval(nll - full[:, 0], samples, seed, np.expm1),  # windows are equally long: pooled
        **{name: interval(column, samples, seed) for name, column in columns.items()},
    }


def interval(
    values: np.ndarray, samples: int = 1000, seed: int = 0, figure: Callable = np.array, mean: Callable = np.mean
) -> dict:
    """A figure computed from the mean of values [N, ...], with its 95 % interval: {"value", "low", "high"}."""
    low, high = bootstrap(values, samples, seed, figure, mean)
    return {"value": float(figure(mean(values, axis=0))), "low": low, "high": high}


def bootstrap(
    values: np.ndarray, samples: int = 1000, seed: int = 0, figure: Callable = np.array, mean: Callable = np.mean
) -> tuple[float | None, float | None]:
    """A 95 % interval of figure(mean of values [N, ...]), from resampled windows. (None, None) for N below 5.

    `mean` may be np.median.

    For few windows the plain percentile interval is too narrow: with 8 windows it holds the mean in 83 to 88 of 100
    cases. So this is the expanded percentile interval (Hesterberg 2015): the lower percentile is
    Phi(-t sqrt(N / (N - 1))), the upper one its complement, and t the 97.5 % quantile of Student's distribution.
    The quantile is expanded around the normal one, up to 1 / (N - 1)^2.

    The same seed resamples the same windows for all values, so the intervals of one table are paired.
    """
    N = len(values)
    if N < LEAST:
        return None, None
    normal = NormalDist()
    z = normal.inv_cdf(0.975)
    t = z + (z**3 + z) / (4 * (N - 1)) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * (N - 1) ** 2)
    tail = 100 * normal.cdf(-t * (N / (N - 1)) ** 0.5)
    index = np.random.default_rng(seed).integers(N, size=(samples, N))
    low, high = np.nanpercentile(figure(mean(values[index], axis=1)), (tail, 100 - tail))
    return float(low), float(high)
