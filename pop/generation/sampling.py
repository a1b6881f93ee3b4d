"""From logits to tokens: `SamplingParams` says how, `sample_tokens` picks."""

import dataclasses
import math
import secrets
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from numbers import Real
from typing import TypedDict

import torch
from torch import Tensor

from pop.errors import InputError, check_count
from pop.system.memory import to_device

# The least and the greatest value. Beyond them, logits in float32 could overflow.
RANGES = {"temperature": (0, 1e9), "top_p": (1e-9, 1), "min_p": (0, 1), "repetition_penalty": (1e-6, 1e6)}
NOT_FINITE = "the {} are not finite; load with torch.bfloat16 or torch.float32, or check the weights"


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the tokens of an answer are picked, and where it ends. Raises InputError for a value that is out of range."""

    max_new_tokens: int = 256  # the most tokens of an answer
    temperature: float = 0.0  # 0 is greedy; otherwise tokens are drawn from softmax(logits / temperature)
    top_k: int | None = None  # draw from the k likeliest tokens only; None: from all
    top_p: float | None = None  # draw from the fewest likeliest tokens that sum to p or more; None: from all
    seed: int | None = None  # makes the draws repeatable; None: every call draws anew
    stop: str | Sequence[str] | None = None  # an answer ends before the first of these strings that it contains
    min_p: float | None = None  # draw from tokens of at least p times the likeliest one's probability; None: from all
    repetition_penalty: float = 1.0  # divides positive logits of tokens in the prompt or the answer, multiplies others
    logits_processor: Callable[[list[int], Tensor], Tensor] | None = None  # see logits.py
    logprobs: bool = False  # whether a Generation has the log-probabilities of its tokens

    def __post_init__(self):
        check_count("max_new_tokens", self.max_new_tokens)
        if self.top_k is not None:
            check_count("top_k", self.top_k)
        if self.seed is not None:
            check_count("seed", self.seed, least=0, most=2**63 - 1)
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            is_default = value is DEFAULTS[name]  # which may be None
            if not is_default and not (is_number and least <= value <= most):
                raise InputError(f"{name} is {value!r}; it must be a number from {least} to {most}")
        if self.logits_processor is not None and not callable(self.logits_processor):
            raise InputError(f"logits_processor is {self.logits_processor!r}; it must be a function, or None")
        if not isinstance(self.logprobs, bool):
            raise InputError(f"logprobs is {self.logprobs!r}; it must be True or False")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        if stops is None:
            stops = ()
        if not isinstance(stops, Sequence) or not all(isinstance(stop, str) and stop for stop in stops):
            raise InputError(f"stop is {self.stop!r}; it must be a string or a list of them, none empty")
        object.__setattr__(self, "stop", tuple(stops))

    def seeds(self, batch_size: int) -> list[int]:
        """A seed for each batch row: the given one in all of them, or a random one in each."""
        if self.seed is None:
            return [secrets.randbits(63) for _ in range(batch_size)]
        return [int(self.seed)] * batch_size


class Options(TypedDict, total=False):
    """The options of a call, for editors and type checkers: the fields of SamplingParams, and `sampling`."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    min_p: float | None
    repetition_penalty: float
    logits_processor: Callable[[list[int], Tensor], Tensor] | None
    logprobs: bool
    sampling: str | None  # "checkpoint": see `sampling_params`


DEFAULTS = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
INSTEAD = {  # of options that there are elsewhere
    "stream": "model.stream, which takes model.chat_tokens(messages) for messages",
    "plan": "that of start_chat and prefix, which holds for all their answers",
    "prune": "plan, of which 'none' is full depth",
    "messages": "model.chat",
    "images": "the part {'type': 'image', 'image': ...} of a message",
    "videos": "the part {'type': 'video', 'video': ...} of a message",
    "system": "that of start_chat, or a message with the role system",
    "tools": "that of model.chat, model.chat_tokens and model.prefix",
    "enable_thinking": "that of model.chat, model.chat_tokens, start_chat and prefix",
    "response_format": "tools/examples/json_schema.py of a clone, which makes a logits_processor of a JSON schema",
}


