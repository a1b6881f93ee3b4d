"""Conversations: each turn runs its own prompt and continues from the cache. README.md in this folder has the rules."""

from __future__ import annotations

import copy
import time
from typing import NamedTuple

from typing_extensions import Unpack

from pop.engine.cache import KVCache
from pop.errors import InputError
from pop.generation.answers import Generation
from pop.generation.batch import Batch, Stream
from pop.generation.sampling import Options, sampling_params
from pop.inputs.processors import Prepared


class State(NamedTuple):
    """What a finished turn replaces, all together."""

    messages: list[dict]  # as `model.chat` takes them, with those before the first turn
    tokens: list[int]  # the ids of all prompts and answers, in order
    cache: KVCache | None  # holds these tokens, except for the last of a truncated answer


class Conversation:
    """A conversation with an instruct model, made by `model.start_chat`.

    A turn works on a copy of the cache. If it fails, or Ctrl-C stops it, or nobody reads its stream to the end, the
    conversation stays as it was. Only one thread at a time may use a conversation.

    Args:
        model: A pop.Model.
        earlier: Messages before the first turn, as `Model.chat` takes them. The first turn prefills them.
        enable_thinking, plan: As in `Model.start_chat`.
    """

    def __init__(self, model, earlier: list[dict], *, enable_thinking: bool = True, plan=None):
        self.model = model
        self.plan = model.resolve(plan)
        self.enable_thinking = enable_thinking
        self._format = model.chat_format()
        self._state = State(earlier, [], None)
        self._prompt("Hello")  # an error in the earlier messages shows now
        self._state = State(copy.deepcopy(earlier), [], None)
        if earlier and earlier[-1].get("role") == "user":
            raise InputError("the last of messages has the role user; leave it out, and give it to `send`")

    def __copy__(self):
        """Refused: a turn of either would give away the cache of both."""
        raise InputError("a conversation cannot be copied; model.start_chat(messages=chat.messages) begins another one")

    @property
    def messages(self) -> list[dict]:
        """The conversation as `model.chat` takes it."""
        return copy.deepcopy(self._state.messages)

    @property
    def tokens(self) -> list[int]:
        """The token ids of all prompts and answers, in order."""
        return list(self._state.tokens)

    def send(self, message, **options: Unpack[Options]) -> Generation:
        """Answer one more message.

        Args:
            message: Text, or a list of parts as in `Model.chat`.
            options: Those of `Model.generate`, whose errors are raised. The plan is the conversation's.
        """
        return self._next_turn(message, options).generate()

    def stream(self, message, **options: Unpack[Options]) -> Stream:
        """Like `send`, but yields pieces, as `Model.stream`. The turn counts once the last one has been read."""
        return self._next_turn(message, options).stream()

    def _prompt(self, content) -> tuple[list[int], list[Prepared]]:
        """The ids of the next turn's prompt, and the images and videos that it shows."""
        if self._state.tokens:
            system = [message for message in self._state.messages[:1] if message["role"] == "system"]
            return self._format.next_prompt(content, self.enable_thinking, system)
        messages = [*self._state.messages, {"role": "user", "content": content}]
        return self._format.prompt(messages, enable_thinking=self.enable_thinking)

    def _next_turn(self, content, options: dict) -> Batch:
        """Check everything. Returns a batch that adds its turn to the conversation when its answer ends."""
        began = time.perf_counter()
        params = sampling_params(options, self.model.sampling)
        if isinstance(content, list):  # of parts, which the caller may change later
            content = [copy.copy(part) for part in content]
        prompt, media = self._prompt(content)
        state = self._state

        def after_step(batch: Batch) -> None:
            if self._state is not state:
                raise InputError("the conversation got another turn during this answer; send the message again")
            (answer,) = batch.answers
            if answer.finish_reason:
                said = {"role": "assistant", "content": self._format.opening + answer.text}
                messages = [*state.messages, {"role": "user", "content": content}, said]
                self._state = State(messages, state.tokens + prompt + answer.tokens, batch.take_cache())
                if state.cache is not None:
                    self.model.caches.give(state.cache)

        return Batch(
            self.model,
            [prompt],
            [media],
            params,
            self.plan,
            began,
            earlier=state.cache,
            earlier_tokens=state.tokens,
            after_step=after_step,
        )
