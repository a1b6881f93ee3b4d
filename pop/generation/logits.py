"""Rules that change a model's logits before a token is picked from them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

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
    3. Image placeholders and ids without text are never picked.

    No rule reads another row.
    """

    def __init__(self, model, params: SamplingParams, rows: list[list[int]]):
        self.params = params
        size = model.config.vocab_size
        never = {*model.vision.placeholders.values()}
        if model.tokenizer is not None:
            never.update(model.tokenizer.unused_ids, range(model.tokenizer.vocab_size, size))  # of a padded embedding
        never = torch.tensor([token for token in never if token < size], dtype=torch.int64, device="cpu")
        (self.barred,) = to_device([never], model.device)
        self.used: Tensor | None = None  # [B, V] bool, which tokens a row has; only for repetition_penalty
        if params.repetition_penalty != 1:
            used = torch.zeros(len(rows), size, dtype=torch.bool, device="cpu")
            for row, tokens in enumerate(rows):
                used[row, tokens] = True
            self.used = used.to(model.device, non_blocking=True)

    def keep_rows(self, rows: Tensor) -> None:
        """Continue with `rows` [R] of the batch; on its device."""
        if self.used is not None:
            self.used = self.used[rows]

    def took(self, tokens: Tensor) -> None:
        """Note the tokens [B] that were picked."""
        if self.used is not None:
            self.used = self.used.scatter(1, tokens.clamp(min=0)[:, None], True)

    def __call__(self, logits: Tensor, answers: Sequence[Answer]) -> Tensor:
        """The logits [B, V] of these answers, which stay as they are -> logits [B, V] by the rules."""
        process = self.params.logits_processor
        if self.used is not None:
            penalty = float(self.params.repetition_penalty)
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self.used, penalised, logits)
        if process is not None:
            check_finite(logits.amax(-1), "logits")
            pairs = zip(logits, answers, strict=True)
            logits = torch.stack([_processed(process, row.clone(), answer) for row, answer in pairs])
        if len(self.barred):
            logits = logits.index_fill(-1, self.barred, -math.inf)
        if process is not None and not logits.amax(-1).isfinite().all():
            raise InputError(
                "logits_processor returned logits whose largest is not finite; "
                "it must leave a token that may be picked, and no infinite or NaN logit"
            )
        return logits


def _processed(process, logits: Tensor, answer: Answer) -> Tensor:
    """What the caller's function makes of the logits [V] of one row."""
    out = process(list(answer.tokens), logits)
    if not isinstance(out, Tensor) or out.shape != logits.shape or not out.is_floating_point():
        found = f"{out.dtype} {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise InputError(f"logits_processor returned {found}; it must return logits, floats of shape {[len(logits)]}")
    return out.to(logits)
