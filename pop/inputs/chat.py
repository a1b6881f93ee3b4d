"""Chat formats: conversations to token ids, as each family of instruct models was trained on them.

A format is a checkpoint's chat_template, or the caller's choice (chat_templates.py). Control tokens come from what the
template writes itself. The text of a message is encoded as text, so nothing that a user writes can become one.
"""

import json
import re
from typing import Any

from pop.errors import InputError, UnsupportedError
from pop.inputs.chat_templates import TEMPLATES, Own, Template, jinja, write
from pop.inputs.images import Image
from pop.inputs.processors import Prepared, Processor
from pop.inputs.tokenizers import Tokenizer

# The roles, and what messages may have besides a role and their content.
_RESULT = ("name", "tool_call_id")
KEYS = {"system": (), "user": (), "assistant": ("tool_calls", "reasoning_content"), "tool": _RESULT, "ipython": _RESULT}
ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|endoftext|>", "<eos>")  # end any answer, if the tokenizer has them

_ASKED, _ANSWER = {"role": Own("user"), "content": "a"}, {"role": Own("assistant"), "content": "b"}


def chat_format(tokenizer: Tokenizer, vision: Processor | None = None, choice=None) -> "ChatFormat":
    """Return the chat format of a checkpoint, or the caller's choice. See `chat_format` in `pop.load`.

    Raises UnsupportedError if there is none, or if the choice does not fit the tokenizer; MissingExtra without jinja2.
    """
    if choice is None and tokenizer.chat_template:
        template = jinja(tokenizer.chat_template)
        return ChatFormat(tokenizer, vision, template, tokenizer.tool_template and jinja(tokenizer.tool_template))
    choices = f"{', '.join(map(repr, TEMPLATES))}, a template in Jinja as text, or a function"
    choice = tokenizer.chat_format if choice is None else choice
    if choice is None:
        base = "the checkpoint has no chat_template, so it is a base model"
        raise UnsupportedError(f"{base}: use generate, or pass chat_format= {choices}")
    if isinstance(choice, str) and (choice in TEMPLATES or "{" in choice):
        template = jinja(TEMPLATES.get(choice, choice))
    elif callable(choice) and not isinstance(choice, type):
        template = choice
    else:
        raise InputError(f"chat_format is {choice!r:.80}; it must be one of {choices}")
    form = ChatFormat(tokenizer, vision, template)
    if not form.ends[0]:
        raise UnsupportedError(f"chat_format {choice!r:.80} ends an answer with no token that the tokenizer has")
    return form


