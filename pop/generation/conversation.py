"""Conversations: each turn runs its own prompt and continues from the cache. README.md in this folder has the rules."""

from __future__ import annotations

import copy
import dataclasses
import time

from pop.engine.cache import KVCache
from pop.errors import InputError
from pop.generation.answers import Generation
from pop.generation.batch import Batch, Stream
from pop.generation.sampling import sampling_params
from pop.inputs.processors import Prepared


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message and its answer."""

    user: str | list[dict]  # the message's content, as `model.chat` takes it
    assistant: str  # the answer's text
    prompt: list[int]  # the ids of the prompt, including the chat format's tokens
    answer: list[int]  # the ids of the answer, as they were generated


@dataclasses.dataclass(frozen=True)
class State:
    """The turns so far, and the cache that holds them. A finished turn replaces both together."""

    turns: tuple[Turn, ...] = ()
    cache: KVCache | None = None


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
        self._state = State()
        self._earlier = earlier
        self._prompt("Hello")  # an error in the earlier messages shows now
        self._earlier = _separate(earlier)
        if earlier and earlier[-1].get("role") == "user":
            raise InputError("the last of messages has the role user; leave it out, and give it to `send`")

    @property
    def turns(self) -> tuple[Turn, ...]:
        return self._state.turns

    @property
    def messages(self) -> list[dict]:
        """The conversation as `model.chat` takes it."""
        messages = _separate(self._earlier)
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.user})
            messages.append({"role": "assistant", "content": self._format.opening + turn.assistant})
        return messages

    @property
    def tokens(self) -> list[int]:
        """The token ids of all prompts and answers, in order."""
        return [token for turn in self.turns for token in turn.prompt + turn.answer]

    def send(self, message, **options) -> Generation:
        """Answer one more message.

        Args:
            message: Text, or a list of parts as in `Model.chat`.
            options: Those of `Model.generate`, whose errors are raised. The plan is the conversation's.
        """
        began = time.perf_counter()
        return self._next_turn(message, options).generate(began)

    def stream(self, message, **options) -> Stream:
        """Like `send`, but yields pieces, as `Model.stream`. The turn counts once the last one has been read."""
        began = time.perf_counter()
        return self._next_turn(message, options).stream(began)

    def _prompt(self, content) -> tuple[list[int], list[Prepared]]:
        """The ids of the next turn's prompt, and the images and videos that it shows."""
        if self.turns:
            return self._format.next_prompt(content, self.enable_thinking)
        messages = [*self._earlier, {"role": "user", "content": content}]
        return self._format.prompt(messages, enable_thinking=self.enable_thinking)

    def _next_turn(self, message, options: dict) -> Batch:
        """Check everything. Returns a batch that adds its turn to the conversation when its answer ends."""
        params = sampling_params(options, self.model.sampling)
        content = _copied(message)
        prompt, media = self._prompt(content)
        state = self._state

        def after_step(batch: Batch) -> None:
            if self._state is not state:
                raise InputError("the conversation got another turn during this answer; send the message again")
            (answer,) = batch.answers
            if answer.finish_reason:
                turn = Turn(content, answer.text, prompt, answer.tokens)
                self._state = State((*state.turns, turn), batch.take_cache())
                if state.cache is not None:
                    self.model.caches.give(state.cache)

        return Batch(
            self.model,
            [prompt],
            [media],
            params,
            self.plan,
            earlier=state.cache,
            earlier_tokens=self.tokens,
            after_step=after_step,
        )


def _separate(messages: list[dict]) -> list[dict]:
    """Copies of messages."""
    return [message | {"content": _copied(message.get("content"))} for message in messages]


def _copied(content):
    """A copy of a message's content, whose parts the caller may change later."""
    return [copy.copy(part) for part in content] if isinstance(content, list) else content
