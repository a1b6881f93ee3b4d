"""One row's answer: `Answer` while it grows, `Generation` when it has ended."""

import dataclasses
from codecs import getincrementaldecoder
from collections.abc import Sequence
from contextlib import suppress

import torch

from pop.errors import PopError
from pop.inputs.chat import split_thoughts


@dataclasses.dataclass(frozen=True)
class Generation:
    """The model's answer to one prompt."""

    text: str  # without end tokens and the stop string; empty without a tokenizer
    tokens: list[int]  # the generated ids, without the end token
    prompt_tokens: int  # the length of the prompt, including a prefix or earlier turns
    ttft_s: float  # seconds from the call to the batch's first token, including tokenization
    decode_s: float  # seconds from the first token to the last
    # "stop": an end token or a stop string; "length": max_new_tokens or a full context; "cancelled": a closed stream
    finish_reason: str
    logprobs: list[float] | None = None  # log p of each token by the model's own softmax(logits), with logprobs=True
    pruned_tokens: int = 0  # of the prompt, those that this call ran without the plan's layers (plan.num_pruned)

    @property
    def thoughts(self) -> str:
        """What the model wrote before </think>, or all of it after <think> if it was cut there; "" without thoughts."""
        return split_thoughts(self.text)[0]

    @property
    def answer(self) -> str:
        """The text after the thoughts."""
        return split_thoughts(self.text)[1]


class Answer:
    """An answer that grows: tokens come in, and text comes out as soon as no later token can change it."""

    def __init__(self, tokenizer, end_ids: frozenset[int], stop: Sequence[str], max_new_tokens: int, seed: int):
        self.end_ids = end_ids
        self.stop = stop
        self.max_new_tokens = max_new_tokens
        self.generator = torch.Generator().manual_seed(seed)  # of the numbers by which its tokens are drawn
        self.tokenizer = tokenizer  # None: the answer is token ids only
        self.decoder = getincrementaldecoder("utf-8")("replace")  # holds back incomplete characters
        self.tokens: list[int] = []
        self.logprobs: list[float | None] = []
        self.text = ""  # settled: no later token changes it
        self.pending = ""  # may still turn out to be the beginning of a stop string
        self.finish_reason: str | None = None

    def push(self, token: int, logprob: float | None = None) -> str:
        """Take the next token, and return the text that it settles. A finished answer takes nothing more."""
        if self.finish_reason:
            return ""
        data = b""
        if token in self.end_ids:
            self.finish_reason = "stop"
        else:
            self.tokens.append(token)
            self.logprobs.append(logprob)
            if len(self.tokens) == self.max_new_tokens:
                self.finish_reason = "length"
            if self.tokenizer is not None:
                data = self.tokenizer.token_bytes(token)
        self.pending += self.decoder.decode(data, self.finish_reason is not None)
        # Where each stop string begins, and its length.
        found = sorted((self.pending.find(stop), len(stop)) for stop in self.stop if stop in self.pending)
        if found:
            settled, _ = min(found, key=sum)  # the one that ends first, and of several the first, so the longest
            self.finish_reason = "stop"
        else:
            settled = len(self.pending)
            if not self.finish_reason:  # hold back what may be the beginning of a stop string
                held = [
                    length
                    for stop in self.stop
                    for length in range(1, len(stop))
                    if self.pending.endswith(stop[:length])
                ]
                settled -= max(held, default=0)
        piece = self.pending[:settled]
        self.pending = self.pending[settled:]
        self.text += piece
        return piece


def end_ids(model) -> frozenset[int]:
    """The tokens that end an answer: the checkpoint's, and those that end a turn in its chat format."""
    ids = set(model.config.eos_ids)
    with suppress(PopError):  # the checkpoint lacks a tokenizer or a chat format
        ids.update(model.chat_format().end_ids)
    return frozenset(ids)
