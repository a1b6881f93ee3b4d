"""Chat formats: conversations to token ids, as each family of instruct models was trained on them.

Each format is written by hand. It yields control tokens as ids, and texts, images and videos between them. Text is
encoded as text, so nothing that a user writes can become a control token.
To add a family, write a subclass of ChatFormat and list it in FORMATS.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pop.errors import InputError, UnsupportedError
from pop.inputs.tokenizers import Piece, Tokenizer

Message = dict[str, Any]


class Attachment(NamedTuple):
    """An image or a video in a message: its kind, "image" or "video", and what the caller gave for it."""

    kind: str
    given: Any


Turn = tuple[str, list[str | Attachment]]  # a message's role, and its texts and attachments


class ChatFormat:
    """One family's format.

    Args:
        tokenizer: the family's tokenizer.
        takes: the kinds of attachments that a user's message may have: "image", "video".
    """

    family: str
    mark: str  # the control token that identifies the family
    ends: tuple[str, ...]  # the tokens that may end the model's turn
    opening = ""  # the text in the prompt that opens the model's turn

    def __init__(self, tokenizer: Tokenizer, takes: Sequence[str] = ()):
        self.tokenizer, self.takes = tokenizer, takes
        special = tokenizer.special_tokens
        self.end_ids = tuple(special[name] for name in self.ends if name in special)

    def pieces(self, turns: list[Turn], add_generation_prompt: bool) -> Iterator[Piece | Attachment]:
        """Yield control tokens (see `control`), texts and attachments in order."""
        raise NotImplementedError

    def encode(
        self, messages: list[Message], add_generation_prompt: bool = True, media: Sequence[Sequence[Piece]] = ()
    ) -> list[int]:
        """Return the token ids of a conversation, with BOS if the family has one.

        Args:
            messages: dicts of "role" ("system", "user" or "assistant") and "content". Only the first may be a system
                message. The content is text or a list of {"type": "text", "text": ...}. A user's list may also have
                {"type": "image", "image": ...} or the same with "video", if the model takes them.
            add_generation_prompt: open the model's turn at the end.
            media: the texts and ids that replace each image and video, in the order of `media(messages)`.
        """
        replacements, pieces = iter(media), []
        for piece in self.pieces(self._turns(messages), add_generation_prompt):
            pieces += next(replacements) if isinstance(piece, Attachment) else [piece]
        return self.tokenizer.encode_pieces(pieces, bos=False)

    def media(self, messages: list[Message]) -> list[Attachment]:
        """Return the images and videos of a conversation in order."""
        return [part for _, parts in self._turns(messages) for part in parts if isinstance(part, Attachment)]

    def encode_next(self, content, media: Sequence[Sequence[Piece]] = ()) -> list[int]:
        """Return the ids between two answers: the end of a turn, the user's message, and the opening of the next turn.

        The ids of the conversation, of its answer, and these ids together are those of the longer conversation. A
        control token follows the answer, so no text is encoded across this boundary.

        Args:
            content: the content of the user's message.
            media: as in `encode`.
        """
        messages = [{"role": "user", "content": "x"}]
        asked = self.encode(messages)
        answered = [*messages, {"role": "assistant", "content": self.opening}, {"role": "user", "content": content}]
        ids = self.encode(answered, media=media)
        if ids[: len(asked)] != asked or ids[len(asked)] not in self.end_ids:
            raise UnsupportedError(
                f"the {self.family} chat format rewrites earlier turns when a conversation continues."
            )
        return ids[len(asked) :]

    def control(self, name: str) -> list[int]:
        """Return the id of a control token, in a list."""
        if name not in self.tokenizer.special_tokens:
            raise UnsupportedError(f"the tokenizer lacks the token {name} of the {self.family} chat format.")
        return [self.tokenizer.special_tokens[name]]

    def _turns(self, messages: list[Message]) -> list[Turn]:
        """Check all messages and return their roles and parts."""
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
                raise InputError(f"message {n} is a system message; only the first message may be one.")
            if role != "user" and any(isinstance(part, Attachment) for part in parts):
                raise InputError(f"message {n} has an image or video; only messages with the role user may have one.")
            if role == "user" and all(isinstance(part, str) and not part.strip() for part in parts):
                raise InputError(f"message {n} has the role user, but it is empty.")
            turns.append((role, parts))
        return turns

    def _parts(self, content: str | list[dict[str, Any]], where: str) -> list[str | Attachment]:
        """Return a message's attachments and the texts between them."""
        if isinstance(content, str):
            return [content]
        if not isinstance(content, list) or not content:
            raise InputError(f"{where}: the content must be text or a list of parts, got {content!r:.80}.")
        parts = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in ("image", "video") and kind not in self.takes:
                takes = " and ".join(["text", *(f"{taken}s" for taken in self.takes)])
                raise UnsupportedError(f"{where} has a part of the type {kind!r}, but this model takes {takes} only.")
            known = kind in ("text", "image", "video") and part.keys() == {"type", kind}
            if not known or (kind == "text" and not isinstance(part["text"], str)):
                raise InputError(f"{where}: a part must be like {{'type': 'text', 'text': 'Hi'}}, got {part!r:.80}.")
            if kind != "text":
                parts.append(Attachment(kind, part[kind]))
            elif parts and isinstance(parts[-1], str):
                parts[-1] += part["text"]
            else:
                parts.append(part["text"])
        return parts


