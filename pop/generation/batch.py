"""A batch of prompts: prefilled together, then decoded until the last row has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from pop.engine.cache import KVCache
from pop.engine.decode_step import DecodeStep
from pop.errors import InputError
from pop.generation.answers import Answer, Generation, end_ids
from pop.generation.logits import LogitsRules
from pop.generation.sampling import SamplingParams, read_tokens, sample_tokens
from pop.inputs.processors import Prepared
from pop.pruning.plan import PrunePlan
from pop.runner import FULL_DEPTH, padded
from pop.system.memory import to_device


@dataclass(eq=False, repr=False)
class Batch:
    """Prompts of different lengths, and their answers."""

    model: Any  # a pop.Model
    prompts: list[list[int]]  # the token ids of each prompt
    media: list[list[Prepared]]  # the images and videos of each prompt
    params: SamplingParams  # how all answers are sampled, and where they end
    plan: PrunePlan  # the resolved plan of the prompts
    began: float  # when the call began, by time.perf_counter(); the seconds of the answers count from it
    _: KW_ONLY
    is_list: bool = False  # whether `generate` returns a list
    earlier: KVCache | None = None  # a cache of one row, which all prompts continue and none changes
    # All tokens before the prompts: those in `earlier`, then any sampled token that has not run yet.
    earlier_tokens: Sequence[int] = ()
    after_step: Callable[[Batch], None] = lambda batch: None  # called after each token of the batch

    def __post_init__(self):
        model = self.model
        params = self.params
        self.earlier_tokens = list(self.earlier_tokens)
        if params.stop:
            model.need_tokenizer("stop")

        ends = end_ids(model)
        seeds = params.seeds(len(self.prompts))
        if model.part is not None:  # several processes must continue with the same tokens
            seeds = model.part.agree(seeds, model.device)
        self.rules = LogitsRules(model, params, [self.earlier_tokens + prompt for prompt in self.prompts])

        self.answers = [
            Answer(model.tokenizer, ends, params.stop, limit, seed)
            for limit, seed in zip(self._limits(), seeds, strict=True)
        ]
        # An answer's last token is sampled but never run, so it needs no slot.
        longest = max(map(len, self.prompts)) + int(params.max_new_tokens) - 1
        self.max_seq_len = min(model.max_seq_len, len(self.earlier_tokens) + longest)
        self.cache: KVCache | None = None  # made by `prefill`
        self.times: list[float] = []  # when each token of the batch was there, by time.perf_counter()

    def _limits(self) -> list[int]:
        """The most tokens of each answer: max_new_tokens, or fewer in a full context.

        Raises ContextOverflow if a prompt does not fit.
        """
        num_earlier = len(self.earlier_tokens)
        lengths = [*map(len, self.prompts)]
        longest = max(lengths)
        what = f"prompt {lengths.index(longest)}" if self.is_list else "the prompt"
        if num_earlier:
            what += f" ({longest} tokens after {num_earlier} earlier ones)"
        self.model.check_fits(num_earlier + longest, what)
        left = self.model.max_seq_len + 1 - num_earlier
        return [min(self.params.max_new_tokens, left - length) for length in lengths]

    def generate(self) -> Generation | list[Generation]:
        """Generate all answers."""
        for _ in self.steps():
            pass
        generations = [self.generation(row) for row in range(len(self.answers))]
        return generations if self.is_list else generations[0]

    def generation(self, row: int) -> Generation:
        """The finished answer of a row."""
        answer = self.answers[row]
        num_earlier = len(self.earlier_tokens)
        prompt_tokens = num_earlier + len(self.prompts[row])
        last = max(len(answer.tokens) - 1, 0)
        return Generation(
            text=answer.text,
            tokens=answer.tokens,
            prompt_tokens=prompt_tokens,
            ttft_s=self.times[0] - self.began,
            decode_s=self.times[last] - self.times[0],
            finish_reason=answer.finish_reason,
            logprobs=answer.logprobs if self.params.logprobs else None,
            pruned_tokens=self.plan.num_pruned(prompt_tokens, num_earlier),
        )

    def stream(self) -> Stream:
        """Generate the only answer in pieces of whole characters, as they come."""
        self.model.need_tokenizer("stream")
        if self.is_list:
            raise InputError("stream takes one prompt; use generate for a batch, or one stream for each prompt")
        return Stream(self)

    def steps(self) -> Iterator[list[str]]:
        """Generate. After each token of the batch, yield the text that the token has settled in each row."""
        with suppress(GeneratorExit):  # of a stream that nobody reads to its end
            yield from self._steps()
        if self.cache is not None:  # not after an error, which may leave it with fewer rows in some layers
            self.model.caches.give(self.take_cache())

    def take_cache(self) -> KVCache:
        """The cache, which the caller keeps from now on."""
        cache = self.cache
        self.cache = None
        return cache

    def _steps(self) -> Iterator[list[str]]:
        logits = self.prefill()  # [B, V]
        rows = list(range(len(self.answers)))  # the answer that each row of the cache belongs to
        while True:
            tokens, pieces = self._next_tokens(logits, rows)
            self.after_step(self)
            yield pieces
            unfinished = [number for number, row in enumerate(rows) if not self.answers[row].finish_reason]
            if not unfinished:
                return
            if len(unfinished) < len(rows) and not self._finished_rows_stay(len(unfinished), len(rows)):
                rows = [rows[number] for number in unfinished]
                tokens = self._keep_rows(unfinished, tokens)
            logits = self.model.decode_prepared(tokens, self.cache)

    def _next_tokens(self, logits: Tensor, rows: list[int]) -> tuple[Tensor, list[str]]:
        """Pick the next token of each row from logits [B, V], and give it to the row's answer.

        Returns the tokens [B] to run next, and the text that they settle, for each answer of the batch.
        """
        answers = [self.answers[row] for row in rows]
        generators = [answer.generator for answer in answers]
        tokens = sample_tokens(self.rules(logits, answers), self.params, generators)
        self.rules.took(tokens)
        finished = [number for number, answer in enumerate(answers) if answer.finish_reason]
        picked = read_tokens(tokens, unused=finished)  # the only wait for the device
        self.times.append(time.perf_counter())
        tokens = tokens.clamp(min=0)  # a finished row may have -1
        logprobs = [None] * len(rows)
        if self.params.logprobs:
            chosen = logits.gather(-1, tokens[:, None])[:, 0]  # [B]
            logprobs = (chosen - logits.logsumexp(-1)).tolist()
        pieces = [""] * len(self.answers)
        for row, token, logprob in zip(rows, picked, logprobs, strict=True):
            pieces[row] = self.answers[row].push(token, logprob)
        return tokens, pieces

    def _finished_rows_stay(self, num_unfinished: int, num_rows: int) -> bool:
        """Whether finished rows stay in the batch, so that a captured decode step serves on.

        They do while more than half of the rows are unfinished, unless the caller's function would get their logits.
        """
        is_captured = bool(self.model.caches.most) and DecodeStep in self.cache.passes
        is_full = (self.cache.lengths >= self.max_seq_len).any()  # the cache may have more room
        is_watched = self.params.logits_processor is not None
        return is_captured and not is_full and not is_watched and 2 * num_unfinished > num_rows

    def _keep_rows(self, numbers: list[int], tokens: Tensor) -> Tensor:
        """Continue with some rows of the cache only. Returns their tokens."""
        kept = torch.tensor(numbers, device="cpu")
        (kept_there,) = to_device([kept], tokens.device)
        self.cache.keep_rows(kept)
        self.rules.keep_rows(kept_there)
        return tokens[kept_there]

    def prefill(self) -> Tensor:
        """Make the cache and fill it with the prompts. Returns the logits [B, V] of each prompt's boundary token."""
        B = len(self.prompts)
        self.cache = self.model.caches.take(self.model, B, self.max_seq_len)
        held = 0
        if self.earlier is not None:
            self.cache.copy_from(self.earlier)
            held = int(self.earlier.lengths[0])
        # The last token of a truncated answer was sampled but never run, so it is not in the cache.
        left = self.earlier_tokens[held:]
        if left:
            tokens, lengths = padded([left] * B)
            self.model.prefill_prepared(tokens, self.cache, lengths, [()] * B, FULL_DEPTH)
        tokens, lengths = padded(self.prompts)
        return self.model.prefill_prepared(tokens, self.cache, lengths, self.media, self.plan)


