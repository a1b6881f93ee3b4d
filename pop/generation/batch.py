"""A batch of prompts: prefilled together, then decoded until the last row has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import torch

from pop import engine
from pop.engine.cache import KVCache
from pop.errors import InputError
from pop.generation.answers import Answer, Generation, end_ids
from pop.generation.logits import LogitsRules
from pop.generation.sampling import Sampler, SamplingParams, read_tokens
from pop.inputs.processors import Prepared
from pop.inputs.tokenizers import token_ids
from pop.pruning.plan import PrunePlan
from pop.system.memory import to_device


class Batch:
    """Prompts of different lengths, and their answers."""

    def __init__(
        self,
        model,
        prompts: list[list[int]],
        media: list[list[Prepared]],  # the images and videos of each prompt
        params: SamplingParams,
        *,
        plan: PrunePlan | None = None,
        is_list: bool = False,  # whether `generate` returns a list
        earlier: KVCache | None = None,  # a cache of one row, which all prompts continue and none changes
        earlier_tokens: Sequence[int] = (),  # what all prompts continue: the cache's tokens, and some that never ran
        after_step: Callable[[Batch], None] = lambda batch: None,  # called after each token of the batch
    ):
        self.model, self.prompts, self.media, self.plan = model, prompts, media, model.resolve(plan)
        self.is_list, self.earlier, self.earlier_tokens, self.after_step = is_list, earlier, earlier_tokens, after_step
        if params.stop:
            model.need_tokenizer("stop")
        ends = end_ids(model)
        if params.stop_token_ids:
            ends |= {*token_ids(list(params.stop_token_ids), 1, model.config.vocab_size).tolist()}
        seeds = params.seeds(len(prompts))
        if model.part is not None:  # several processes must continue with the same tokens
            seeds = model.part.agree(seeds, model.device)
        self.sampler = Sampler(params, seeds)
        self.rules = LogitsRules(model, params, [[*earlier_tokens, *prompt] for prompt in prompts], ends)
        self.logprobs = params.logprobs
        self.num_earlier = len(earlier_tokens)
        longest, row = max((len(prompt), row) for row, prompt in enumerate(prompts))
        note = f" ({longest} tokens after {self.num_earlier} earlier ones)" if self.num_earlier else ""
        model.check_fits(self.num_earlier + longest, f"the prompt{note}", media[row])
        # A full context ends an answer. Its last token is sampled but never run, so it needs no slot.
        left = model.max_seq_len + 1 - self.num_earlier
        limits = [min(params.max_new_tokens, left - len(prompt)) for prompt in prompts]
        self.max_seq_len = self.num_earlier - 1 + max(len(p) + limit for p, limit in zip(prompts, limits, strict=True))
        self.answers = [Answer(model.tokenizer, ends, params.stop, limit) for limit in limits]
        self.cache: KVCache | None = None  # made by `prefill`
        self.times: list[float] = []  # when each token of the batch was there, by time.perf_counter()

    def generate(self, began: float) -> Generation | list[Generation]:
        """Generate all answers. Seconds count from `began`, a time.perf_counter()."""
        for _ in self.steps():
            pass
        generations = [self.generation(row, began) for row in range(len(self.answers))]
        return generations if self.is_list else generations[0]

    def generation(self, row: int, began: float) -> Generation:
        """The finished answer of a row."""
        answer = self.answers[row]
        return Generation(
            text=None if self.model.tokenizer is None else answer.text,
            tokens=answer.tokens,
            prompt_tokens=self.num_earlier + len(self.prompts[row]),
            ttft_s=self.times[0] - began,
            decode_s=self.times[max(len(answer.tokens) - 1, 0)] - self.times[0],
            finish_reason=answer.finish_reason,
            logprobs=answer.logprobs if self.logprobs else None,
        )

    def stream(self, began: float) -> Stream:
        """Generate the only answer in pieces of whole characters, as they come."""
        self.model.need_tokenizer("stream")
        if self.is_list:
            raise InputError("stream takes one prompt; use generate for a batch, or one stream for each prompt")
        return Stream(self, began)

    def steps(self) -> Iterator[list[str]]:
        """Generate. After each token of the batch, yield the text that the token has settled in each row."""
        with suppress(GeneratorExit):  # of a stream that nobody reads to its end
            yield from self._steps()
        if self.cache is not None:  # not after an error, which may leave it with fewer rows in some layers
            self.model.caches.give(self.take_cache())

    def take_cache(self) -> KVCache:
        """The cache, which the caller keeps from now on."""
        cache, self.cache = self.cache, None
        return cache

    def _steps(self) -> Iterator[list[str]]:
        logits = self.prefill()
        rows = list(range(len(self.answers)))  # the answer that each row of the cache belongs to
        while True:
            tokens = self.sampler(self.rules(logits, [self.answers[row] for row in rows]))
            self.rules.took(tokens)
            pieces = [""] * len(self.answers)
            ended = [number for number, row in enumerate(rows) if self.answers[row].finish_reason]
            picked = read_tokens(tokens, ended)  # the only wait for the device
            self.times.append(time.perf_counter())
            logprobs = [None] * len(rows)
            if self.logprobs:
                logprobs = (logits.gather(-1, tokens.clamp(min=0)[:, None])[:, 0] - logits.logsumexp(-1)).tolist()
            for row, token, logprob in zip(rows, picked, logprobs, strict=True):
                pieces[row] = self.answers[row].push(token, logprob)
            self.after_step(self)
            yield pieces
            unfinished = [number for number, row in enumerate(rows) if not self.answers[row].finish_reason]
            if not unfinished:
                return
            is_full = bool((self.cache.lengths >= self.max_seq_len).any())  # the cache may have more room
            # The finished rows leave the batch. A captured step stays while more than half of its rows are unfinished,
            # unless the caller's function would get finished answers.
            is_captured = bool(self.model.caches.kept) and self.cache.step is not None
            stay = is_captured and 2 * len(unfinished) > len(rows) and not is_full
            if len(unfinished) < len(rows) and not (stay and self.rules.params.logits_processor is None):
                kept = torch.tensor(unfinished)
                rows = [rows[number] for number in unfinished]
                (kept_there,) = to_device([kept], tokens.device)
                tokens = tokens[kept_there]
                self.cache.keep_rows(kept)
                self.sampler.keep_rows(unfinished)
                self.rules.keep_rows(kept_there)
            # Like model.decode, without its checks of the arguments, and of the module for changes since the prefill.
            stages = self.model._stages(len(rows), look=False)
            tokens = tokens.clamp(min=0)  # a finished row may have -1
            logits = engine.decode(self.model.module, tokens, self.cache, stages)

    def prefill(self) -> torch.Tensor:
        """Make the cache and fill it with the prompts. Returns the logits [B, V] of each prompt's boundary token."""
        B, lengths = len(self.prompts), [len(prompt) for prompt in self.prompts]
        self.cache = self.model.caches.take(self.model, B, self.max_seq_len)
        if self.earlier is not None:
            self.cache.copy_from(self.earlier)
        # The last token of a truncated answer was sampled but never run, so it is not in the cache.
        if leading := self.earlier_tokens[0 if self.earlier is None else int(self.earlier.lengths[0]) :]:
            self.model.prefill([leading] * B, self.cache, plan=PrunePlan.none())
        options = {"lengths": lengths, "images": self.media, "plan": self.plan}
        return self.model.prefill(padded(self.prompts), self.cache, **options)


