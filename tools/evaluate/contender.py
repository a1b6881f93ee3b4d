"""A contender is a model and how it reads a prompt. tools/evaluate compares contenders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

import pop
from pop import engine
from pop.generation.sampling import check_finite
from pop.pruning.cost import prefill_flops


@dataclasses.dataclass
class Contender:
    """A model together with a way of reading a prompt. Here, the way is a pruning plan.

    Args:
        name: the name of its row in a table.
        model: the model.
        plan: the plan for prompts. PrunePlan.none() reads them at full depth.
        method: the name of its line in a plot.
    """

    name: str
    model: pop.Model
    plan: pop.PrunePlan
    method: str = ""

    def prefill(self, tokens: list[int], cache: pop.KVCache) -> torch.Tensor:
        """Fill an empty cache of one row with a prompt. Returns the logits [V] of the first new token."""
        return self.model.prefill([tokens], cache, plan=self.plan)[0]

    def extend(self, tokens: list[int], cache: pop.KVCache) -> torch.Tensor:
        """Append tokens [T] at full depth, as decode would. Returns the logits [T, V] of the token after each."""
        return engine.extend(self.model.module, torch.tensor([tokens], device=self.model.device), cache)[0]

    @property
    def is_own(self) -> bool:
        """Whether a subclass reads prompts in its own way, one at a time."""
        kind = type(self)
        return kind.prefill is not Contender.prefill or kind.extend is not Contender.extend

    def flops(self, num_tokens: int) -> int | None:
        """The FLOPs of a prefill, counted from shapes. None if pop/pruning/cost.py cannot count them."""
        if self.is_own:
            return None
        return prefill_flops(self.model.config, num_tokens, self.plan)

    def new_cache(self, batch_size: int, max_seq_len: int) -> pop.KVCache:
        """An empty cache for `prefill` and `extend`."""
        return self.model.new_cache(batch_size, max_seq_len)

    def logits(self, prompt: list[int], continuation: list[int]) -> torch.Tensor:
        """Prefill `prompt`, then append `continuation` [C]. Returns the logits [C, V] that predict its tokens.

        Raises InputError if they overflow, as `generate` does.
        """
        cache = self.new_cache(1, len(prompt) + len(continuation) - 1)
        logits = self.prefill(prompt, cache)[None]  # [1, V]
        if len(continuation) > 1:
            logits = torch.cat((logits, self.extend(continuation[:-1], cache)))
        return finite(logits)

    def batch_logits(self, prompts: list[list[int]], continuations: list[list[int]]) -> list[torch.Tensor]:
        """`logits` of several prompts and their continuations, as one batch where that is possible."""
        if self.is_own:
            return [self.logits(*pair) for pair in zip(prompts, continuations, strict=True)]
        lengths = [len(prompt) for prompt in prompts]
        longest = max(len(tokens) for tokens in continuations)
        cache = self.new_cache(len(prompts), max(lengths) + longest - 1)
        logits = self.model.prefill(_padded(prompts), cache, lengths=lengths, plan=self.plan)[:, None]  # [B, 1, V]
        if longest > 1:
            # Rows are padded on the right: under a causal mask, padding changes nothing before it.
            tokens = torch.tensor(_padded([tokens[:-1] for tokens in continuations]), device=self.model.device)
            logits = torch.cat((logits, engine.extend(self.model.module, tokens, cache)), dim=1)
        return [finite(row[: len(tokens)]) for row, tokens in zip(logits, continuations, strict=True)]

    def generate(self, prompt: list[int], count: int, until: Callable[[list[int]], bool] | None = None) -> list[int]:
        """The greedy answer.

        It ends after `count` tokens, after an end token, or as soon as `until(tokens)` is true.
        """
        tokenizer = self.model.tokenizer
        known = None if tokenizer is None else tokenizer.vocab_size  # the embedding may be padded beyond it
        cache = self.new_cache(1, len(prompt) + count - 1)
        logits = self.prefill(prompt, cache)  # [V]
        tokens = []
        while True:
            token = int(finite(logits)[:known].argmax())
            tokens.append(token)
            is_end = token in self.model.config.eos_ids
            if len(tokens) == count or is_end or (until and until(tokens)):
                return tokens
            logits = self.extend([token], cache)[0]


class OneByOne(Contender):
    """A contender with its own `prefill`, and `extend` if need be, for one row. They write position p to slot p."""

    def new_cache(self, batch_size: int, max_seq_len: int) -> pop.KVCache:
        """An empty cache that has a slot for each position, even in layers with a sliding window."""
        model = self.model
        model.check_fits(max_seq_len, "a row of the cache")
        options = {"dtype": model.dtype, "device": model.device, "chunk_size": max_seq_len}
        return pop.KVCache(model.module.config, batch_size, max_seq_len, **options)


def _padded(rows: list[list[int]]) -> list[list[int]]:
    longest = max(map(len, rows))
    return [row + [0] * (longest - len(row)) for row in rows]


def finite(logits: torch.Tensor) -> torch.Tensor:
    """Return logits [..., V]. Raise InputError if the largest of a row is infinite or NaN, as `model.generate` does."""
    check_finite(logits.amax(-1), "logits")
    return logits