class ChatFormat:
    """How a template writes conversations. Without a `vision` processor, it takes text only."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vision: Processor | None,
        template: Template,
        tool_template: Template | None = None,  # where there are tools
    ):
        self.tokenizer, self.vision = tokenizer, vision
        self._template, self._tool_template = template, tool_template or template
        pieces = self._write([_ASKED, _ANSWER, _ASKED])
        n, names = _answer_in(pieces), [self._names(piece) for piece in pieces]
        # Tokens that are not special, but that the template writes around messages, are reserved for it.
        self.tokenizer = tokenizer.reserving([name for around in names for name in around])
        self.before = "".join(names[0][-1:])  # the last control token before a user's message
        self.ends = ("".join(names[n + 1][:1]), tokenizer.template_variables.get("eos_token", ""), *ENDS)
        prompt, begun = "".join(self._write([_ASKED])), "".join(pieces[:n])
        self._continues = prompt.startswith(begun.rstrip())  # up to the answer, it writes a prompt in the same way
        self.opening = prompt[len(begun) :] if self._continues else ""  # the text that opens the model's turn

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        ids = self.tokenizer.special_tokens
        return tuple(ids[name] for name in dict.fromkeys(self.ends) if name in ids)

    def encode(self, messages: list[dict], add_generation_prompt: bool = True, **options) -> list[int]:
        """Return the token ids of a conversation. Arguments as for `spell`."""
        return self.prompt(messages, add_generation_prompt, **options)[0]

    def prompt(self, messages, add_generation_prompt: bool = True, **options) -> tuple[list[int], list[Prepared]]:
        """Return a conversation's token ids and its images and videos in order. Arguments as for `spell`."""
        return self._encode(self.spell(messages, add_generation_prompt, **options))

    def next_prompt(self, content, enable_thinking: bool = True) -> tuple[list[int], list[Prepared]]:
        """Return what `prompt` adds after an answer: the turn's end, the user's message, and the next turn's opening.

        A control token follows an answer, so no text is encoded across this boundary, and these ids can be appended.
        """
        told, media = self._told([{"role": "user", "content": content}])
        begun, options = [_ASKED, _ANSWER], _thinking(enable_thinking)
        pieces, longer = self._write([*begun, *told], **options), self._write([*begun, *begun, *told], **options)
        n = _answer_in(pieces)
        if not self._continues or longer[n - len(pieces) :] != pieces[n:]:
            raise UnsupportedError("the chat_template rewrites earlier turns; answer whole lists of messages with chat")
        return self._encode(self._show(pieces[n + 1 :], media))

    def spell(
        self,
        messages: list[dict],
        add_generation_prompt: bool = True,
        tools: list[dict] | None = None,
        enable_thinking: bool = True,
    ) -> list[str | Prepared]:
        """Return a conversation in pieces: what the template writes, texts, images and videos.

        Args:
            messages: As in `pop.Model.chat`. Only the first may be a system message.
            add_generation_prompt: Open the model's turn at the end.
            tools: The JSON schemas of functions that the model may call.
            enable_thinking: False asks a model that may think to answer at once.
        """
        told, media = self._told(messages)
        if tools and (not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools)):
            raise InputError(f"tools must be a list of dicts, the JSON schemas of functions, got {tools!r:.80}")
        try:
            json.dumps([told, tools])
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"a tool, or a call of one, cannot be written as JSON: {error}") from None
        tools, options = tools or [], {"add_generation_prompt": add_generation_prompt, **_thinking(enable_thinking)}
        pieces = self._write(told, tools, **options)
        uncalled = [{key: value for key, value in message.items() if key != "tool_calls"} for message in told]
        for what, less in (("tools", (told, [])), ("tool calls", (uncalled, tools))):
            if less != (told, tools) and self._write(*less, **options) == pieces:
                raise UnsupportedError(f"the chat_template leaves out the {what}; put them into a message")
        if add_generation_prompt and not enable_thinking and pieces[-1].endswith("<think>\n"):
            raise UnsupportedError("the model always thinks; leave out enable_thinking=False")
        return self._show(pieces, media)

    def parse_tool_calls(self, text: str) -> list[dict]:
        """Return the calls in an answer, as a message has them under "tool_calls".

        A call is JSON: in Qwen3 between tags, with "arguments", and in Llama the whole answer, with "parameters".
        """
        tagged, calls = re.findall(r"<tool_call>(.*?)</tool_call>", text, re.DOTALL), []
        for found in tagged or [text]:
            try:
                call = json.loads(found)
                calls.append(_call(call["name"], call["arguments" if tagged else "parameters"]))
            except (ValueError, LookupError, TypeError, RecursionError):
                if tagged:
                    raise InputError(f"a tool call is not JSON with a name and arguments: {found!r:.80}") from None
        return calls  # none in an answer in words

    def _write(self, told: list[dict], tools=(), add_generation_prompt: bool = True, **options) -> list[str]:
        template = self._tool_template if tools else self._template
        variables = {"marks": {} if self.vision is None else self.vision.marks} | self.tokenizer.template_variables
        return write(template, told, tools, **variables, add_generation_prompt=add_generation_prompt, **options)

    def _show(self, pieces: list[str], media: list[Prepared]) -> list[str | Prepared]:
        """Put images and videos in place of the marks that the template writes for them."""
        if not media:
            return pieces
        own = [piece for piece in pieces if isinstance(piece, Own)]
        split = iter(self.vision.split_at_marks(own, media, "chat_template"))
        shown = []
        for piece in pieces:
            parts = next(split) if isinstance(piece, Own) else [piece]
            shown += [type(piece)(part) if isinstance(part, str) else part for part in parts]
        return shown

    def _encode(self, pieces: list[str | Prepared]) -> tuple[list[int], list[Prepared]]:
        encoded = []
        for piece in pieces:
            if isinstance(piece, Prepared):
                encoded += piece.pieces
            else:
                encoded += self.tokenizer.split(piece, True) if isinstance(piece, Own) else [piece]
        return self.tokenizer.encode_pieces(encoded, bos=False), [one for one in pieces if isinstance(one, Prepared)]

    def _names(self, piece: str) -> list[str]:
        """Return the names of the tokens that a piece of the template's own spells."""
        found = self.tokenizer.split(piece, True) if isinstance(piece, Own) else []
        return [self.tokenizer.decode(part, special=True) for part in found if not isinstance(part, str)]

    def _told(self, messages: list[dict]) -> tuple[list[dict], list[Prepared]]:
        """Check all messages. Return them as templates take them, and their images and videos in order."""
        if not isinstance(messages, list) or not messages:
            raise InputError("messages must be a list with at least one {'role': ..., 'content': ...}.")
        told, media = [], []
        for n, message in enumerate(messages):
            role = message.get("role", "user") if isinstance(message, dict) else "user"
            if not isinstance(role, str) or role not in KEYS or (role == "system" and n):
                raise InputError(f"message {n} has the role {role!r}; use user, assistant or, for the first, system.")
            needed = {"role"} if role == "assistant" and message.get("tool_calls") else {"role", "content"}
            if not isinstance(message, dict) or not needed <= message.keys() <= {"role", "content", *KEYS[role]}:
                raise InputError(f"message {n} must be a dict of 'role' and 'content', got {message!r:.80}.")
            calls = _calls(message.get("tool_calls"), f"message {n}")
            content, thoughts = message.get("content"), message.get("reasoning_content")
            parts = self._parts("" if calls and content is None else content, f"message {n}")
            shown = [part for part in parts if isinstance(part, Prepared)]
            if shown and role != "user":
                raise InputError(f"message {n} has an image or video; only messages with the role user may have one.")
            if role == "user" and not any(isinstance(part, Prepared) or part.strip() for part in parts):
                raise InputError(f"message {n} has the role user, but it is empty.")
            if not isinstance(thoughts, str | None):
                raise InputError(f"message {n}: reasoning_content must be text, got {thoughts!r:.80}.")
            typed = [{"type": Own("text"), "text": x} if isinstance(x, str) else {"type": Own(x.kind)} for x in parts]
            content = typed if shown else "".join(parts)
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            told.append(rest | {"role": Own(role), "content": content} | ({"tool_calls": calls} if calls else {}))
            media += shown
        return told, media

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


