"""From logits to text: sampling, and turning token ids into text while they come."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from numbers import Integral, Real

import torch

from pop.engine.cache import KVCache
from pop.errors import InputError, UnsupportedError, check_count
from pop.inputs.chat import chat_format
from pop.inputs.tokenizers import StreamDecoder
from pop.pruning.plan import PrunePlan


@dataclasses.dataclass(frozen=True)
class Generation:
    """What the model answered to one prompt.

    text: the answer, cut before a stop string and without end tokens; None if the model has no tokenizer.
    tokens: the generated ids without the end token.
    prompt_tokens: how many tokens the prompt had, those of a prefix or of earlier turns included.
    ttft_s: seconds from the call of generate to the first token of the batch, tokenization of text included.
    decode_s: seconds from the first token to the last.
    finish_reason: "stop" (an end token or a stop string) or "length" (max_new_tokens, or a full context).
    """

    text: str | None
    tokens: list[int]
    prompt_tokens: int
    ttft_s: float
    decode_s: float
    finish_reason: str

    @property
    def tokens_per_s(self) -> float:
        """Decode speed behind the first token; nan for an answer too short to tell."""
        return (len(self.tokens) - 1) / self.decode_s if len(self.tokens) > 1 else math.nan


class Sampler:
    """Picks one token a row: greedy at temperature 0, else from softmax(logits / temperature).

    top_k keeps the k likeliest tokens, top_p the smallest set of likeliest ones whose probabilities sum to p or
    more. Each row has a random generator of its own, so that a prompt and a seed give the same text alone and on
    any place in a batch, as far as rounding lets the logits be the same. Raises InputError for settings out of range.
    """

    def __init__(self, batch_size, *, temperature=0.0, top_k=None, top_p=None, seed=None):
        _check("temperature", temperature, Real, lambda x: 0 <= x < math.inf, "a number from 0 (greedy) up")
        if top_k is not None:
            _check("top_k", top_k, Integral, lambda x: x >= 1, "an integer of at least 1, or None")
        if top_p is not None:
            _check("top_p", top_p, Real, lambda x: 0 < x <= 1, "a number above 0 and up to 1, or None")
        if seed is not None:
            _check("seed", seed, Integral, lambda x: 0 <= x < 2**63, "an integer from 0 to 2**63 - 1, or None")
        least = torch.finfo(torch.float32).tiny  # a smaller one would be 0 beside logits
        self.temperature = max(float(temperature), least) if temperature else 0.0
        self.top_k, self.top_p = top_k, None if top_p is None else max(float(top_p), least)
        self.generators = [
            torch.Generator().manual_seed(secrets.randbits(63) if seed is None else int(seed))
            for _ in range(batch_size)
        ]

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows of the batch, in this order."""
        self.generators = [self.generators[row] for row in rows]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [B, V] float32 -> tokens [B]. Raises InputError for logits that are not finite."""
        largest = logits.amax(-1, keepdim=True)
        check_finite(largest, "logits")
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = (logits - largest) / self.temperature  # at most 0: no overflow to inf
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            best = logits.topk(self.top_k)
            logits = torch.full_like(logits, -math.inf).scatter(-1, best.indices, best.values)
        probs = logits.softmax(-1)
        if self.top_p is not None and self.top_p < 1:
            ranked, order = probs.sort(descending=True)
            before = ranked.cumsum(-1) - ranked  # probability of all likelier tokens; 0 for the likeliest
            ranked = ranked.masked_fill(before >= self.top_p, 0)
            probs = torch.zeros_like(probs).scatter(-1, order, ranked)
        picks = [
            torch.multinomial(row, 1, generator=generator)
            for row, generator in zip(probs.cpu(), self.generators, strict=True)
        ]
        return torch.cat(picks).to(logits.device)


class Answer:
    """One row's answer as it grows: tokens in, text out in whole characters, up to an end token or stop string."""

    def __init__(self, tokenizer, end_ids: frozenset[int], stop: list[str], max_new_tokens: int):
        self.end_ids, self.stop, self.max_new_tokens = end_ids, stop, max_new_tokens
        self.decoder = None if tokenizer is None else StreamDecoder(tokenizer)
        self.tokens: list[int] = []
        self.text = ""  # settled: no later token changes it
        self.pending = ""  # could still turn out to be the beginning of a stop string
        self.finish_reason: str | None = None

    def push(self, token: int) -> str:
        """Take the next token; return the text that it settles. A finished answer takes nothing more."""
        if self.finish_reason:
            return ""
        if token in self.end_ids:
            return self._finish("stop")
        self.tokens.append(token)
        piece = "" if self.decoder is None else self._settle(self.decoder.push(token))
        if len(self.tokens) == self.max_new_tokens and not self.finish_reason:
            piece += self._finish("length")
        return piece

    def _finish(self, reason: str) -> str:
        piece = "" if self.decoder is None else self._settle(self.decoder.flush())
        if not self.finish_reason:  # the flushed text may have completed a stop string
            piece += self.pending
            self.text += self.pending
            self.finish_reason = reason
        return piece

    def _settle(self, text: str) -> str:
        self.pending += text
        begins = [(self.pending.find(stop), stop) for stop in self.stop if stop in self.pending]
        if begins:  # the one that is complete first, as if the text came character by character; then the longest
            _, begin = min((begin + len(stop), begin) for begin, stop in begins)
            piece, self.finish_reason = self.pending[:begin], "stop"
            self.pending = ""
        else:
            held = max((_overlap(self.pending, stop) for stop in self.stop), default=0)
            piece = self.pending[: len(self.pending) - held]
            self.pending = self.pending[len(piece) :]
        self.text += piece
        return piece


