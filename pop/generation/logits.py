"""Rules that change a model's logits before a token is picked from them."""

import math
from collections.abc import Sequence

import torch

from pop.errors import InputError
from pop.generation.answers import Answer
from pop.generation.sampling import SamplingParams, check_finite
from pop.system.memory import to_device


class LogitsRules:
    """Applies a batch's rules to its logits [B, V], on their device and without waiting for it:

    1. `repetition_penalty` lowers the logits of the row's earlier tokens: those of its prompt, with a prefix or earlier
       turns, and those of its answer.
    2. `logits_processor(tokens, logits)` gets the answer's tokens so far, without the prompt, and its logits [V], which
       it may change. It returns logits [V]. The rows call it one after another, and it waits for the device.
    3. Image placeholders and ids without text are never picked, and end tokens not before `min_new_tokens`.

    No rule reads another row.
    """

    def __init__(self, model, params: SamplingParams, rows: list[list[int]], ends: frozenset[int]):
        self.params, self.rows, self.device = params, rows, model.device
        V, tokenizer = model.config.vocab_size, model.tokenizer
        self.known = V if tokenizer is None else min(V, tokenizer.vocab_size)  # the embedding may be padded beyond
        never = [*model.vision.placeholders.values(), *(tokenizer.unused_ids if tokenizer else ())]
        self.barred = [[token for token in ids if token < self.known] for ids in (never, [*never, *ends])]
        self.barred = to_device([torch.tensor(ids, dtype=torch.int64) for ids in self.barred], self.device)
        self.used = None  # bool [B, V], which tokens a row has; only for repetition_penalty
        self.count = 0  # tokens that each answer has

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Continue with `rows` [R] of the batch; on its device."""
        self.used = None if self.used is None else self.used[rows]

    def took(self, tokens: torch.Tensor) -> None:
        """Note the tokens [B] that were picked."""
        self.count += 1
        if self.used is not None:
            self.used = self.used.scatter(1, tokens.clamp(min=0)[:, None], True)

    def __call__(self, logits: torch.Tensor, answers: Sequence[Answer]) -> torch.Tensor:
        """The logits [B, V] of these answers, which stay as they are -> logits [B, V'] of the tokenizer's ids."""
        penalty, process = float(self.params.repetition_penalty), self.params.logits_processor
        if penalty != 1:
            if self.used is None:
                places = [(row, token) for row, tokens in enumerate(self.rows) for token in tokens]
                (at,) = to_device([torch.tensor(places).T], logits.device)  # [2, all tokens]
                self.used = torch.zeros_like(logits, dtype=torch.bool)
                self.used.index_put_(tuple(at), self.used.new_ones(()))
            logits = torch.where(self.used, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        if process is not None:
            check_finite(logits.amax(-1), "logits")
            pairs = zip(logits, answers, strict=True)
            logits = torch.stack([_processed(process, row.clone(), answer) for row, answer in pairs])
        barred = self.barred[self.count < self.params.min_new_tokens]
        if len(barred):
            logits = logits.index_fill(-1, barred, -math.inf)
        logits = logits[:, : self.known]
        if process is not None and not logits.amax(-1).isfinite().all():
            wanted = "it must leave a token that may be picked, and no infinite or NaN logit"
            raise InputError(f"logits_processor returned logits whose largest is not finite; {wanted}")
        return logits


def _processed(process, logits: torch.Tensor, answer: Answer) -> torch.Tensor:
    """What the caller's function makes of the logits [V] of one row."""
    out = process(list(answer.tokens), logits)
    if not isinstance(out, torch.Tensor) or out.shape != logits.shape or not out.is_floating_point():
        found = f"{out.dtype} {list(out.shape)}" if isinstance(out, torch.Tensor) else type(out).__name__
        raise InputError(f"logits_processor returned {found}; it must return logits, floats of shape {[len(logits)]}")
    return out.to(logits)
