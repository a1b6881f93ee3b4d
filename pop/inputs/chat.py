"""Chat formats: conversations to token ids, as each family of instruct models was trained on them.

Each format is written by hand. Control tokens come from its own strings only. The text of a message is encoded as
text, so nothing that a user writes can become a control token.
To add a family, write a subclass of ChatFormat and list it in FORMATS.
"""

import re
from typing import Any

from pop.errors import InputError, UnsupportedError
from pop.inputs.images import Image
from pop.inputs.processors import Prepared, Processor
from pop.inputs.tokenizers import Piece, Tokenizer

Turn = tuple[str, list[str | Prepared]]  # a message's role, and its texts, images and videos


class ChatFormat:
    """One family's format. Without a `vision` processor, it takes text only.

    Each format has `arrange`, which returns the turns that are written: with default messages, and without whitespace
    that the format drops.
    """

    family: str
    ends: tuple[str, ...]  # the tokens that may end the model's turn
    # What the format writes at the beginning and around each message. In these strings <...> is a control token.
    bos = ""
    before: str  # with {} for the role; its first control token identifies the family
    after: str
    assistant = "assistant"  # the name of the model's role
    opening = ""  # the text in the prompt that opens the model's turn

    def __init__(self, tokenizer: Tokenizer, vision: Processor | None = None):
        self.tokenizer, self.vision = tokenizer, vision
        self.end_ids = tuple(tokenizer.special_tokens[name] for name in self.ends if name in tokenizer.special_tokens)

    def encode(self, messages: list[dict], add_generation_prompt: bool = True) -> list[int]:
        """Return the token ids of a conversation. Arguments as for `prompt`."""
        return self.prompt(messages, add_generation_prompt)[0]

    def prompt(self, messages: list[dict], add_generation_prompt: bool = True) -> tuple[list[int], list[Prepared]]:
        """Return the token ids of a conversation, with BOS if the family has one, and its images and videos in order.

        Args:
            messages: As in `pop.Model.chat`. Only the first may be a system message.
            add_generation_prompt: Open the model's turn at the end.
        """
        pieces, media = self._control(self.bos), []
        for role, parts in self.arrange(self._turns(messages)):
            pieces += self._control(self.before.format(self.assistant if role == "assistant" else role))
            for part in parts:
                pieces += [part] if isinstance(part, str) else part.pieces
            media += [part for part in parts if isinstance(part, Prepared)]
            pieces += self._control(self.after)
        if add_generation_prompt:
            pieces += [*self._control(self.before.format(self.assistant)), self.opening]
        return self.tokenizer.encode_pieces(pieces, bos=False), media

    def next_prompt(self, content) -> tuple[list[int], list[Prepared]]:
        """Return what `prompt` adds after an answer: the turn's end, the user's message, and the next turn's opening.

        A control token follows an answer, so no text is encoded across this boundary, and these ids can be appended.
        """
        asked = [{"role": "user", "content": "x"}]
        answered = [*asked, {"role": "assistant", "content": self.opening}, {"role": "user", "content": content}]
        tokens, media = self.prompt(answered)
        return tokens[len(self.encode(asked)) :], media

    def _control(self, text: str) -> list[Piece]:
        """Replace the names of control tokens in one of the format's strings by their ids."""
        pieces, ids = re.split("(<.*?>)", text), self.tokenizer.special_tokens
        if lacking := set(pieces[1::2]) - ids.keys():
            raise UnsupportedError(f"the tokenizer lacks the token {min(lacking)} of the {self.family} chat format.")
        return [[ids[piece]] if n % 2 else piece for n, piece in enumerate(pieces)]

    def _turns(self, messages: list[dict]) -> list[Turn]:
        """Check all messages and return their roles and parts."""
        if not isinstance(messages, list) or not messages:
            raise InputError("messages must be a list with at least one {'role': ..., 'content': ...}.")
        turns = []
        for n, message in enumerate(messages):
            if not isinstance(message, dict) or message.keys() != {"role", "content"}:
                raise InputError(f"message {n} must be a dict of 'role' and 'content', got {message!r:.80}.")
            role, parts = message["role"], self._parts(message["content"], f"message {n}")
            if role not in ("user", "assistant") and (role != "system" or n):
                raise InputError(f"message {n} has the role {role!r}; use user, assistant or, for the first, system.")
            if role != "user" and any(isinstance(part, Prepared) for part in parts):
                raise InputError(f"message {n} has an image or video; only messages with the role user may have one.")
            if role == "user" and not any(isinstance(part, Prepared) or part.strip() for part in parts):
                raise InputError(f"message {n} has the role user, but it is empty.")
            turns.append((role, parts))
        return turns

    def _parts(self, content: str | list[dict[str, Any]], where: str) -> list[str | Prepared]:
        """Return a message's images and videos, prepared, and the texts between them."""
        if isinstance(content, str):
            return [content]
        if not isinstance(content, list) or not content:
            raise InputError(f"{where}: the content must be text or a list of parts, got {content!r:.80}.")
        parts, takes = [], () if self.vision is None else self.vision.marks
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in ("image", "video") and kind not in takes:
                takes = " and ".join(["text", *(f"{taken}s" for taken in takes)])
                raise UnsupportedError(f"{where} has a part of the type {kind!r}, but this model takes {takes} only.")
            limits = part.keys() & {"min_pixels", "max_pixels"} if kind == "image" else set()
            known = kind in ("text", "image", "video") and part.keys() - limits == {"type", kind}
            if not known or (kind == "text" and not isinstance(part["text"], str)):
                raise InputError(f"{where}: a part must be like {{'type': 'text', 'text': 'Hi'}}, got {part!r:.80}.")
            if kind != "text":
                given = Image(part[kind], **{name: part[name] for name in limits}) if limits else part[kind]
                parts.append(self.vision.prepare(kind, given))
            elif parts and isinstance(parts[-1], str):
                parts[-1] += part["text"]
            else:
                parts.append(part["text"])
        return parts


