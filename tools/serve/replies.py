"""The answers of the OpenAI protocol: from events to their JSON, whole or in chunks, and the objects of errors."""

from __future__ import annotations

import json
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncIterator

import torch

import pop
from pop.errors import CacheMemoryError, ContextOverflow, InputError, MissingExtra
from pop.inputs.chat import end_of_thoughts
from tools.serve.requests import CHAT, TEXT, Asked, Wrong
from tools.serve.rows import Busy, Event

TAG = "<tool_call>"  # begins a call, unless the whole answer is one
NO_MEMORY = "can't allocate memory"  # in torch's RuntimeError of a CPU


def whole(asked: Asked, events: list[Event]) -> dict:
    """The object of a finished answer."""
    by_index = defaultdict(list)
    for event in events:
        by_index[event.index].append(event)
    choices = []
    for job in asked.jobs:
        found = by_index[job.index]
        choices.append(_choice(asked, found, *split_calls(asked, "".join(event.text for event in found))))
    return _named(asked, "chat.completion") | {"choices": choices, "usage": usage_of(asked)}


async def chunks_of(asked: Asked, events: AsyncIterator[Event]) -> AsyncIterator[dict]:
    """The objects of a stream. Beside tools, text that may belong to a call waits until the answer shows it."""
    named = _named(asked, "chat.completion.chunk")
    streams: dict[int, Streamed] = {}
    held: dict[int, list[Event]] = defaultdict(list)  # the events of each answer since its last chunk
    async for event in events:
        if asked.is_chat and event.index not in streams:
            begins = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            yield named | {"choices": [{"index": event.index, **begins}]}
        answer = streams.setdefault(event.index, Streamed(asked))
        text = answer.more(event)
        functions = []
        held[event.index].append(event)
        if event.finish_reason:
            rest, functions = answer.rest()
            text += rest
        if event.finish_reason or text or not asked.has_tools:
            yield named | {"choices": [_choice(asked, held.pop(event.index), text, functions, streamed=True)]}
    if asked.include_usage:
        yield named | {"choices": [], "usage": usage_of(asked)}


class Streamed:
    """An answer in a stream, and how much of its text the client has."""

    def __init__(self, asked: Asked):
        self.asked = asked
        self.text = ""  # of all events, if there are tools
        self.sent = 0  # characters of it

    def more(self, event: Event) -> str:
        """The text that can be sent now: with tools, only what can belong to no call."""
        if not self.asked.has_tools:
            return event.text
        self.text += event.text
        begin = self.sent
        self.sent = before_calls(self.text)
        return self.text[begin : self.sent]

    def rest(self) -> tuple[str, list[dict]]:
        """What is left of the finished answer: text, and its tool calls."""
        before, functions = split_calls(self.asked, self.text)
        return before[self.sent :], functions


def before_calls(text: str) -> int:
    """How many characters of an answer in progress belong to no tool call, however it goes on."""
    begin = end_of_thoughts(text)
    said = text[begin:]
    if said.lstrip()[:1] in ("", "{"):  # the whole answer may be a call
        return begin
    before, is_tagged, _ = said.partition(TAG)
    if not is_tagged:
        begun = next(length for length in range(len(TAG) - 1, -1, -1) if before.endswith(TAG[:length]))
        before = before[: len(before) - begun]
    return begin + len(before.rstrip())


def _named(asked: Asked, kind: str) -> dict:
    """What an answer's object, or all chunks of one, begin with."""
    kind, prefix = (kind, "chatcmpl") if asked.is_chat else ("text_completion", "cmpl")
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": asked.name}


def usage_of(asked: Asked) -> dict:
    prompts = asked.jobs[:: asked.answers]
    prompt = sum(len(job.tokens) for job in prompts)
    answer = sum(job.answer_tokens for job in asked.jobs)
    begun = [job.first_token_at for job in asked.jobs if job.first_token_at is not None]
    details = {
        "cached_tokens": sum(job.cached_tokens for job in prompts),
        "pruned_tokens": sum(job.pruned_tokens for job in prompts),
    }
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": details,
        "time_to_first_token": round(min(begun) - asked.began, 6) if begun else None,
    }


