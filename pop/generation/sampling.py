"""From logits to tokens: `SamplingParams` says how, `Sampler` picks."""

import dataclasses
import math
import secrets
from collections.abc import Callable, Sequence
from numbers import Real

import torch

from pop.errors import InputError, check_count


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the tokens of an answer are picked, and where it ends. Raises InputError for a value that is out of range."""

    max_new_tokens: int = 256  # the most tokens of an answer
    temperature: float = 0.0  # 0 is greedy; otherwise tokens are drawn from softmax(logits / temperature)
    top_k: int | None = None  # draw from the k likeliest tokens only; None: from all
    top_p: float | None = None  # draw from the fewest likeliest tokens that sum to p or more; None: from all
    seed: int | None = None  # makes the draws repeatable; None: every call draws anew
    stop: str | Sequence[str] | None = None  # an answer ends before the first of these strings that it contains

    def __post_init__(self):
        check_count("max_new_tokens", self.max_new_tokens)
        _check_number("temperature", self.temperature, lambda x: 0 <= x < math.inf, "a number from 0 (greedy) up")
        if self.top_k is not None:
            check_count("top_k", self.top_k)
        if self.top_p is not None:
            _check_number("top_p", self.top_p, lambda x: 0 < x <= 1, "a number above 0 and at most 1, or None")
        if self.seed is not None:
            check_count("seed", self.seed, least=0, most=2**63 - 1)
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or ()
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) and text for text in stop):
            raise InputError(f"stop is {self.stop!r}; it must be a string or a list of strings, none of them empty")
        object.__setattr__(self, "stop", tuple(stop))


class Sampler:
    """Picks one token for each batch row.

    Each row has its own random generator. So a prompt and a seed give the same tokens by itself and in any batch row,
    up to rounding errors in the logits.
    """

    def __init__(self, batch_size: int, params: SamplingParams):
        least = torch.finfo(torch.float32).tiny  # a smaller number would be rounded to 0
        self.temperature = max(float(params.temperature), least) if params.temperature else 0.0
        self.top_p = None if params.top_p is None else max(float(params.top_p), least)
        self.top_k = params.top_k
        seeds = [secrets.randbits(63) if params.seed is None else int(params.seed) for _ in range(batch_size)]
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def keep_rows(self, rows: list[int]) -> None:
        """Continue with these rows of the batch, in this order."""
        self.generators = [self.generators[row] for row in rows]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [B, V] float32 -> tokens [B]. Raises InputError if a row's largest logit is infinite or NaN."""
        largest = logits.amax(-1, keepdim=True)
        check_finite(largest, "logits")
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = (logits - largest) / self.temperature  # at most 0, so softmax does not overflow
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            best = logits.topk(self.top_k)
            logits = torch.full_like(logits, -math.inf).scatter(-1, best.indices, best.values)
        probs = logits.softmax(-1)
        if self.top_p is not None and self.top_p < 1:
            ranked, order = probs.sort(descending=True)
            before = ranked.cumsum(-1) - ranked  # the probability of all likelier tokens
            ranked = ranked.masked_fill(before >= self.top_p, 0)
            probs = torch.zeros_like(probs).scatter(-1, order, ranked)
        rows = zip(probs.cpu(), self.generators, strict=True)
        picks = [torch.multinomial(row, 1, generator=generator) for row, generator in rows]
        return torch.cat(picks).to(logits.device)


def check_finite(numbers: torch.Tensor, what: str) -> None:
    """Raise InputError if numbers that a model has computed are infinite or NaN; `what` names them."""
    if not numbers.isfinite().all():
        raise InputError(f"the {what} are not finite; load with torch.bfloat16 or torch.float32, or check the weights")


def _check_number(name: str, value, accepts: Callable[[float], bool], wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not accepts(value):
        raise InputError(f"{name} is {value!r}; it must be {wanted}")
