"""One row's answer: `Answer` while it grows, `Generation` when it has ended."""

from __future__ import annotations

import codecs
import dataclasses
import math
from collections.abc import Sequence
from contextlib import suppress

from pop.errors import UnsupportedError
from pop.inputs.chat import chat_format


@dataclasses.dataclass(frozen=True)
class Generation:
    """The model's answer to one prompt.

    Attributes:
        text: the answer, without end tokens and without the stop string; None if the model has no tokenizer.
        tokens: the generated ids, without the end token.
        prompt_tokens: the length of the prompt, including a prefix or earlier turns.
        ttft_s: seconds from the call to the batch's first token, including tokenization.
        decode_s: seconds from the first token to the last.
        finish_reason: "stop" after an end token or a stop string; "length" after max_new_tokens or in a full context.
    """

    text: str | None
    tokens: list[int]
    prompt_tokens: int
    ttft_s: float
    decode_s: float
    finish_reason: str

    @property
    def tokens_per_s(self) -> float:
        """Decode speed after the first token; nan for an answer of fewer than two tokens."""
        return (len(self.tokens) - 1) / self.decode_s if len(self.tokens) > 1 else math.nan


class Answer:
    """An answer that grows: tokens come in, and text comes out as soon as no later token can change it.

    Without a tokenizer, the answer is token ids only. A token of `end_ids` or a string of `stop` ends it.
    """

    def __init__(self, tokenizer, end_ids: frozenset[int], stop: Sequence[str], max_new_tokens: int):
        self.end_ids, self.stop, self.max_new_tokens = end_ids, stop, max_new_tokens
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # holds back incomplete characters
        self.tokens: list[int] = []
        self.text = ""  # settled: no later token changes it
        self.pending = ""  # may still turn out to be the beginning of a stop string
        self.finish_reason: str | None = None

    def push(self, token: int) -> str:
        """Take the next token and return the text that it settles. A finished answer takes nothing more."""
        if self.finish_reason:
            return ""
        if token in self.end_ids:
            return self._finish("stop")
        self.tokens.append(token)
        piece = "" if self.tokenizer is None else self._settle(self.decoder.decode(self.tokenizer.token_bytes(token)))
        if len(self.tokens) == self.max_new_tokens and not self.finish_reason:
            piece += self._finish("length")
        return piece

    def _finish(self, reason: str) -> str:
        piece = self._settle(self.decoder.decode(b"", final=True))
        if not self.finish_reason:  # the flushed text may have completed a stop string
            piece += self.pending
            self.text += self.pending
            self.finish_reason = reason
        return piece

    def _settle(self, text: str) -> str:
        """Add text, and return what is settled now."""
        self.pending += text
        begins = [(self.pending.find(stop), stop) for stop in self.stop if stop in self.pending]
        if begins:  # take the stop string that ends first, and of several the longest
            _, begin = min((begin + len(stop), begin) for begin, stop in begins)
            piece, self.finish_reason = self.pending[:begin], "stop"
            self.pending = ""
        else:
            held_back = max((_overlap(self.pending, stop) for stop in self.stop), default=0)
            piece = self.pending[: len(self.pending) - held_back]
            self.pending = self.pending[len(piece) :]
        self.text += piece
        return piece


def end_ids(model) -> frozenset[int]:
    """The tokens that end an answer: the checkpoint's, and those that end a turn in its chat format."""
    ids = set(model.config.eos_ids)
    if model.tokenizer is not None:
        with suppress(UnsupportedError):  # the tokenizer lacks a chat format
            ids.update(chat_format(model.tokenizer).end_ids)
    return frozenset(ids)


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` could begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