class Llama3(ChatFormat):
    """Llama-3 and 3.1. In 3.1 there is always a system message, which begins with two dates."""

    family = "Llama-3"
    ends = ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")
    bos = "<|begin_of_text|>"
    before = "<|start_header_id|>{}<|end_header_id|>\n\n"
    after = "<|eot_id|>"
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"

    def arrange(self, turns):
        turns = [(role, ["".join(parts).strip()]) for role, parts in turns]
        template = self.tokenizer.chat_template  # None with Meta's own files, which are those of 3.1
        if template is None or "Cutting Knowledge Date" in template:
            system = turns.pop(0)[1] if turns[0][0] == "system" else []
            turns.insert(0, ("system", [self.dates, *system]))
        return turns


class ChatML(ChatFormat):
    """SmolLM2, Qwen3 and others.

    SmolLM2 adds a default system message to a conversation without one.
    Some models always think first. Their template opens the model's turn with <think>. The thoughts, up to </think>,
    are part of the answer and stay in the conversation. To Qwen's tokenizer, these tags are ordinary tokens.
    """

    family = "ChatML"
    ends = ("<|im_end|>", "<|endoftext|>")
    before = "<|im_start|>{}\n"
    after = "<|im_end|>\n"
    smollm2_system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    thinks = re.compile(r"""assistant(\\n|\n)<think>(\\n|\n)['"]""")  # the end of a string literal in the template

    @property
    def opening(self) -> str:
        return "<think>\n" if self.thinks.search(self.tokenizer.chat_template or "") else ""

    def arrange(self, turns):
        if turns[0][0] != "system" and self.smollm2_system in (self.tokenizer.chat_template or ""):
            turns = [("system", [self.smollm2_system]), *turns]
        return turns


class Gemma(ChatFormat):
    """Gemma-3. It does not know the role system, so the system's text goes before the user's first message."""

    family = "Gemma"
    ends = ("<end_of_turn>", "<eos>")
    bos = "<bos>"
    before = "<start_of_turn>{}\n"
    after = "<end_of_turn>\n"
    assistant = "model"

    def arrange(self, turns):
        system = []
        if turns[0][0] == "system":
            system, turns = [*turns[0][1], "\n\n"], turns[1:]
        roles = [role for role, _ in turns]
        if not roles or roles != [("user", "assistant")[n % 2] for n in range(len(roles))]:
            raise InputError(f"Gemma takes turns of user and assistant, not of {', '.join(roles) or 'system'}.")
        turns = [(role, [part.strip() if isinstance(part, str) else part for part in parts]) for role, parts in turns]
        return [("user", [*system, *turns[0][1]]), *turns[1:]]


FORMATS = (Llama3, ChatML, Gemma)


def chat_format(tokenizer: Tokenizer, vision: Processor | None = None) -> ChatFormat:
    """Choose the chat format by the tokenizer's control tokens. Arguments and errors as for ChatFormat."""
    marks = [form.before.partition("{}")[0] for form in FORMATS]
    for form, mark in zip(FORMATS, marks, strict=True):
        if mark in tokenizer.special_tokens:
            return form(tokenizer, vision)
    raise UnsupportedError(f"no chat format is known for this tokenizer: it has none of the tokens {', '.join(marks)}.")
