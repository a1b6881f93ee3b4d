"""A batch of prompts: prefilled together, then decoded until the last row has ended."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import torch

from pop import engine
from pop.engine.cache import KVCache
from pop.errors import InputError
from pop.generation.answers import Answer, Generation, end_ids
from pop.generation.sampling import Sampler, SamplingParams, read_tokens
from pop.inputs.processors import Prepared
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
        leading: Sequence[int] = (),  # token ids that run at full depth before the prompts
        after_step: Callable[[Batch], None] = lambda batch: None,  # called after each token of the batch
    ):
        self.model, self.prompts, self.media, self.plan = model, prompts, media, model.resolve(plan)
        self.is_list, self.earlier, self.leading, self.after_step = is_list, earlier, list(leading), after_step
        if params.stop:
            model.need_tokenizer("stop")
        seeds = params.seeds(len(prompts))
        if model.part is not None:  # several processes must continue with the same tokens
            seeds = model.part.agree(seeds, model.device)
        self.sampler = Sampler(params, seeds)
        without_text = [*model.vision.placeholders.values(), *(model.tokenizer.unused_ids if model.tokenizer else ())]
        # The embedding may be padded beyond the tokenizer's vocabulary.
        self.known = model.config.vocab_size if model.tokenizer is None else model.tokenizer.vocab_size
        without_text = [token for token in without_text if token < min(self.known, model.config.vocab_size)]
        (self.without_text,) = to_device([torch.tensor(without_text, dtype=torch.int64)], model.device)
        self.num_earlier = len(leading) + (0 if earlier is None else int(earlier.lengths[0]))
        longest, row = max((len(prompt), row) for row, prompt in enumerate(prompts))
        note = f" ({longest} tokens after {self.num_earlier} earlier ones)" if self.num_earlier else ""
        model.check_fits(self.num_earlier + longest, f"the prompt{note}", media[row])
        # A full context ends an answer. Its last token is sampled but never run, so it needs no slot.
        left = model.max_seq_len + 1 - self.num_earlier
        limits = [min(params.max_new_tokens, left - len(prompt)) for prompt in prompts]
        self.max_seq_len = self.num_earlier - 1 + max(len(p) + limit for p, limit in zip(prompts, limits, strict=True))
        ends = end_ids(model)
        self.answers = [Answer(model.tokenizer, ends, params.stop, limit) for limit in limits]
        self.cache: KVCache | None = None  # made by `prefill`

    def generate(self, began: float) -> Generation | list[Generation]:
        """Generate all answers. Seconds count from `began`, a time.perf_counter()."""
        seconds = [time.perf_counter() - began for _ in self.steps()]
        generations = [
            Generation(
                text=None if self.model.tokenizer is None else answer.text,
                tokens=answer.tokens,
                prompt_tokens=self.num_earlier + len(prompt),
                ttft_s=seconds[0],
                decode_s=seconds[max(len(answer.tokens) - 1, 0)] - seconds[0],
                finish_reason=answer.finish_reason,
            )
            for prompt, answer in zip(self.prompts, self.answers, strict=True)
        ]
        return generations if self.is_list else generations[0]

    def stream(self) -> Iterator[str]:
        """Generate the only answer in pieces of whole characters, as they come."""
        self.model.need_tokenizer("stream")
        if self.is_list:
            raise InputError("stream takes one prompt; use generate for a batch, or one stream for each prompt")
        return (piece for (piece,) in self.steps() if piece)

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
            tokens = self._sample(logits)
            pieces = [""] * len(self.answers)
            for row, token in zip(rows, read_tokens(tokens), strict=True):  # the only wait for the device
                pieces[row] = self.answers[row].push(token)
            self.after_step(self)
            yield pieces
            unfinished = [number for number, row in enumerate(rows) if not self.answers[row].finish_reason]
            if not unfinished:
                return
            is_full = bool((self.cache.lengths >= self.max_seq_len).any())  # the cache may have more room
            # The finished rows leave the batch. A captured step stays as long as half of its rows are unfinished.
            if len(unfinished) < len(rows) and (self.cache.step is None or 2 * len(unfinished) <= len(rows) or is_full):
                kept = torch.tensor(unfinished)
                rows = [rows[number] for number in unfinished]
                tokens = tokens[to_device([kept], tokens.device)[0]]
                self.cache.keep_rows(kept)
                self.sampler.keep_rows(unfinished)
            # Like model.decode, without its checks of the arguments, and of the module for changes since the prefill.
            stages = self.model._stages(len(rows), look=False)
            logits = engine.decode(self.model.module, tokens, self.cache, stages)

    def prefill(self) -> torch.Tensor:
        """Make the cache and fill it with the prompts. Returns the logits [B, V] of each prompt's boundary token."""
        B, lengths = len(self.prompts), [len(prompt) for prompt in self.prompts]
        self.cache = self.model.caches.take(self.model, B, self.max_seq_len)
        if self.earlier is not None:
            self.cache.copy_from(self.earlier)
        if self.leading:
            self.model.prefill([self.leading] * B, self.cache, plan=PrunePlan.none())
        options = {"lengths": lengths, "images": self.media, "plan": self.plan}
        return self.model.prefill(padded(self.prompts), self.cache, **options)

    def _sample(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [B, V] -> tokens [B]. Never picks an image's placeholder, or an id without text."""
        if len(self.without_text):  # a copy: the caller's logits stay as they are
            logits = logits.index_fill(-1, self.without_text, -math.inf)
        return self.sampler(logits[:, : self.known])


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