def _thinking(enable: bool) -> dict[str, bool]:
    """Return the template's variable, which stays undefined by default."""
    return {} if enable else {"enable_thinking": False}


def _answer_in(pieces: list[str]) -> int:
    """Return where the text of _ANSWER is, which a template may write in upper case."""
    try:
        return [piece.lower() for piece in pieces].index("b")
    except ValueError:
        raise UnsupportedError("the chat_template does not write the messages; pass another chat_format=") from None


def _calls(calls: list[dict] | None, where: str) -> list[dict]:
    """Return a message's tool calls, with their arguments as dicts."""
    try:
        calls = [call.get("function", call) for call in calls or ()]
        calls = [(call["name"], call["arguments"]) for call in calls]
        calls = [(name, json.loads(given) if isinstance(given, str) else given) for name, given in calls]
        if all(isinstance(name, str) and isinstance(given, dict) for name, given in calls):
            return [_call(name, given) for name, given in calls]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        pass
    like = _call("f", {"x": 1})
    raise InputError(f"{where}: tool_calls must be a list of dicts like {like}")


def _call(name: str, arguments: Any) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def split_thoughts(text: str) -> tuple[str, str]:
    """Return the thoughts and the answer of a text with <think>...</think>, whose first tag may be in the prompt."""
    if "</think>" not in text:
        return "", text
    thoughts, *_, answer = text.split("</think>")
    return thoughts.rstrip("\n").split("<think>")[-1].lstrip("\n"), answer.lstrip("\n")
