"""What the server's engine works on: jobs, their events, and the answers in progress."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable

import torch

import pop
from pop.engine.cache import KVCache
from pop.generation.answers import Answer, end_ids
from pop.generation.logits import LogitsRules
from pop.generation.sampling import SamplingParams, sample_tokens
from pop.inputs.processors import Prepared

logger = logging.getLogger(__name__)


class Busy(Exception):
    """The queue is full."""


@dataclasses.dataclass
class Event:
    """What a token adds to an answer."""

    index: int  # of the answer in its request
    text: str = ""
    logprobs: list[tuple[int, float]] = dataclasses.field(default_factory=list)  # of the token, then of the likeliest
    finish_reason: str | None = None  # "stop" or "length", in the answer's last event
    error: Exception | None = None  # ends the request


@dataclasses.dataclass(eq=False)
class Job:
    """An answer that a request asks for."""

    index: int  # in its request
    tokens: list[int]
    media: list[Prepared]
    params: SamplingParams
    top_logprobs: int
    emit: Callable[[Event], object]  # called in the engine's thread
    plan: pop.PrunePlan | None = None  # None: the model's
    uses_kept: bool = True  # whether it continues caches of others, and leaves its own to them
    cancelled: bool = False
    cached_tokens: int = 0  # of the prompt, taken from a filled cache
    pruned_tokens: int = 0  # of the others
    answer_tokens: int = 0
    first_token_at: float | None = None  # as time.monotonic() counts

    def fail(self, error: Exception) -> None:
        if not isinstance(error, pop.PopError):
            logger.error("an answer has failed", exc_info=error)
        self.emit(Event(self.index, error=error))


class Row:
    """An answer in progress."""

    def __init__(self, model: pop.Model, job: Job, keys: list[int | str], images: list[range], cache: KVCache):
        self.job, self.keys, self.images = job, keys, images
        self.plan = model.resolve(job.plan)
        self.cache: KVCache | None = cache  # its own, until it joins the batch
        self.floor = 0  # of the cache that it continues
        self.whole: list[bool] = []  # whether each token of the prompt is at full depth by its position
        self.place: int | None = None  # in the batch
        self.logits: torch.Tensor | None = None  # [1, V], of its next token
        ends = end_ids(model)
        params = job.params
        limit = min(params.max_new_tokens, model.max_seq_len + 1 - len(job.tokens))
        self.answer = Answer(model.tokenizer, ends, params.stop, limit, *params.seeds(1))
        self.rules = LogitsRules(model, params, [job.tokens])

    def draw(self) -> torch.Tensor:
        """The next token [1]. Nothing waits for it."""
        token = sample_tokens(self.rules(self.logits, [self.answer]), self.job.params, [self.answer.generator])
        self.rules.took(token)
        return token

    def push(self, token: int) -> None:
        """Append the token to the answer, and emit what it adds."""
        if self.job.first_token_at is None:
            self.job.first_token_at = time.monotonic()
        count = len(self.answer.tokens)
        event = Event(self.job.index, self.answer.push(token), finish_reason=self.answer.finish_reason)
        self.job.answer_tokens = len(self.answer.tokens)
        if self.job.params.logprobs and len(self.answer.tokens) > count:  # not for an end token
            logprobs = self.logits[0].log_softmax(-1)
            likeliest = logprobs.topk(min(self.job.top_logprobs, len(logprobs)))
            pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
            event.logprobs = [(token, float(logprobs[token])), *pairs]
        if event.text or event.logprobs or event.finish_reason:
            self.job.emit(event)
