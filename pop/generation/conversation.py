"""What goes on from a filled cache: conversations, and prompts with a common prefix.

A conversation is one growing sequence of tokens, laid out in the family's chat format:

    turn 1    prompt: system message, user's message, the model's turn opened       answer, as generated
    turn 2    prompt: end of the model's turn, user's message, turn opened again    answer, as generated
    ...

Each turn runs its own prompt and nothing that came before, and what is pruned follows from what a token is:

- the tokens of a prompt are pruned, but for the turn's last `full_depth_last` and the sequence's first
  `full_depth_first`: each turn has a boundary token, from which its answer is predicted;
- the tokens of an answer are at full depth, then and later;
- what is in the cache is never touched again.

So a turn is `reference.forward` with these full-depth tokens; tests/generation/test_conversation.py holds it to that.

The cache has the tokens, not their text. An answer stays as it was generated, also where its text would be encoded
to other tokens, or where it was cut: by max_new_tokens or a full context, or by a stop string, which then is a part of
what the model has said, although not of `messages`. The token that ends the model's turn is the chat format's, not the
one that was sampled, and belongs to the next prompt. So with answers whose text encodes to their own tokens, the
conversation is token by token what the chat format makes of `messages`. The last token of a cut answer was sampled but
never run: the next turn runs it first.
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

import torch

from pop.engine.cache import KVCache
from pop.errors import InputError, PlanError
from pop.files import replaced
from pop.generation.generate import Generation, Run, is_batch
from pop.inputs.processors import Prepared, as_list
from pop.pruning.plan import PrunePlan

SAVED = ("user", "assistant", "answer", "seen")  # of a turn


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message and its answer: what they say, and the token ids, of which the prompt has the chat format's, too.

    user: the content of a message as `model.chat` takes it. seen: its images and videos, as hashes.
    """

    user: str | list[dict]
    assistant: str
    prompt: list[int]
    answer: list[int]
    seen: list[str]


@dataclasses.dataclass(frozen=True)
class _State:
    """All that a conversation is: replaced as a whole when a turn has succeeded, and not changed before."""

    turns: tuple[Turn, ...] = ()
    cache: KVCache | None = None  # holds all tokens but the last one of a cut answer