def _choice(asked: Asked, events: list[Event], text: str, functions: list[dict], streamed: bool = False) -> dict:
    """What some events of an answer have brought: a text, and calls of functions."""
    reason = events[-1].finish_reason
    entries = [event.logprobs for event in events if event.logprobs]
    logprobs = _logprobs(asked, entries) if entries else None
    if not asked.is_chat:
        return {"index": events[0].index, "text": text, "logprobs": logprobs, "finish_reason": reason}
    message = ({} if streamed else {"role": "assistant"}) | {"content": text}
    if functions:
        calls = []
        for index, function in enumerate(functions):
            named = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
            calls.append(({"index": index} if streamed else {}) | named)
        message = message | {"content": text or None, "tool_calls": calls}
        reason = "tool_calls"
    named = {"delta" if streamed else "message": message}
    return {"index": events[0].index, **named, "logprobs": logprobs, "finish_reason": reason}


def split_calls(asked: Asked, text: str) -> tuple[str, list[dict]]:
    """The text before the tool calls of a finished answer, and the calls as "name" and "arguments"."""
    try:
        calls = asked.model.parse_tool_calls(text) if asked.has_tools else []
    except InputError:  # it begins like a call and is broken
        calls = []
    if not calls:
        return text, []
    if asked.body.get("parallel_tool_calls") is False:
        calls = calls[:1]
    end = end_of_thoughts(text)
    said, _, rest = text[end:].partition(TAG)
    is_tagged = "</tool_call>" in rest  # otherwise the whole answer is a call
    before = (text[:end] + (said if is_tagged else "")).rstrip()
    return before, [call["function"] | {"arguments": json.dumps(call["function"]["arguments"])} for call in calls]


def _logprobs(asked: Asked, entries: list[list[tuple[int, float]]]) -> dict:
    """Log-probabilities: of each token, and of the likeliest ones in its place."""
    tokenizer = asked.model.tokenizer

    def named(token: int, logprob: float) -> dict:
        try:
            text = tokenizer.decode([token], special=True)
            spelt = list(tokenizer.token_bytes(token))
        except InputError:  # the model has more embeddings than the tokenizer has tokens
            text, spelt = f"<{token}>", []
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": spelt}

    tokens = [[named(*pair) for pair in pairs] for pairs in entries]
    if asked.is_chat:
        return {"content": [own | {"top_logprobs": top} for own, *top in tokens]}
    return {
        "tokens": [own["token"] for own, *_ in tokens],
        "token_logprobs": [own["logprob"] for own, *_ in tokens],
        "top_logprobs": [{one["token"]: one["logprob"] for one in top} for _, *top in tokens],
    }


def error_object(error: Exception) -> tuple[int, dict]:
    """The status and the object of an error. The client learns nothing about unexpected errors."""
    status = 500
    code = None
    param = None
    message = "the server failed; its log says why"
    if isinstance(error, Wrong):
        status = error.status
        code = error.code
        param = error.param
        message = str(error)
    elif isinstance(error, Busy):
        status, code, message = 429, "queue_full", "the queue is full; try again later"
    elif isinstance(error, CacheMemoryError):
        status = 503
        message = str(error)
    elif isinstance(error, torch.OutOfMemoryError) or NO_MEMORY in str(error):  # by the activations of a prefill
        status, message = 503, "the server's memory does not suffice for this request; shorten it"
    elif isinstance(error, MissingExtra):
        status = 501
        message = str(error)
    elif isinstance(error, pop.PopError):
        status = 400
        message = str(error)
        first = message.partition(" ")[0]
        param = first if first in CHAT | TEXT else None  # the library's messages begin with the argument
        code = "context_length_exceeded" if isinstance(error, ContextOverflow) else None
    if status >= 500:
        kind = "server_error"
    elif status == 429:
        kind = "rate_limit_error"
    else:
        kind = "invalid_request_error"
    return status, {"error": {"message": message[:500], "type": kind, "param": param, "code": code}}
