"""Conversations: each turn runs its own prompt and continues from the cache. README.md in this folder has the rules."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import time

import torch

from pop.engine.cache import KVCache
from pop.errors import InputError, PlanError
from pop.generation.answers import Generation, answer_text
from pop.generation.batch import Batch, Stream
from pop.generation.options import sampling_params, takes_options
from pop.generation.sampling import SamplingParams
from pop.inputs.processors import Prepared, as_list
from pop.pruning.plan import PrunePlan
from pop.system.files import read_json, write_whole

FORMATS = (2, 3, 4)  # of saved conversations; the first lacks what a stop string has cut off an answer


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message and its answer."""

    user: str | list[dict]  # the message's content, as `model.chat` takes it
    assistant: str  # the answer's text
    prompt: list[int]  # the ids of the prompt, including the chat format's tokens
    answer: list[int]  # the ids of the answer, as they were generated
    media: list[str]  # a hash of each image and video of the message


class Conversation:
    """A conversation with an instruct model, made by `model.start_chat`.

    A turn works on a copy of the cache. If it fails, or Ctrl-C stops it, or nobody reads its stream to the end, the
    conversation stays as it was. Only one thread at a time may use a conversation.
    """

    def __init__(
        self, model, system: str | None = None, *, enable_thinking: bool = True, plan: PrunePlan | None = None
    ):
        self.model, self.system, self.plan = model, system, model.resolve(plan)
        self.enable_thinking = enable_thinking
        self._format = model.chat_format()
        # The turns and their cache, which a finished turn replaces together.
        self._state: tuple[tuple[Turn, ...], KVCache | None] = ((), None)
        self._is_shared = False  # whether a fork may have the same cache
        self._prompt("Hello")  # an error in the system message shows now

    @property
    def turns(self) -> tuple[Turn, ...]:
        return self._state[0]

    @property
    def messages(self) -> list[dict]:
        """The conversation as `model.chat` takes it."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.user})
            messages.append({"role": "assistant", "content": self._format.opening + turn.assistant})
        return messages

    @property
    def tokens(self) -> list[int]:
        """The token ids of all prompts and answers, in order."""
        return [token for turn in self.turns for token in turn.prompt + turn.answer]

    @takes_options
    def send(self, message, *, images=(), videos=(), **options) -> Generation:
        """Answer one more message.

        Args:
            message: Text, or a list of parts as in `Model.chat`.
            images, videos: Lists of what the message shows before its text.
            options: Those of `Model.generate`, whose errors are raised. The plan is the conversation's.
        """
        began = time.perf_counter()
        return self._next_turn(message, images, videos, options).generate(began)

    @takes_options
    def stream(self, message, *, images=(), videos=(), **options) -> Stream:
        """Like `send`, but yields pieces, as `Model.stream`. The turn counts once the last one has been read."""
        began = time.perf_counter()
        return self._next_turn(message, images, videos, options).stream(began)

    def fork(self) -> Conversation:
        """A second conversation with the same turns. They continue independently, and share the model."""
        other = object.__new__(type(self))
        self._is_shared = True
        vars(other).update(vars(self))
        return other

    def __copy__(self) -> Conversation:
        return self.fork()

    def __deepcopy__(self, memo) -> Conversation:  # a turn changes neither the model nor the cache
        return self.fork()

    def save(self, path: str | os.PathLike) -> None:
        """Write texts and the answers' tokens, but not the cache, to a JSON file. It appears whole or not at all.

        Raises InputError if the file cannot be written, or if an image or a video was not given as a path.
        """
        content = {
            "pop_conversation": FORMATS[-1],
            "model": self.model.fingerprint,
            "plan": _describe(self.plan, self.model.part),
            "system": self.system,
            "enable_thinking": self.enable_thinking,
            "turns": [
                {
                    "user": turn.user,
                    "assistant": turn.assistant,
                    "cut": answer_text(self.model.tokenizer, turn.answer)[len(turn.assistant) :],
                    "answer": turn.answer,
                    "seen": turn.media,
                }
                for turn in self.turns
            ],
        }
        try:
            text = json.dumps(content, indent=1, ensure_ascii=False, default=os.fspath) + "\n"
        except (TypeError, ValueError):
            raise InputError("the conversation has an image or a video without a path; it cannot be saved") from None
        write_whole(path, text, "the conversation", InputError)

    @classmethod
    def load(cls, model, path: str | os.PathLike, *, plan: PrunePlan | None = None) -> Conversation:
        """Read a conversation that `save` has written with this model and plan, and encode it again, turn by turn.

        Raises:
            InputError: The file is not a saved conversation of this model, or the text of an answer was edited.
            PlanError: It has another plan.
        """
        try:
            content = read_json(path, InputError)
            fingerprint, description, system = (content[name] for name in ("model", "plan", "system"))
            if (saved_as := content["pop_conversation"]) not in FORMATS:
                raise ValueError(f"its format is {saved_as}, not one of {FORMATS}")
            thinks = content["enable_thinking"] if saved_as > 3 else True
            names = ("user", "assistant", "answer", "seen", *(["cut"] if saved_as > 2 else []))
            turns = [[turn[name] for name in names] for turn in content["turns"]]
            if not all(isinstance(text, str) and isinstance(answer, list) for _, text, answer, *_ in turns):
                raise ValueError("an answer is not text and a list of token ids")
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} is not a saved conversation ({error}); write one with chat.save(path)") from None
        if fingerprint != model.fingerprint:
            raise InputError(f"{path} is a conversation with another model; load that model, or start a new one")
        chat = cls(model, system, enable_thinking=thinks, plan=plan)
        described = _describe(chat.plan, model.part)
        earlier = described | {"projections": (described["projections"] or {}).get("weight")}  # until version 0.1.0
        if description not in (described, earlier):
            raise PlanError(f"{path} was held with another plan, {description}; pass that plan as plan=")
        for turn in turns:
            chat._replay(*turn)
        return chat

    def _prompt(self, content) -> tuple[list[int], list[Prepared]]:
        """The ids of the next turn's prompt, and the images and videos of its message."""
        if self.turns:
            return self._format.next_prompt(content, self.enable_thinking)
        messages = [*self.messages, {"role": "user", "content": content}]
        return self._format.prompt(messages, enable_thinking=self.enable_thinking)

    def _batch(self, prompt: list[int], media: list[Prepared], params: SamplingParams, **options) -> Batch:
        """A batch of one prompt, which continues from the cache."""
        _, cache = self._state
        options |= {"plan": self.plan, "earlier": cache, "earlier_tokens": self.tokens}
        return Batch(self.model, [prompt], [media], params, **options)

    def _next_turn(self, message, images, videos, options: dict) -> Batch:
        """Check everything. Returns a batch that adds its turn to the conversation when its answer ends."""
        if "plan" in options:
            raise InputError("a conversation keeps its plan; start another conversation for another plan")
        state, given = self._state, {"image": images, "video": videos}
        _, earlier = state
        content = [{"type": kind, kind: one} for kind in given for one in as_list(kind, given[kind])]
        if isinstance(message, list):
            content += map(copy.copy, message)  # copies: the caller may change the parts later
        else:
            content = [*content, {"type": "text", "text": message}] if content else message
        prompt, media = self._prompt(content)

        def after_step(batch: Batch) -> None:
            if self._state is not state:
                raise InputError("the conversation got another turn during this answer; send the message again")
            (answer,) = batch.answers
            if answer.finish_reason:
                turn = Turn(content, answer.text, prompt, answer.tokens, [one.sha256 for one in media])
                self._state = ((*self.turns, turn), batch.take_cache())
                if earlier is not None and not self._is_shared:
                    self.model.caches.give(earlier)
                self._is_shared = False

        return self._batch(prompt, media, sampling_params(self.model, options), after_step=after_step)

    def _replay(self, user, assistant: str, answer: list, hashes: list[str], cut: str | None = None) -> None:
        """Add a turn of a saved conversation. `cut` is what a stop string has cut off its answer, if that is known."""
        prompt, media = self._prompt(user)
        if [one.sha256 for one in media] != hashes:
            raise InputError("an image or a video of the saved conversation has changed since; restore its file")
        answer = self.model.encode(answer, "answer") if answer else []
        self.model.check_fits(len(self.tokens) + len(prompt + answer[:-1]), "the saved conversation")
        text = answer_text(self.model.tokenizer, answer)
        if not (text.startswith(assistant) if cut is None else text == f"{assistant}{cut}"):
            what = f"the answer of turn {len(self.turns) + 1} of the saved conversation is {assistant!r:.80}"
            raise InputError(f"{what}, but its tokens are {text!r:.80}; undo the edit, or delete the turn")
        batch = self._batch(prompt, media, SamplingParams(max_new_tokens=max(1, len(answer))))
        batch.prefill()
        if answer[:-1]:  # the next turn runs the last token, as after a truncated answer
            self.model.prefill([answer[:-1]], batch.cache, plan=PrunePlan.none())
        self._state = ((*self.turns, Turn(user, assistant, prompt, answer, hashes)), batch.cache)


def _describe(plan: PrunePlan, part) -> dict:
    """A plan for JSON. Its projections become hashes, which are the same in every dtype."""
    described = plan.fields() | {"layers": list(plan.layers), "projections": None}
    if plan.projections is not None:
        described["projections"] = {}
        for name, tensor in plan.projections.tensors.items():
            whole = tensor if part is None or name in ("shared", "update") else part.gather_heads(tensor)
            bits = whole.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes()
            described["projections"][name] = hashlib.sha256(bits).hexdigest()
    return described