class Conversation:
    """A conversation with an instruct model, made by `model.start_chat`.

    system: the system message or None. plan: the PrunePlan of all its turns.

    A turn that fails or is broken off, by an error, by Ctrl-C, or because nobody reads its stream to the end, leaves
    the conversation as it was: a turn works on a copy of the cache, so that for its time there are two. One thread at
    a time; any number of conversations may share a model, in threads of their own.
    """

    def __init__(self, model, system: str | None = None, *, plan: PrunePlan | None = None):
        model.need_tokenizer("a conversation")
        if not isinstance(system, str | None):
            raise InputError(f"the system message is {system!r:.80}; it must be text, or None")
        self.model, self.system, self.plan = model, system, model.resolve(plan)
        self._format = model.chat_format()
        self._prompt((), "Hello", [])  # an error in the system message is told now
        self._state = _State()

    @property
    def turns(self) -> tuple[Turn, ...]:
        return self._state.turns

    @property
    def messages(self) -> list[dict]:
        """The conversation as `model.chat` takes it."""
        messages = _message("system", self.system) if self.system is not None else []
        for turn in self.turns:
            messages += _message("user", turn.user)
            messages += _message("assistant", self._format.opening + turn.assistant)
        return messages

    @property
    def tokens(self) -> list[int]:
        """The conversation as the model has it: prompts and answers of all turns."""
        return [token for turn in self.turns for token in turn.prompt + turn.answer]

    def send(self, message, *, images=(), videos=(), **options) -> Generation:
        """Answer one more message: text, or a list of parts as in `model.chat`. Options as in `Model.generate`, but for
        the plan; images and videos, lists, are put before the message.

        Raises InputError for a message that is empty or cannot be read and for an option out of range, ContextOverflow
        for one that does not fit behind what the conversation holds.
        """
        began = time.perf_counter()
        steps, run = self._turn(_content(message, images, videos), options)
        seconds = [time.perf_counter() - began for _ in steps]
        return run.generations(seconds)[0]

    def stream(self, message, *, images=(), videos=(), **options) -> Iterator[str]:
        """The answer in pieces of whole characters, as they come. The turn counts when they are read to the end."""
        steps, _ = self._turn(_content(message, images, videos), options)
        return (piece for (piece,) in steps if piece)

    def save(self, path: str | os.PathLike) -> None:
        """Write the conversation to a JSON file, whole or not at all: texts and the answers' tokens, not the cache.

        Images are written as the paths that they were given as; InputError for those that were not.
        """
        content = {
            "pop_conversation": 2,
            "model": self.model.fingerprint,
            "plan": _described(self.plan, self.model.part),
            "system": self.system,
            "turns": [{name: getattr(turn, name) for name in SAVED} for turn in self.turns],
        }
        try:
            with replaced(path) as draft:
                text = json.dumps(content, indent=1, ensure_ascii=False, default=_path)
                draft.write_text(text + "\n", encoding="utf-8")
        except (OSError, ValueError, TypeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"the conversation cannot be saved to {path} ({reason}); choose another path") from None

    @classmethod
    def load(cls, model, path: str | os.PathLike, *, plan: PrunePlan | None = None) -> Conversation:
        """Read what `save` has written. The cache is encoded again, turn by turn, as it had been.

        Raises InputError if the file holds no conversation, or one with another model; PlanError for another plan.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            fingerprint, described, system = (content[name] for name in ("model", "plan", "system"))
            turns = [tuple(turn[name] for name in SAVED) for turn in content["turns"]]
            if content["pop_conversation"] != 2:
                raise ValueError("it is of another version")
            if not all(isinstance(text, str) and isinstance(answer, list) for _, text, answer, _ in turns):
                raise ValueError("an answer is not text and a list of token ids")
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            raise InputError(f"{path} is not a saved conversation ({reason}); save one with chat.save(path)") from None
        if fingerprint != model.fingerprint:
            raise InputError(f"{path} is a conversation with another model; load that model, or start a new one")
        chat = cls(model, system, plan=plan)
        if described != _described(chat.plan, model.part):
            raise PlanError(f"{path} was held with another plan, {described}; pass that one as plan=")
        chat._replay(turns)
        return chat

    def _prompt(self, turns: tuple[Turn, ...], content, seen: list[Prepared]) -> list[int]:
        """The ids of the prompt of the turn that follows `turns`."""
        pieces = [one.pieces for one in seen]
        if turns:
            return self._format.encode_next(content, pieces)
        system = _message("system", self.system) if self.system is not None else []
        return self._format.encode(system + _message("user", content), media=pieces)

    def _turn(self, content, options: dict) -> tuple[Iterator[list[str]], Run]:
        """Check everything, and return the steps of the next turn, none of them taken yet."""
        if "plan" in options:
            raise InputError("a conversation keeps the plan it began with; start another one for another plan")
        state, seen = self._state, self.model.seen_in(_message("user", content))
        prompt = self._prompt(state.turns, content, seen)
        run = Run(self.model, [prompt], state.cache, _unrun(state), images=[seen], plan=self.plan, **options)
        return self._steps(state, content, run), run

    def _steps(self, state: _State, content, run: Run) -> Iterator[list[str]]:
        (prompt,), (answer,), (seen,) = run.prompts, run.answers, run.images
        for pieces in run.steps():
            if self._state is not state:
                raise InputError("the conversation went on while this answer was streamed, which is no part of it now")
            if answer.finish_reason:
                turn = Turn(content, answer.text, prompt, answer.tokens, [one.sha256 for one in seen])
                self._state = _State((*state.turns, turn), run.cache)
            yield pieces

    def _replay(self, turns: list[tuple]) -> None:
        """Take up the turns of an earlier conversation, each as `save` has written it."""
        told: list[Turn] = []
        seen_by_turn: list[list[Prepared]] = []
        for user, assistant, answer, hashes in turns:
            answer = self.model.encode(answer, "answer") if answer else []
            seen = self.model.seen_in(_message("user", user))
            if [one.sha256 for one in seen] != hashes:
                raise InputError("the saved conversation has images or videos that are no longer what they were")
            seen_by_turn.append(seen)
            told.append(Turn(user, assistant, self._prompt(tuple(told), user, seen), answer, hashes))
        if not told:
            return
        length = sum(len(turn.prompt) + len(turn.answer) for turn in told)
        held = length - bool(told[-1].answer)
        self.model.check_fits(held, "the saved conversation")
        cache = self.model.new_cache(1, held)
        full, answer = PrunePlan.none(), []
        for turn, seen in zip(told, seen_by_turn, strict=True):
            if answer:
                self.model.prefill([answer], cache, plan=full)
            self.model.prefill([turn.prompt], cache, images=[seen], plan=self.plan)
            answer = turn.answer
        if answer[:-1]:  # its last token waits for the next turn, as if the answer had been cut
            self.model.prefill([answer[:-1]], cache, plan=full)
        self._state = _State(tuple(told), cache)


class Prefix:
    """What many prompts begin with, encoded once, made by `model.prefix`.

    tokens: its ids. plan: the PrunePlan, also of all prompts that go on from it.

    The answers are those of `model.generate(prefix.tokens + rest, plan=prefix.plan)`, with the images and videos of
    both. A prefix has no boundary token: the last `full_depth_last` tokens are counted from the prompt's end. So that
    they may reach into the prefix, its last full_depth_last - 1 tokens (none, in the paper) are not encoded ahead, but
    with each prompt, and with them all of an image that they begin in.

    Nothing changes it: threads may share it.
    """

    def __init__(self, model, prompt, *, images=None, videos=None, plan: PrunePlan | None = None):
        self.model, self.plan = model, model.resolve(plan)
        (seen,) = model.vision.prepare_batch(images, videos, 1)
        self.tokens = model.encode(prompt, "prefix", seen=seen)
        model.check_fits(len(self.tokens), "the prefix")
        ahead = max(0, len(self.tokens) - self.plan.full_depth_last + 1)
        places = model.vision.locate(self.tokens, seen)
        ahead = min([ahead, *(place[0] for place in places if ahead in place)])
        self._behind = self.tokens[ahead:]
        self._seen_behind = [one for one, place in zip(seen, places, strict=True) if place[0] >= ahead]
        self._cache = None
        if ahead:
            self._cache = model.new_cache(1, ahead)
            seen_ahead = [one for one, place in zip(seen, places, strict=True) if place[0] < ahead]
            model.prefill([self.tokens[:ahead]], self._cache, images=[seen_ahead], plan=self.plan, boundary=False)

    def generate(self, rest, *, images=None, videos=None, **options) -> Generation | list[Generation]:
        """Continue prefix and rest: text (encoded apart from the prefix, without BOS), token ids, or a list of either
        as one batch. Options and errors as in `Model.generate`, but for the plan; images and videos are the rest's."""
        began = time.perf_counter()
        batch = is_batch(rest)
        run = self._run(rest if batch else [rest], images, videos, options)
        seconds = [time.perf_counter() - began for _ in run.steps()]  # when the batch had its n-th token
        answers = run.generations(seconds)
        return answers if batch else answers[0]

    def stream(self, rest, *, images=None, videos=None, **options) -> Iterator[str]:
        """The answer to prefix and one rest in pieces of whole characters, as they come."""
        self.model.need_tokenizer("stream")
        if is_batch(rest):
            raise InputError("stream takes one prompt; for a batch use generate, or one stream a prompt")
        run = self._run([rest], images, videos, options)
        return (piece for (piece,) in run.steps() if piece)

    def _run(self, rests, images, videos, options: dict) -> Run:
        if "plan" in options:
            raise InputError("a prefix is encoded by one plan, and so are its prompts; make another for another plan")
        rows = self.model.vision.prepare_batch(images, videos, len(rests))
        prompts = [
            self._behind + self.model.encode(rest, bos=False, seen=row) for rest, row in zip(rests, rows, strict=True)
        ]
        images = [self._seen_behind + row for row in rows]
        return Run(self.model, prompts, self._cache, images=images, plan=self.plan, **options)


