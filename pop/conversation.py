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

So a turn is `reference.forward` with these full-depth tokens; tests/test_conversation.py holds it to that.

The cache has the tokens, not their text. An answer stays as it was generated, also where its text would be encoded
to other tokens, or where it was cut: by max_new_tokens or a full context, or by a stop string, which then is a part of
what the model has said, although not of `messages`. The token that ends the model's turn is the chat format's, not the
one that was sampled, and belongs to the next prompt. So with answers whose text encodes to their own tokens, the
conversation is token by token what the chat format makes of `messages`. The last token of a cut answer was sampled but
never run: the next turn runs it first.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from pop.cache import KVCache
from pop.chat import chat_format
from pop.errors import InputError, PlanError
from pop.generate import Generation, Run, is_batch
from pop.plan import PrunePlan
from pop.staging import replaced


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message and its answer: the texts, and the token ids, of which the prompt has the chat format's, too."""

    user: str
    assistant: str
    prompt: list[int]
    answer: list[int]


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
        self._format = chat_format(model.tokenizer)
        self._prompt((), "Hello")  # an error in the system message is told now
        self._state = _State()

    @property
    def turns(self) -> tuple[Turn, ...]:
        return self._state.turns

    @property
    def messages(self) -> list[dict]:
        """The conversation as texts, as `model.chat` takes it."""
        messages = _message("system", self.system) if self.system is not None else []
        for turn in self.turns:
            messages += _message("user", turn.user) + _message("assistant", turn.assistant)
        return messages

    @property
    def tokens(self) -> list[int]:
        """The conversation as the model has it: prompts and answers of all turns."""
        return [token for turn in self.turns for token in turn.prompt + turn.answer]

    def send(self, text: str, **options) -> Generation:
        """Answer one more message. Options as in `Model.generate`, but for the plan.

        Raises InputError for a message that is empty or no text and for an option out of range, ContextOverflow for
        one that does not fit behind what the conversation holds.
        """
        began = time.perf_counter()
        steps, run = self._turn(text, options)
        seconds = [time.perf_counter() - began for _ in steps]
        return run.generations(seconds)[0]

    def stream(self, text: str, **options) -> Iterator[str]:
        """The answer in pieces of whole characters, as they come. The turn counts when they are read to the end."""
        steps, _ = self._turn(text, options)
        return (piece for (piece,) in steps if piece)

    def save(self, path: str | os.PathLike) -> None:
        """Write the conversation to a JSON file, whole or not at all: texts and the answers' tokens, not the cache."""
        content = {
            "pop_conversation": 1,
            "model": self.model.fingerprint,
            "plan": _described(self.plan),
            "system": self.system,
            "turns": [{name: getattr(turn, name) for name in ("user", "assistant", "answer")} for turn in self.turns],
        }
        try:
            with replaced(path) as draft:
                draft.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
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
            turns = [(turn["user"], turn["assistant"], turn["answer"]) for turn in content["turns"]]
            if content["pop_conversation"] != 1:
                raise ValueError("it is of another version")
            if not all(isinstance(text, str) and isinstance(answer, list) for _, text, answer in turns):
                raise ValueError("an answer is not text and a list of token ids")
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            raise InputError(f"{path} is not a saved conversation ({reason}); save one with chat.save(path)") from None
        if fingerprint != model.fingerprint:
            raise InputError(f"{path} is a conversation with another model; load that model, or start a new one")
        chat = cls(model, system, plan=plan)
        if described != _described(chat.plan):
            raise PlanError(f"{path} was held with another plan, {described}; pass that one as plan=")
        chat._replay(turns)
        return chat

    def _prompt(self, turns: tuple[Turn, ...], text: str) -> list[int]:
        """The ids of the prompt of the turn that follows `turns`."""
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"the message is {text!r:.80}; it must be text, and not empty")
        if turns:
            return self._format.encode_next(text)
        system = _message("system", self.system) if self.system is not None else []
        return self._format.encode(system + _message("user", text))

    def _turn(self, text: str, options: dict) -> tuple[Iterator[list[str]], Run]:
        """Check everything, and return the steps of the next turn, none of them taken yet."""
        if "plan" in options:
            raise InputError("a conversation keeps the plan it began with; start another one for another plan")
        state = self._state
        prompt = self._prompt(state.turns, text)
        run = Run(self.model, [prompt], state.cache, _unrun(state), plan=self.plan, **options)
        return self._steps(state, text, run), run

    def _steps(self, state: _State, text: str, run: Run) -> Iterator[list[str]]:
        (prompt,), (answer,) = run.prompts, run.answers
        for pieces in run.steps():
            if self._state is not state:
                raise InputError("the conversation went on while this answer was streamed, which is no part of it now")
            if answer.finish_reason:
                turn = Turn(text, answer.text, prompt, answer.tokens)
                self._state = _State((*state.turns, turn), run.cache)
            yield pieces

    def _replay(self, turns: list[tuple[str, str, list[int]]]) -> None:
        """Take up the turns (user, assistant, answer's token ids) of an earlier conversation."""
        told: list[Turn] = []
        for user, assistant, answer in turns:
            answer = self.model.encode(answer, "answer") if answer else []
            told.append(Turn(user, assistant, self._prompt(tuple(told), user), answer))
        if not told:
            return
        length = sum(len(turn.prompt) + len(turn.answer) for turn in told)
        held = length - bool(told[-1].answer)
        self.model.check_fits(held, "the saved conversation")
        cache = self.model.new_cache(1, held)
        full, answer = PrunePlan.none(), []
        for turn in told:
            if answer:
                self.model.prefill([answer], cache, plan=full)
            self.model.prefill([turn.prompt], cache, plan=self.plan)
            answer = turn.answer
        if answer[:-1]:  # its last token waits for the next turn, as if the answer had been cut
            self.model.prefill([answer[:-1]], cache, plan=full)
        self._state = _State(tuple(told), cache)


