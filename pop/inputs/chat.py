"""Conversations to token ids, in the format that each family of instruct models was trained on.

A format is hand-written: its `pieces` yields the control tokens and the texts between them. Control tokens
become ids directly and text is encoded as text, so that nothing a user writes can become a control token. A
further family is one more subclass, recognised by one of its control tokens, and an entry in FORMATS.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from pop.errors import InputError, UnsupportedError
from pop.inputs.tokenizers import Piece, Tokenizer

Message = dict[str, Any]


class Control(str):
    """The name of a control token, in contrast to text that may look like it."""


SEEN = {kind: Control(f"<{kind}>") for kind in ("image", "video")}  # what stands in the place of one


class ChatFormat:
    """One family's format.

    takes: what a user's message may have beside text: "image", "video".
    end_ids: the tokens with which a turn of the model may end.
    """

    family: str
    mark: str  # the control token that tells the family
    ends: tuple[str, ...]
    opening = ""  # text with which the model's turn is opened for it

    def __init__(self, tokenizer: Tokenizer, takes: Sequence[str] = ()):
        self.tokenizer, self.takes = tokenizer, takes
        special = tokenizer.special_tokens
        self.end_ids = tuple(special[name] for name in self.ends if name in special)

    def pieces(self, turns: list[tuple[str, list[str]]], add_generation_prompt: bool) -> Iterator[str]:
        """Control tokens and texts in order. turns: each message's role and parts: texts and SEEN."""
        raise NotImplementedError

    def encode(
        self, messages: list[Message], add_generation_prompt: bool = True, media: Sequence[Sequence[Piece]] = ()
    ) -> list[int]:
        """The token ids of a conversation, BOS included where the family has one.

        messages: a list of {"role": "system", "user" or "assistant", "content": ...}; the content is text or
        a list of {"type": "text", "text": ...} and, if the model takes them and in a user's message,
            {"type": "image", "image": ...} and {"type": "video", "video": ...}; a system message comes first.
            InputError for all else.
        add_generation_prompt: open the model's turn at the end.
        seen: what stands for each image and video, in the order of `seen(messages)`.
        """
        left, pieces = iter(media), []
        for piece in self.pieces(self._turns(messages), add_generation_prompt):
            if piece in SEEN.values() and isinstance(piece, Control):
                pieces += next(left)
            else:
                pieces.append([self._control_id(piece)] if isinstance(piece, Control) else piece)
        return self.tokenizer.encode_pieces(pieces, bos=False)

    def media(self, messages: list[Message]) -> list[tuple[str, Any]]:
        """The images and videos of a conversation, in their order: each one's kind, and what was given for it."""
        self._turns(messages)  # checks
        contents = [message["content"] for message in messages if isinstance(message["content"], list)]
        return [(part["type"], part[part["type"]]) for content in contents for part in content if part["type"] in SEEN]

    def encode_next(self, content, media: Sequence[Sequence[Piece]] = ()) -> list[int]:
        """What follows an answer: the ids that end the model's turn, the user's next message, the model's turn opened.

        Behind the ids of a conversation and those of its answer, they are the ids of the longer conversation: a
        control token parts them from the answer, so that no text is encoded across the seam. seen: as in `encode`.
        """
        messages = [{"role": "user", "content": "x"}]
        asked = self.encode(messages)
        answered = [*messages, {"role": "assistant", "content": self.opening}, {"role": "user", "content": content}]
        ids = self.encode(answered, media=media)
        if ids[: len(asked)] != asked or ids[len(asked)] not in self.end_ids:
            raise UnsupportedError(
                f"the {self.family} chat format changes what came before when a conversation goes on."
            )
        return ids[len(asked) :]

    def render(self, messages: list[Message], add_generation_prompt: bool = True) -> str:
        """The same as a string, to read: in it text and control tokens look alike, so do not encode it."""
        return "".join(self.pieces(self._turns(messages), add_generation_prompt))

    def _control_id(self, name: str) -> int:
        if name not in self.tokenizer.special_tokens:
            raise UnsupportedError(f"the tokenizer lacks the token {name} of the {self.family} chat format.")
        return self.tokenizer.special_tokens[name]

    def _turns(self, messages: list[Message]) -> list[tuple[str, list[str]]]:
        """Each message's role and parts, after checking all of them."""
        if not isinstance(messages, list) or not messages:
            raise InputError("messages must be a list with at least one {'role': ..., 'content': ...}.")
        turns = []
        for n, message in enumerate(messages):
            if not isinstance(message, dict) or message.keys() != {"role", "content"}:
                raise InputError(f"message {n} must be a dict of 'role' and 'content', got {message!r:.80}.")
            role, parts = message["role"], self._parts(message["content"], f"message {n}")
            if role not in ("system", "user", "assistant"):
                raise InputError(f"message {n} has the role {role!r}; use system, user or assistant.")
            if role == "system" and n:
                raise InputError(f"message {n} is a system message, and only the first message may be one.")
            if role != "user" and any(isinstance(part, Control) for part in parts):
                raise InputError(f"message {n} has an image or video, and only a user's message may have one.")
            if role == "user" and not "".join(parts).strip():
                raise InputError(f"message {n}, of the user, is empty.")
            turns.append((role, parts))
        return turns

    def _parts(self, content: str | list[dict[str, Any]], where: str) -> list[str]:
        if isinstance(content, str):
            return [content]
        if not isinstance(content, list) or not content:
            raise InputError(f"{where}: the content must be text or a list of parts, got {content!r:.80}.")
        parts = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in self.takes:
                if part.keys() != {"type", kind}:
                    raise InputError(f"{where}: {kind}s are {{'type': '{kind}', '{kind}': ...}}, got {part!r:.80}.")
                parts.append(SEEN[kind])
                continue
            if kind in SEEN:
                takes = " and ".join(["text", *(f"{kind}s" for kind in self.takes)])
                raise UnsupportedError(f"{where} has an image or video, and this model takes {takes} only.")
            if kind != "text" or part.keys() != {"type", "text"} or not isinstance(part["text"], str):
                raise InputError(f"{where}: a part is {{'type': 'text', 'text': ...}}, got {part!r:.80}.")
            if parts and not isinstance(parts[-1], Control):
                parts[-1] += part["text"]
            else:
                parts.append(part["text"])
        return parts