class Llama3(ChatFormat):
    """Llama-3 and 3.1. In 3.1 there is always a system message, which begins with two dates."""

    family = "Llama-3"
    mark = "<|start_header_id|>"
    ends = ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"

    def pieces(self, turns, add_generation_prompt):
        turns = [(role, "".join(parts).strip()) for role, parts in turns]
        template = self.tokenizer.chat_template  # None with Meta's own files, which are those of 3.1
        if template is None or "Cutting Knowledge Date" in template:
            if turns[0][0] != "system":
                turns.insert(0, ("system", ""))
            turns[0] = ("system", self.dates + turns[0][1])
        yield self.control("<|begin_of_text|>")
        for role, text in turns:
            yield from self._header(role)
            yield text
            yield self.control("<|eot_id|>")
        if add_generation_prompt:
            yield from self._header("assistant")

    def _header(self, role: str) -> Iterator[Piece]:
        yield self.control("<|start_header_id|>")
        yield role
        yield self.control("<|end_header_id|>")
        yield "\n\n"


class ChatML(ChatFormat):
    """SmolLM2, Qwen3 and others.

    SmolLM2 adds a default system message to a conversation without one.
    Some models always think first. Their template opens the model's turn with <think>. The thoughts, up to </think>,
    are part of the answer and stay in the conversation. To Qwen's tokenizer, these tags are ordinary tokens.
    """

    family = "ChatML"
    mark = "<|im_start|>"
    ends = ("<|im_end|>", "<|endoftext|>")
    smollm2_system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    thinks = re.compile(r"""assistant(\\n|\n)<think>(\\n|\n)['"]""")  # the end of a string literal in the template

    @property
    def opening(self) -> str:
        return "<think>\n" if self.thinks.search(self.tokenizer.chat_template or "") else ""

    def pieces(self, turns, add_generation_prompt):
        if turns[0][0] != "system" and self.smollm2_system in (self.tokenizer.chat_template or ""):
            turns = [("system", [self.smollm2_system]), *turns]
        for role, parts in turns:
            yield self.control("<|im_start|>")
            yield f"{role}\n"
            yield from parts
            yield self.control("<|im_end|>")
            yield "\n"
        if add_generation_prompt:
            yield self.control("<|im_start|>")
            yield f"assistant\n{self.opening}"


class Gemma(ChatFormat):
    """Gemma-3. It does not know the role system, so the system's text goes before the user's first message."""

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
                f"the {self.family} format takes messages of user and assistant in turn, a user's first; "
                f"these are of {', '.join(roles) or 'system'}."
            )
        yield self.control("<bos>")
        for role, parts in turns:
            yield self.control("<start_of_turn>")
            yield f"{'model' if role == 'assistant' else role}\n{opening}"
            for part in parts:
                yield part.strip() if isinstance(part, str) else part
            yield self.control("<end_of_turn>")
            yield "\n"
            opening = ""
        if add_generation_prompt:
            yield self.control("<start_of_turn>")
            yield "model\n"


FORMATS = (Llama3, ChatML, Gemma)


def chat_format(tokenizer: Tokenizer, takes: Sequence[str] = ()) -> ChatFormat:
    """Choose the chat format by the tokenizer's control tokens. Arguments as for ChatFormat.

    Raises UnsupportedError if the tokenizer has another format.
    """
    for form in FORMATS:
        if form.mark in tokenizer.special_tokens:
            return form(tokenizer, takes)
    known = ", ".join(form.mark for form in FORMATS)
    raise UnsupportedError(f"no chat format is known for this tokenizer: it has none of the tokens {known}.")