class Stream(Iterator[str]):
    """The pieces of an answer, as they come. `generation` is the answer, from its end or from `close` on."""

    def __init__(self, batch: Batch):
        self.generation: Generation | None = None
        self._batch = batch
        self._steps = batch.steps()

    def __next__(self) -> str:
        for (piece,) in self._steps:
            if self._batch.answers[0].finish_reason:
                self.generation = self._batch.generation(0)
            if piece:
                return piece
        raise StopIteration

    def close(self) -> None:
        """End the answer here, for the reason "cancelled". Call it while no thread reads the stream."""
        self._steps.close()
        (answer,) = self._batch.answers
        if answer.tokens and not answer.finish_reason:
            answer.finish_reason = "cancelled"
            answer.text += answer.pending
            self.generation = self._batch.generation(0)


def as_prompts(prompt, what: str = "prompt") -> tuple[list, bool]:
    """The prompts that a caller has given, and whether it was a list of prompts rather than one. `what` names them."""
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence):
        raise InputError(f"the {what} has the type {type(prompt).__name__}; give text, token ids, or a list of either")
    if prompt and isinstance(prompt[0], dict):
        raise InputError(
            f"the {what} is a list of messages; model.chat, start_chat and prefix take these, and "
            "model.stream(model.chat_tokens(messages)) streams the answer"
        )
    if isinstance(prompt, str) or not prompt:
        return [prompt], False
    is_list = isinstance(prompt[0], Sequence) or getattr(prompt[0], "ndim", 0) > 0
    return (prompt if is_list else [prompt]), is_list
