"""Chat formats: conversations to token ids, as each family of instruct models was trained on them.

Control tokens come from a format's own strings only. The text of a message is encoded as text, so nothing that a user
writes can become a control token. The format is a checkpoint's chat_template (chat_templates.py), or a subclass of
ChatFormat that the caller writes.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from pop.errors import InputError, UnsupportedError
from pop.inputs.images import Image
from pop.inputs.processors import Prepared, Processor
from pop.inputs.tokenizers import Tokenizer

# What messages may have besides a role and their content. Templates ignore a result's name and id.
_RESULT = {"name", "tool_call_id"}
KEYS = {"assistant": {"tool_calls", "reasoning_content"}, "tool": _RESULT, "ipython": _RESULT}


class Control(str):
    """The name of a control token, from a format's own strings."""


class Turn(NamedTuple):
    """A message: who speaks, and the texts, images and videos in order."""

    role: str
    parts: list[str | Prepared]
    calls: Sequence[tuple[str, dict]] = ()  # the names and arguments of tools that the model calls
    thoughts: str | None = None  # what the model thought before it answered, if the caller keeps this apart

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))


class ChatFormat:
    """One family's format. Without a `vision` processor, it takes text only.

    A subclass is a format in Python: it has at least `family`, `ends`, `before` and `after`. In these strings <...> is
    a control token. `arrange` returns the turns that are written: with default messages, and without whitespace that
    the format drops.
    """

    family: str
    ends: tuple[str, ...]  # the tokens that may end the model's turn
    # What the format writes at the beginning and around each message.
    bos = ""
    before: str  # with {} for the role
    after: str
    assistant = "assistant"  # the name of the model's role
    opening = ""  # the text in the prompt that opens the model's turn
    tools = False  # whether `arrange` takes tools, turns with calls, and turns with the role tool

    def __init__(self, tokenizer: Tokenizer, vision: Processor | None = None):
        names = re.findall("<.*?>", self.bos + self.before + self.after)
        self.tokenizer, self.vision = tokenizer.reserving([*names, *self.ends]), vision

    def arrange(self, turns: list[Turn], tools: list[dict]) -> list[Turn]:
        return turns

    def parse_tool_calls(self, text: str) -> list[dict]:
        """Return the calls in an answer, as a message has them under "tool_calls".

        A call is JSON: in Qwen3 between tags, with "arguments", and in Llama the whole answer, with "parameters".
        """
        if not self.tools:
            raise UnsupportedError(f"the {self.family} chat format has no tools")
        tagged, calls = re.findall(r"<tool_call>(.*?)</tool_call>", text, re.DOTALL), []
        for found in tagged or [text]:
            try:
                call = json.loads(found)
                calls.append(tool_call(call["name"], call["arguments" if tagged else "parameters"]))
            except (ValueError, LookupError, TypeError, RecursionError):
                if tagged:
                    raise InputError(f"a tool call is not JSON with a name and arguments: {found!r:.80}") from None
        return calls  # none in an answer in words

    @property
    def end_ids(self) -> tuple[int, ...]:
        ids = self.tokenizer.special_tokens
        return tuple(ids[name] for name in self.ends if name in ids)

    def encode(self, messages: list[dict], add_generation_prompt: bool = True, **options) -> list[int]:
        """Return the token ids of a conversation. Arguments as for `spell`."""
        return self.prompt(messages, add_generation_prompt, **options)[0]

    def prompt(self, messages, add_generation_prompt: bool = True, **options) -> tuple[list[int], list[Prepared]]:
        """Return a conversation's token ids and its images and videos in order. Arguments as for `spell`."""
        return self._encode(self.spell(messages, add_generation_prompt, **options))

    def next_prompt(self, content) -> tuple[list[int], list[Prepared]]:
        """Return what `prompt` adds after an answer: the turn's end, the user's message, and the next turn's opening.

        A control token follows an answer, so no text is encoded across this boundary, and these ids can be appended.
        """
        turns = self.arrange(self._turns([{"role": "user", "content": content}]), [])
        return self._encode([*split_control(self.after), *self._write(turns[-1]), *self._open()])

    def spell(
        self,
        messages: list[dict],
        add_generation_prompt: bool = True,
        tools: list[dict] | None = None,
        enable_thinking: bool = True,
    ) -> list[str | Prepared]:
        """Return a conversation in pieces: control tokens, texts, images and videos.

        Args:
            messages: As in `pop.Model.chat`. Only the first may be a system message.
            add_generation_prompt: Open the model's turn at the end.
            tools: The JSON schemas of functions that the model may call.
            enable_thinking: False asks a model that may think to answer at once.
        """
        turns, tools = self._turns(messages), self._tools(tools)
        pieces = split_control(self.bos)
        for turn in self.arrange(turns, tools):
            pieces += self._write(turn)
        return pieces + (self._open() if add_generation_prompt else [])

    def _write(self, turn: Turn) -> list[str | Prepared]:
        role = self.assistant if turn.role == "assistant" else turn.role
        return [*split_control(self.before.format(role)), *turn.parts, *split_control(self.after)]

    def _open(self) -> list[str]:
        return [*split_control(self.before.format(self.assistant)), self.opening]

    def _encode(self, pieces: list) -> tuple[list[int], list[Prepared]]:
        ids, media, encoded = self.tokenizer.special_tokens, [], []
        for piece in pieces:
            if isinstance(piece, Prepared):
                media.append(piece)
                encoded += piece.pieces
            elif isinstance(piece, Control):
                if piece not in ids:
                    raise UnsupportedError(f"the tokenizer lacks the token {piece} of the {self.family} chat format.")
                encoded.append([ids[piece]])
            else:
                encoded.append(piece)
        return self.tokenizer.encode_pieces(encoded, bos=False), media

    def _tools(self, tools: list[dict] | None) -> list[dict]:
        if not tools:
            return []
        if not self.tools:
            raise UnsupportedError(f"the {self.family} chat format has no tools; put them into a message")
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise InputError(f"tools must be a list of dicts, the JSON schemas of functions, got {tools!r:.80}")
        _check_json(tools, "tools")
        return tools

    def _turns(self, messages: list[dict]) -> list[Turn]:
        """Check all messages and return their turns."""
        if not isinstance(messages, list) or not messages:
            raise InputError("messages must be a list with at least one {'role': ..., 'content': ...}.")
        turns, results = [], ("tool", "ipython") if self.tools else ()
        for n, message in enumerate(messages):
            role = message.get("role") if isinstance(message, dict) else None
            known = {"role", "content"} | (KEYS.get(role, set()) if isinstance(role, str) else set())
            needed = {"role"} if role == "assistant" and message.get("tool_calls") else {"role", "content"}
            if not isinstance(message, dict) or not needed <= message.keys() <= known:
                raise InputError(f"message {n} must be a dict of 'role' and 'content', got {message!r:.80}.")
            calls = self._calls(message.get("tool_calls"), f"message {n}")
            content, thoughts = message.get("content"), message.get("reasoning_content")
            parts = self._parts("" if calls and content is None else content, f"message {n}")
            if role not in ("user", "assistant", *results) and (role != "system" or n):
                raise InputError(f"message {n} has the role {role!r}; use user, assistant or, for the first, system.")
            if role != "user" and any(isinstance(part, Prepared) for part in parts):
                raise InputError(f"message {n} has an image or video; only messages with the role user may have one.")
            if role == "user" and not any(isinstance(part, Prepared) or part.strip() for part in parts):
                raise InputError(f"message {n} has the role user, but it is empty.")
            if not isinstance(thoughts, str | None):
                raise InputError(f"message {n}: reasoning_content must be text, got {thoughts!r:.80}.")
            turns.append(Turn("tool" if role in results else role, parts, calls, thoughts))
        return turns

    def _calls(self, calls: list[dict] | None, where: str) -> list[tuple[str, dict]]:
        """Return the names and arguments of a message's tool calls."""
        if calls and not self.tools:
            raise UnsupportedError(f"{where} calls tools, but the {self.family} chat format has none")
        try:
            calls = [call.get("function", call) for call in calls or ()]
            calls = [(call["name"], call["arguments"]) for call in calls]
            calls = [(name, json.loads(given) if isinstance(given, str) else given) for name, given in calls]
            if all(isinstance(name, str) and isinstance(given, dict) for name, given in calls):
                _check_json(calls, f"{where}: tool_calls")
                return calls
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            pass
        like = "{'type': 'function', 'function': {'name': 'f', 'arguments': {'x': 1}}}"
        raise InputError(f"{where}: tool_calls must be a list of dicts like {like}")

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


def split_control(text: str) -> list[str]:
    """Split one of a format's strings into control tokens and texts."""
    return [Control(piece) if n % 2 else piece for n, piece in enumerate(re.split("(<.*?>)", text))]


def _check_json(value: Any, what: str) -> None:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{what} cannot be written as JSON: {error}") from None


def tool_call(name: str, arguments: Any) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def split_thoughts(text: str) -> tuple[str, str]:
    """Return the thoughts and the answer of a text with <think>...</think>, whose first tag may be in the prompt."""
    if "</think>" not in text:
        return "", text
    thoughts, *_, answer = text.split("</think>")
    return thoughts.rstrip("\n").split("<think>")[-1].lstrip("\n"), answer.lstrip("\n")