class Llama3(ChatFormat):
    """Llama-3 and 3.1. In 3.1 there always is a system message, and it opens with two dates."""

    family = "Llama-3"
    mark = "<|start_header_id|>"
    ends = ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"

    def pieces(self, turns, add_generation_prompt):
        turns = [(role, "".join(parts).strip()) for role, parts in turns]
        template = self.tokenizer.chat_template  # Meta's own files have none
        if template is None or "Cutting Knowledge Date" in template:
            if turns[0][0] != "system":
                turns.insert(0, ("system", ""))
            turns[0] = ("system", self.dates + turns[0][1])
        yield Control("<|begin_of_text|>")
        for role, text in turns:
            yield from self._header(role)
            yield text
            yield Control("<|eot_id|>")
        if add_generation_prompt:
            yield from self._header("assistant")

    def _header(self, role: str) -> Iterator[str]:
        yield Control("<|start_header_id|>")
        yield role
        yield Control("<|end_header_id|>")
        yield "\n\n"


class ChatML(ChatFormat):
    """SmolLM2, Qwen3 and others.

    SmolLM2 has a system message of its own, for conversations without one. The turn of a model that always thinks is
    opened with <think>, which its template tells; what it thinks, up to </think>, is a part of its answer and stays one
    in later turns. To Qwen's tokenizer these tags are words, no control tokens.
    """

    family = "ChatML"
    mark = "<|im_start|>"
    ends = ("<|im_end|>", "<|endoftext|>")
    smollm2_system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    thinks = re.compile(r"""assistant(\\n|\n)<think>(\\n|\n)['"]""")  # a template's string, which ends there

    @property
    def opening(self) -> str:
        return "<think>\n" if self.thinks.search(self.tokenizer.chat_template or "") else ""

    def pieces(self, turns, add_generation_prompt):
        if turns[0][0] != "system" and self.smollm2_system in (self.tokenizer.chat_template or ""):
            turns = [("system", [self.smollm2_system]), *turns]
        for role, parts in turns:
            yield Control("<|im_start|>")
            yield f"{role}\n"
            yield from parts
            yield Control("<|im_end|>")
            yield "\n"
        if add_generation_prompt:
            yield Control("<|im_start|>")
            yield f"assistant\n{self.opening}"


class Gemma(ChatFormat):
    """Gemma-3, which knows no system role: such a text goes before the first message of the user."""

    family = "Gemma"
    mark = "<start_of_turn>"
    ends = ("<end_of_turn>", "<eos>")

    def pieces(self, turns, add_generation_prompt):
        opening = ""
        if turns[0][0] == "system":
            opening, turns = f"{''.join(turns[0][1])}\n\n", turns[1:]
        roles = [role for role, _ in turns]
        if not roles or roles != [("user", "assistant")[n % 2] for n in range(len(roles))]:
            raise InputError(
                f"{self.family} takes messages of user and assistant in turn, a user's first; these are of "
                f"{', '.join(roles) or 'the system alone'}."
            )
        yield Control("<bos>")
        for role, parts in turns:
            yield Control("<start_of_turn>")
            yield f"{'model' if role == 'assistant' else role}\n{opening}"
            for part in parts:
                yield part if isinstance(part, Control) else part.strip()
            yield Control("<end_of_turn>")
            yield "\n"
            opening = ""
        if add_generation_prompt:
            yield Control("<start_of_turn>")
            yield "model\n"


FORMATS = (Llama3, ChatML, Gemma)


def chat_format(tokenizer: Tokenizer, takes: Sequence[str] = ()) -> ChatFormat:
    """The chat format that a tokenizer's control tokens belong to; UnsupportedError if there is none.

    takes: see ChatFormat.
    """
    for form in FORMATS:
        if form.mark in tokenizer.special_tokens:
            return form(tokenizer, takes)
    known = ", ".join(form.mark for form in FORMATS)
    raise UnsupportedError(f"no chat format is known for this tokenizer: it has none of the tokens {known}.")
