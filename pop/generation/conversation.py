"""Conversations: each turn runs its own prompt and continues from what the cache holds.

    turn 1    prompt: system message, user's message, start of the model's turn          answer, as generated
    turn 2    prompt: end of the model's turn, user's message, start of the next turn    answer, as generated

A prompt is pruned, except for its last `full_depth_last` tokens and the sequence's first `full_depth_first`. Answers
are at full depth. No turn changes what earlier turns left in the cache. So a conversation equals `reference.forward`
with these full-depth tokens, as tests/generation/test_conversation.py checks. README.md describes truncated answers.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from pop.engine.cache import KVCache
from pop.errors import InputError, PlanError
from pop.files import write_whole
from pop.generation.answers import Generation
from pop.generation.batch import Batch
from pop.generation.sampling import SamplingParams
from pop.inputs.processors import Prepared, as_list
from pop.pruning.plan import PrunePlan

FORMAT = 2  # of saved conversations


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message and its answer.

    Attributes:
        user: the message's content, as `model.chat` takes it.
        assistant: the answer's text.
        prompt: the ids of the prompt, including the chat format's tokens.
        answer: the ids of the answer, as they were generated.
        media: a hash of each image and video of the message.
    """

    user: str | list[dict]
    assistant: str
    prompt: list[int]
    answer: list[int]
    media: list[str]


class _State(NamedTuple):
    """A conversation's turns and their cache, which a finished turn replaces together."""

    turns: tuple[Turn, ...] = ()
    cache: KVCache | None = None

    def tokens(self) -> list[int]:
        return [token for turn in self.turns for token in turn.prompt + turn.answer]

    def missing(self) -> list[int]:
        """The tokens that are not in the cache: the last one of a truncated answer, which was sampled but never run."""
        return [] if self.cache is None else self.tokens()[int(self.cache.lengths[0]) :]