class Run:
    """One generation: prompts of different lengths prefilled together, then decoded until the last row has ended.

    model: a pop.Model. prompts: lists of token ids. images: a list for each prompt, or None. The options are those of
    `Model.generate`.
    before: a cache of one row that all prompts go on from, or None. It is copied, not changed.
    lead: token ids between that and the prompts, run at full depth: a part of an earlier answer.
    cache: when the answers are there, what they were made with; the last token of a cut answer is not in it.
    """

    def __init__(
        self,
        model,
        prompts: list[list[int]],
        before: KVCache | None = None,
        lead: Sequence[int] = (),
        *,
        images=None,
        max_new_tokens=256,
        temperature=0.0,
        top_k=None,
        top_p=None,
        seed=None,
        stop=None,
        plan=None,
    ):
        self.model, self.prompts, self.images, self.plan = model, prompts, images, model.resolve(plan)
        check_count("max_new_tokens", max_new_tokens)
        self.sampler = Sampler(len(prompts), temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        stop = [stop] if isinstance(stop, str) else stop or []
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) and text for text in stop):
            raise InputError(f"stop is {stop!r}; it must be a string or a list of strings, none of them empty")
        if stop:
            model.need_tokenizer("stop")
        self.before, self.lead, self.cache = before, list(lead), None
        self.longest = max(len(prompt) for prompt in prompts)
        self.earlier = len(self.lead) + (0 if before is None else int(before.lengths[0]))
        what = (
            f"the prompt ({self.longest} tokens behind {self.earlier} earlier ones)" if self.earlier else "the prompt"
        )
        model.check_fits(self.earlier + self.longest, what)
        # A full context ends an answer. The last token is only sampled, never decoded: it needs no slot.
        rooms = [min(max_new_tokens, model.max_seq_len - self.earlier - len(prompt) + 1) for prompt in prompts]
        longest = max(len(prompt) + room for prompt, room in zip(prompts, rooms, strict=True))
        self.max_seq_len = self.earlier + longest - 1
        self.answers = [Answer(model.tokenizer, end_ids(model), stop, room) for room in rooms]

    def steps(self) -> Iterator[list[str]]:
        """Generate; after each token of the batch yield the text that each row has settled."""
        model, answers = self.model, self.answers
        cache = self.cache = model.new_cache(len(self.prompts), self.max_seq_len)
        if self.before is not None:
            cache.copy_from(self.before)
        if self.lead:
            model.prefill([self.lead] * len(self.prompts), cache, plan=PrunePlan.none())
        padded = [prompt + [0] * (self.longest - len(prompt)) for prompt in self.prompts]
        lengths = [len(prompt) for prompt in self.prompts]
        logits = model.prefill(padded, cache, lengths=lengths, images=self.images, plan=self.plan)
        # Never picked are ids beyond the tokenizer's vocabulary, which have no text (an embedding may be padded), and
        # tokens that stand for images: an answer shows none.
        known = model.config.vocab_size if model.tokenizer is None else model.tokenizer.vocab_size
        rows = list(range(len(answers)))  # the answer that each row of the cache belongs to
        while True:
            for token in model.vision.placeholders.values():
                logits[:, token] = -math.inf
            tokens = self.sampler(logits[:, :known])
            if model.part is not None:
                model.part.agree(tokens)
            pieces = [""] * len(answers)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                pieces[row] = answers[row].push(token)
            yield pieces
            unfinished = [place for place, row in enumerate(rows) if not answers[row].finish_reason]
            if not unfinished:
                return
            if len(unfinished) < len(rows):  # the others leave the batch
                rows, tokens = [rows[place] for place in unfinished], tokens[unfinished]
                cache.keep_rows(torch.tensor(unfinished))
                self.sampler.keep(unfinished)
            logits = model.decode(tokens, cache)

    def generations(self, seconds: list[float]) -> list[Generation]:
        """The answers behind `steps`; seconds[n]: from the call to the batch's n-th token."""
        return [
            Generation(
                text=None if self.model.tokenizer is None else answer.text,
                tokens=answer.tokens,
                prompt_tokens=self.earlier + len(prompt),
                ttft_s=seconds[0],
                decode_s=seconds[max(len(answer.tokens) - 1, 0)] - seconds[0],
                finish_reason=answer.finish_reason,
            )
            for prompt, answer in zip(self.prompts, self.answers, strict=True)
        ]


def end_ids(model) -> frozenset[int]:
    """The tokens that end an answer: the checkpoint's, and those that end a turn in its chat format."""
    ids = set(model.config.eos_ids)
    if model.tokenizer is not None:
        with suppress(UnsupportedError):  # a model without a chat format
            ids.update(chat_format(model.tokenizer).end_ids)
    return frozenset(ids)


def is_batch(prompt) -> bool:
    """Whether a prompt is a list of prompts, rather than text or one list of token ids."""
    if isinstance(prompt, str):
        return False
    prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(prompt, Sequence):
        raise InputError(f"the prompt is a {type(prompt).__name__}; give text, token ids, or a list of either")
    if not prompt:
        raise InputError("the prompt is empty; give it at least one token")
    return isinstance(prompt[0], (str, Sequence)) or getattr(prompt[0], "ndim", 0) > 0


def check_finite(numbers: torch.Tensor, what: str) -> None:
    """Raise InputError where numbers that a model has computed are infinite or NaN."""
    if not numbers.isfinite().all():
        raise InputError(
            f"the {what} are not finite; load with dtype=torch.bfloat16 or torch.float32, and if that is so already, "
            "check the weights"
        )


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _check(name, value, kind, accepts, wanted):
    if isinstance(value, bool) or not isinstance(value, kind) or not accepts(value):
        raise InputError(f"{name} is {value!r}; it must be {wanted}")