def sampling_params(options: Options, stated: dict | None) -> SamplingParams:
    """Check the options of a call. Raises InputError for an unknown name or a value that cannot be used.

    Args:
        options: Fields of SamplingParams by name, and perhaps `sampling`. sampling="checkpoint" takes the stated
            options in place of those that are not given.
        stated: What the checkpoint's generation_config.json states about sampling. None without that file.
    """
    given = dict(options)
    sampling = given.pop("sampling", None)
    for name in given:
        if name not in DEFAULTS:
            near = [INSTEAD[name]] if name in INSTEAD else get_close_matches(name, DEFAULTS, n=1)
            instead = f", but there is {near[0]}" if near else ""
            raise InputError(f"there is no option {name!r}{instead}; the options are {', '.join(DEFAULTS)}, sampling")
    if sampling not in (None, "checkpoint"):
        raise InputError(f"sampling is {sampling!r}; it must be 'checkpoint' or None")
    if sampling is None:
        stated = {}
    elif stated is None:
        raise InputError("sampling is 'checkpoint', but the checkpoint has no generation_config.json; give the options")
    return SamplingParams(**(stated | given))


def sample_tokens(logits: Tensor, params: SamplingParams, generators: Sequence[torch.Generator]) -> Tensor:
    """Pick one token for each batch row: logits [B, V] float32 -> tokens [B], for `read_tokens`.

    This runs on the logits' device and does not wait for it. Each row has its own random generator, which gives one
    number a token. So a prompt and a seed give the same tokens alone and in any batch row, on a CPU and on a GPU, up to
    rounding errors in the logits.
    """
    if params.temperature == 0:
        return pick(logits, params)
    numbers = [torch.randint(2**53, (1,), generator=generator, device="cpu") for generator in generators]
    return pick(logits, params, *to_device([torch.stack(numbers)], logits.device))


def pick(logits: Tensor, params: SamplingParams, numbers: Tensor | None = None) -> Tensor:
    """logits [B, V] and random integers [B, 1] below 2**53 -> tokens [B]. Without numbers: the likeliest tokens.

    The token is -1 if a row's largest logit is infinite or NaN.
    """
    tokens = logits.argmax(-1, keepdim=True)  # [B, 1]; NaN counts as the largest
    largest = logits.gather(-1, tokens)
    if numbers is not None:
        # NaN is 0 / 0 at a tiny temperature, or belongs to a row whose token will be -1.
        below = ((largest - logits) / float(params.temperature)).nan_to_num(0.0, math.inf)
        tokens = _draw(below, params, numbers)
    return tokens.where(largest.isfinite(), -1)[:, 0]


def _draw(below: Tensor, params: SamplingParams, numbers: Tensor) -> Tensor:
    """Draw tokens [B, 1] with probabilities proportional to exp(-below), below [B, V] from 0 up."""
    top_p = float(params.top_p or 1)
    V = below.shape[1]
    k = min(params.top_k or V, V)
    order = None  # [B, k], the ids of the likeliest tokens, if the tokens are sorted
    if k < V or top_p < 1:
        # Floats from 0 up are ordered like their bits. The token's id in the lower bits decides between equal ones.
        keys = below.view(torch.int32).long() << 32 | torch.arange(V, device=below.device)
        keys = keys.topk(k, largest=False).values if k < V else keys.sort().values  # [B, k], likeliest first
        order = keys & (2**32 - 1)
        below = (keys >> 32).int().view(torch.float32)
    # Integers have the same sum in any order. So all devices and processes agree, and a sum does not grow at a
    # weight of 0, which is thus never drawn. The largest weight is 2**34: float64 can hold the sum of 2**18.
    weights = (below.neg().exp() * 2**34).long()
    sums = weights.cumsum(-1)  # [B, k]
    total = sums[:, -1:].double()
    if top_p < 1:  # the sum of the fewest tokens that reach top_p
        total = sums.gather(-1, torch.searchsorted(sums, (total * top_p).long())).double()
    if params.min_p:
        sums = weights.where(weights >= float(params.min_p) * 2**34, 0).cumsum(-1)
        total = total.minimum(sums[:, -1:])
    drawn = torch.searchsorted(sums, (numbers * (total / 2**53)).long(), right=True)
    return drawn if order is None else order.gather(-1, drawn)


def read_tokens(tokens: Tensor, unused: Sequence[int] = ()) -> list[int]:
    """Wait for the tokens [B] of `sample_tokens`. Raises InputError if a row's largest logit was infinite or NaN.

    unused: Rows whose tokens nobody reads.
    """
    ids = tokens.tolist()
    if any(token < 0 for row, token in enumerate(ids) if row not in unused):
        raise InputError(NOT_FINITE.format("logits"))
    return ids


def check_finite(numbers: Tensor, what: str) -> None:
    """Raise InputError if numbers that a model has computed are infinite or NaN; `what` names them."""
    if not numbers.isfinite().all():
        raise InputError(NOT_FINITE.format(what))