def _message(role: str, content) -> list[dict]:
    return [{"role": role, "content": content}]


def _content(message, images, videos) -> str | list[dict]:
    """A message with images and videos before it, as the content of a user's message."""
    given = [("image", one) for one in as_list("image", images)] + [("video", one) for one in as_list("video", videos)]
    before = [{"type": kind, kind: one} for kind, one in given]
    if not isinstance(message, str | list) or (isinstance(message, str) and not message.strip() and not before):
        raise InputError(f"the message is {message!r:.80}; it must be text, or a list of parts, and not empty")
    if isinstance(message, str):
        return [*before, {"type": "text", "text": message}] if before else message
    return [*before, *map(copy.copy, message)]  # copies: the caller may change his own


def _unrun(state: _State) -> list[int]:
    """The last token of a cut answer, which is not in the cache yet; else nothing."""
    if state.cache is None:
        return []
    missing = sum(len(turn.prompt) + len(turn.answer) for turn in state.turns) - int(state.cache.lengths[0])
    return state.turns[-1].answer[-missing:] if missing else []


def _path(image) -> str:
    """What JSON says of an image that is no text."""
    if isinstance(image, os.PathLike):
        return os.fspath(image)
    raise TypeError("it has an image or a video that was not given as a path")


def _described(plan: PrunePlan, part) -> dict:
    """What tells a plan from others, for JSON; of its projections a hash, the same in whichever dtype they run."""
    described = {"layers": list(plan.layers), "full_depth_last": plan.full_depth_last}
    described |= {"full_depth_first": plan.full_depth_first, "projections": None}
    if plan.projections is not None:
        weight = plan.projections.weight if part is None else part.gather_heads(plan.projections.weight)
        bits = weight.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes()
        described["projections"] = hashlib.sha256(bits).hexdigest()
    return described