class Conversation:
    """A conversation with an instruct model, made by `model.start_chat`.

    A turn works on a copy of the cache. If it fails, or Ctrl-C stops it, or nobody reads its stream to the end, the
    conversation stays as it was. Only one thread at a time may use a conversation.

    Args:
        model: a pop.Model with a tokenizer that has a chat format.
        system: the system message, or None.
        plan: the PrunePlan of all turns; None takes the model's.
    """

    def __init__(self, model, system: str | None = None, *, plan: PrunePlan | None = None):
        model.need_tokenizer("a conversation")
        if not isinstance(system, str | None):
            raise InputError(f"the system message is {system!r:.80}; it must be text, or None")
        self.model, self.system, self.plan = model, system, model.resolve(plan)
        self._format = model.chat_format()
        self._prompt((), "Hello", [])  # an error in the system message shows now
        self._state = _State()

    @property
    def turns(self) -> tuple[Turn, ...]:
        return self._state.turns

    @property
    def messages(self) -> list[dict]:
        """The conversation as `model.chat` takes it."""
        messages = self._system_message()
        for turn in self.turns:
            messages.append(_message("user", turn.user))
            messages.append(_message("assistant", self._format.opening + turn.assistant))
        return messages

    @property
    def tokens(self) -> list[int]:
        """The token ids of all prompts and answers, in order."""
        return self._state.tokens()

    def send(self, message, *, images=(), videos=(), **options) -> Generation:
        """Answer one more message.

        Args:
            message: text, or a list of parts as in `Model.chat`.
            images, videos: lists of what the message shows before its text.
            options: those of `Model.generate`, without the plan.

        Raises:
            InputError: the message is empty or cannot be read, or an option is out of range.
            ContextOverflow: the message does not fit after what the conversation holds.
        """
        began = time.perf_counter()
        batch, steps = self._begin_turn(message, images, videos, options)
        return batch.generations(began, steps)[0]

    def stream(self, message, *, images=(), videos=(), **options) -> Iterator[str]:
        """Like `send`, but yields the answer in pieces of whole characters, as they come.

        The turn counts once the last piece has been read.
        """
        _, steps = self._begin_turn(message, images, videos, options)
        return (piece for (piece,) in steps if piece)

    def save(self, path: str | os.PathLike) -> None:
        """Write the conversation to a JSON file: texts, and the tokens of the answers, but not the cache.

        The file appears whole or not at all. Images and videos are written as their paths.

        Raises:
            InputError: the file cannot be written, or an image was not given as a path.
        """
        turns = [
            {"user": turn.user, "assistant": turn.assistant, "answer": turn.answer, "seen": turn.media}
            for turn in self.turns
        ]
        content = {
            "pop_conversation": FORMAT,
            "model": self.model.fingerprint,
            "plan": _describe(self.plan, self.model.part),
            "system": self.system,
            "turns": turns,
        }
        text = json.dumps(content, indent=1, ensure_ascii=False, default=_path) + "\n"
        write_whole(path, text, "the conversation", InputError)

    @classmethod
    def load(cls, model, path: str | os.PathLike, *, plan: PrunePlan | None = None) -> Conversation:
        """Read a conversation that `save` has written, and encode it again, turn by turn.

        Args:
            model: the model that the conversation was held with.
            path: of the file.
            plan: the plan that the conversation was held with; None takes the model's.

        Raises:
            InputError: the file is not a saved conversation, or it was held with another model.
            PlanError: it was held with another plan.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            fingerprint, description, system = (content[name] for name in ("model", "plan", "system"))
            turns = [(turn["user"], turn["assistant"], turn["answer"], turn["seen"]) for turn in content["turns"]]
            if content["pop_conversation"] != FORMAT:
                raise ValueError(f"its format is {content['pop_conversation']}, not {FORMAT}")
            if not all(isinstance(text, str) and isinstance(answer, list) for _, text, answer, _ in turns):
                raise ValueError("an answer is not text and a list of token ids")
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            raise InputError(f"{path} is not a saved conversation ({reason}); write one with chat.save(path)") from None
        if fingerprint != model.fingerprint:
            raise InputError(f"{path} is a conversation with another model; load that model, or start a new one")
        chat = cls(model, system, plan=plan)
        if description != _describe(chat.plan, model.part):
            raise PlanError(f"{path} was held with another plan, {description}; pass that plan as plan=")
        chat._replay(turns)
        return chat

    def _system_message(self) -> list[dict]:
        return [] if self.system is None else [_message("system", self.system)]

    def _prompt(self, turns: tuple[Turn, ...], content, media: list[Prepared]) -> list[int]:
        """The ids of the prompt of the turn that follows `turns`."""
        pieces = [one.pieces for one in media]
        if turns:
            return self._format.encode_next(content, pieces)
        return self._format.encode([*self._system_message(), _message("user", content)], media=pieces)

    def _begin_turn(self, message, images, videos, options: dict) -> tuple[Batch, Iterator[list[str]]]:
        """Check everything. Returns the batch of the next turn, and its steps, of which none has been taken."""
        if "plan" in options:
            raise InputError("a conversation keeps its plan; start another conversation for another plan")
        state, content = self._state, _content(message, images, videos)
        media = self.model.media_in([_message("user", content)])
        prompt = self._prompt(state.turns, content, media)
        past = {"earlier": state.cache, "leading": state.missing()}
        batch = Batch(self.model, [prompt], [media], SamplingParams(**options), plan=self.plan, **past)

        def steps():
            (answer,) = batch.answers
            for pieces in batch.steps():
                if self._state is not state:
                    raise InputError("the conversation got another turn during this answer; send the message again")
                if answer.finish_reason:
                    turn = Turn(content, answer.text, prompt, answer.tokens, [one.sha256 for one in media])
                    self._state = _State((*state.turns, turn), batch.cache)
                yield pieces

        return batch, steps()

    def _replay(self, saved: list[tuple]) -> None:
        """Take up the turns of a saved conversation: (user, assistant, answer, media) of each."""
        turns: list[Turn] = []
        media_of_turns: list[list[Prepared]] = []
        for user, assistant, answer, hashes in saved:
            answer = self.model.encode(answer, "answer") if answer else []
            media = self.model.media_in([_message("user", user)])
            if [one.sha256 for one in media] != hashes:
                raise InputError("an image or a video of the saved conversation has changed since; restore its file")
            turns.append(Turn(user, assistant, self._prompt(tuple(turns), user, media), answer, hashes))
            media_of_turns.append(media)
        if not turns:
            return
        answers = [turn.answer for turn in turns]
        answers[-1] = answers[-1][:-1]  # the next turn runs its last token, as if the answer had been truncated
        length = sum(len(turn.prompt) + len(answer) for turn, answer in zip(turns, answers, strict=True))
        self.model.check_fits(length, "the saved conversation")
        cache = self.model.new_cache(1, length)
        for turn, media, answer in zip(turns, media_of_turns, answers, strict=True):
            self.model.prefill([turn.prompt], cache, images=[media], plan=self.plan)
            if answer:
                self.model.prefill([answer], cache, plan=PrunePlan.none())
        self._state = _State(tuple(turns), cache)


def _message(role: str, content) -> dict:
    return {"role": role, "content": content}


def _content(message, images, videos) -> str | list[dict]:
    """The content of a user's message: images, videos, and then the message."""
    given = {"image": images, "video": videos}
    media = [{"type": kind, kind: one} for kind in given for one in as_list(kind, given[kind])]
    if not isinstance(message, str | list) or (isinstance(message, str) and not message.strip() and not media):
        raise InputError(f"the message is {message!r:.80}; it must be text or a list of parts, and not empty")
    if isinstance(message, str):
        return [*media, {"type": "text", "text": message}] if media else message
    return [*media, *map(copy.copy, message)]  # copies: the caller may change the parts later


def _path(image) -> str:
    """The path of an image or a video, which JSON cannot write as it is."""
    if isinstance(image, os.PathLike):
        return os.fspath(image)
    raise InputError("the conversation has an image or a video that was not given as a path; it cannot be saved")


def _describe(plan: PrunePlan, part) -> dict:
    """A plan for JSON. Its projections become a hash, which is the same in every dtype."""
    described = {"layers": list(plan.layers), "full_depth_last": plan.full_depth_last}
    described |= {"full_depth_first": plan.full_depth_first, "projections": None}
    if plan.projections is not None:
        weight = plan.projections.weight if part is None else part.gather_heads(plan.projections.weight)
        bits = weight.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes()
        described["projections"] = hashlib.sha256(bits).hexdigest()
    return described