class Stream(Iterator[str]):
    """The pieces of an answer, as they come. `generation` is the finished answer, from the last piece on."""

    def __init__(self, batch: Batch, began: float):
        self.generation: Generation | None = None
        self._batch, self._began, self._steps = batch, began, batch.steps()

    def __next__(self) -> str:
        for (piece,) in self._steps:
            if self._batch.answers[0].finish_reason:
                self.generation = self._batch.generation(0, self._began)
            if piece:
                return piece
        raise StopIteration

    def close(self) -> None:
        """End the answer here."""
        self._steps.close()


def padded(rows: list[list[int]]) -> list[list[int]]:
    """The rows, padded with zeros on the right."""
    longest = max(map(len, rows))
    return [row + [0] * (longest - len(row)) for row in rows]


def as_prompts(prompt, what: str = "prompt") -> tuple[list, bool]:
    """The prompts that a caller has given, and whether it was a list of prompts rather than one. `what` names them."""
    prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(prompt, Sequence):
        raise InputError(f"the {what} is a {type(prompt).__name__}; give text, token ids, or a list of either")
    first = None if isinstance(prompt, str) or not prompt else prompt[0]
    is_list = isinstance(first, Sequence) or getattr(first, "ndim", 0) > 0
    return (prompt if is_list else [prompt]), is_list