class Prefix:
    """What many prompts begin with, encoded once, made by `model.prefix`.

    tokens: its ids. plan: the PrunePlan, also of all prompts that go on from it.

    The answers are those of `model.generate(prefix.tokens + rest, plan=prefix.plan)`. A prefix has no boundary token:
    the last `full_depth_last` tokens are counted from the prompt's end. So that they may reach into the prefix, its
    last full_depth_last - 1 tokens (none, in the paper) are not encoded ahead, but with each prompt.

    Nothing changes it: threads may share it.
    """

    def __init__(self, model, prompt, *, plan: PrunePlan | None = None):
        self.model, self.plan = model, model.resolve(plan)
        self.tokens = model.encode(prompt, "prefix")
        model.check_fits(len(self.tokens), "the prefix")
        ahead = max(0, len(self.tokens) - self.plan.full_depth_last + 1)
        self._behind = self.tokens[ahead:]
        self._cache = None
        if ahead:
            self._cache = model.new_cache(1, ahead)
            model.prefill([self.tokens[:ahead]], self._cache, plan=self.plan, boundary=False)

    def generate(self, rest, **options) -> Generation | list[Generation]:
        """Continue prefix and rest: text (encoded apart from the prefix, without BOS), token ids, or a list of either
        as one batch. Options and errors as in `Model.generate`, but for the plan."""
        began = time.perf_counter()
        batch = is_batch(rest)
        run = self._run(rest if batch else [rest], options)
        seconds = [time.perf_counter() - began for _ in run.steps()]  # when the batch had its n-th token
        answers = run.generations(seconds)
        return answers if batch else answers[0]

    def stream(self, rest, **options) -> Iterator[str]:
        """The answer to prefix and one rest in pieces of whole characters, as they come."""
        self.model.need_tokenizer("stream")
        if is_batch(rest):
            raise InputError("stream takes one prompt; for a batch use generate, or one stream a prompt")
        run = self._run([rest], options)
        return (piece for (piece,) in run.steps() if piece)

    def _run(self, rests, options: dict) -> Run:
        if "plan" in options:
            raise InputError("a prefix is encoded by one plan, and so are its prompts; make another for another plan")
        prompts = [self._behind + self.model.encode(rest, bos=False) for rest in rests]
        return Run(self.model, prompts, self._cache, plan=self.plan, **options)


def _message(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def _unrun(state: _State) -> list[int]:
    """The last token of a cut answer, which is not in the cache yet; else nothing."""
    if state.cache is None:
        return []
    missing = sum(len(turn.prompt) + len(turn.answer) for turn in state.turns) - int(state.cache.lengths[0])
    return state.turns[-1].answer[-missing:] if missing else []


def _described(plan: PrunePlan) -> dict:
    """What tells a plan from others, for JSON; of its projections a hash, the same in whichever dtype they run."""
    described = {"layers": list(plan.layers), "full_depth_last": plan.full_depth_last}
    described |= {"full_depth_first": plan.full_depth_first, "projections": None}
    if plan.projections is not None:
        bits = plan.projections.weight.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes()
        described["projections"] = hashlib.sha256(bits).hexdigest()
    return described
