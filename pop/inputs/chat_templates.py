"""A checkpoint's own chat_template as its chat format.

The template is a program in Jinja, which jinja2 runs in its sandbox. It is rendered twice: with the texts of a
conversation, and with a random mark in place of each text. What stands between the marks is the template's own, and
only there do names of control tokens become ids. Both must write the same conversation, so a template that changes
texts in a way that `_Text` does not follow is refused.
"""

import datetime
import functools
import json
import re
import secrets
from collections.abc import Callable, Iterable
from typing import Any

from pop.errors import InputError, MissingExtra, PopError, UnsupportedError
from pop.inputs.chat import ChatFormat, Turn, tool_call
from pop.inputs.processors import Prepared, Processor
from pop.inputs.tokenizers import Tokenizer

_CONTENT = (
    "{% macro written(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{{ part.text if part.type == 'text' else marks[part.type] }}{% endfor %}{% endif %}{% endmacro %}"
)
_LLAMA_31 = (
    "<|begin_of_text|>{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% endif %}<|start_header_id|>system<|end_header_id|>\n\n"
    "{{ 'Environment: ipython\n' if tools }}Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    "{{ system }}<|eot_id|>{% if tools %}{% if not messages or messages[0].role != 'user' %}"
    "{{ raise_exception('the tools stand in the user\\'s first message, but it begins otherwise') }}{% endif %}"
    "<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, please respond with a JSON for a "
    "function call with its proper arguments that best answers the given prompt.\n\nRespond in the format "
    '{"name": function name, "parameters": dictionary of argument name and its value}.Do not use variables.\n\n'
    "{% for tool in tools %}{{ tool | tojson(indent=4) }}\n\n{% endfor %}{{ messages[0].content | trim }}<|eot_id|>"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}<|start_header_id|>"
    "{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n{% if m.tool_calls %}"
    "{% if m.tool_calls | length > 1 %}{{ raise_exception('Llama calls one tool at a time') }}{% endif %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}{{ m.content | tojson if m.role in ('tool', 'ipython') else m.content | trim }}{% endif %}<|eot_id|>"
    "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt }}"
)
_CHATML = _CONTENT + (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ written(m.content) }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)
_GEMMA = (
    "<bos>{% if messages[0].role == 'system' %}{% set system = messages[0].content ~ '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages or [{}] %}"
    "{% if m.role != ('user', 'assistant')[loop.index0 % 2] %}"
    "{{ raise_exception('Gemma takes turns of user and assistant, not of ' ~ "
    "(messages | map(attribute='role') | join(', ') or 'system')) }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ system if loop.first }}"
    "{% for part in ([{'type': 'text', 'text': m.content}] if m.content is string else m.content) %}"
    "{{ part.text | trim if part.type == 'text' else marks[part.type] }}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{{ '<start_of_turn>model\n' if add_generation_prompt }}"
)
# For checkpoints without a template: what `chat_format` of `pop.load` may name. `marks` are the family's for images.
TEMPLATES = {"llama-3.1": _LLAMA_31, "chatml": _CHATML, "gemma": _GEMMA}


def chat_format(tokenizer: Tokenizer, vision: Processor | None = None, choice=None) -> ChatFormat:
    """Return the chat format of a checkpoint, or the caller's choice. See `chat_format` in `pop.load`.

    Raises UnsupportedError if there is none, and MissingExtra without jinja2.
    """
    if isinstance(choice, type) and issubclass(choice, ChatFormat):
        return choice(tokenizer, vision)
    choices = f"{', '.join(map(repr, TEMPLATES))}, a template in Jinja as text, or a subclass of pop.ChatFormat"
    if choice is None and tokenizer.chat_template:
        return TemplateFormat(tokenizer, vision, tokenizer.chat_template, tokenizer.tool_template)
    choice = tokenizer.chat_format if choice is None else choice
    if choice is None:
        base = "the checkpoint has no chat_template, so it is a base model"
        raise UnsupportedError(f"{base}: use generate, or pass chat_format= {choices}")
    if not isinstance(choice, str) or (choice not in TEMPLATES and "{" not in choice):
        raise InputError(f"chat_format is {choice!r:.80}; it must be one of {choices}")
    names = re.findall(r"<\|?\w+\|?>", TEMPLATES.get(choice, ""))
    if lacking := [name for name in names if name not in [*tokenizer.special_tokens, *tokenizer.added_tokens]]:
        raise UnsupportedError(f"the tokenizer lacks the token {lacking[0]} of the chat format {choice!r}")
    return TemplateFormat(tokenizer, vision, TEMPLATES.get(choice, choice))


def _render(source: str, variables, messages: list, tools=None, now=None, enable_thinking=True, **options) -> str:
    """Write a conversation as transformers does."""

    def refuse(message):
        raise InputError(f"the checkpoint's chat_template refuses the conversation: {message!s:.200}")

    options = {"add_generation_prompt": True} | options | ({} if enable_thinking else {"enable_thinking": False})
    options |= {"strftime_now": (now or datetime.datetime.now()).strftime, "raise_exception": refuse}
    try:
        return _compile(source).render(dict(variables), messages=messages, tools=tools or None, **options)
    except PopError:
        raise
    except Exception as error:  # whatever a program may do
        what = f"{type(error).__name__}: {error!s:.200}"
        raise UnsupportedError(f"the checkpoint's chat_template fails ({what}); pass another chat_format=") from error


@functools.lru_cache
def _compile(source: str):
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        wanted = "pip install 'pop-prefill[jinja]', or pass chat_format= a subclass of pop.ChatFormat"
        raise MissingExtra(f"to run the checkpoint's chat_template, jinja2 is missing; {wanted}") from None
    options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"]}
    environment = ImmutableSandboxedEnvironment(**options)
    environment.filters["tojson"], environment.concat = _tojson, _concat
    # {% generation %} marks answers for training.
    source = re.sub(r"({%-?\s*)(end)?generation(?=\s*-?%})", lambda m: m[1] + ("endif" if m[2] else "if true"), source)
    return environment.from_string(source)


class _Own(str):
    """What a template writes itself, or a word of ours."""


class _Text(str):
    """A text of the caller, as a template sees it. Questions and cuts see the text, and writing it writes a mark.

    The mark is random, so the template cannot make a control token of the text. The sandbox hides names with _.
    """

    def __new__(cls, text: str, marks: dict[str, str]):
        mark = f"x{secrets.token_hex(16)}x"
        marks[mark], self = text, super().__new__(cls, mark)
        self._text, self._marks = text, marks
        return self

    def __str__(self):
        return self

    def __hash__(self):
        return hash(self._text)


def _map(value: Any, change: Callable[[str], str]) -> Any:
    """Change all texts in a JSON value."""
    if isinstance(value, dict):
        return {_map(key, change): _map(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map(part, change) for part in value)
    return change(value) if isinstance(value, str) else value


def _mark(value: Any, marks: dict[str, str]) -> Any:
    return _map(value, lambda text: text if isinstance(text, _Own) else _Text(text, marks))


def _unmark(value: Any) -> Any:
    return _map(value, lambda text: getattr(text, "_text", text))


def _on_the_text(method: Callable) -> Callable:
    return lambda self, *given, **named: _mark(method(self._text, *_unmark(given), **named), self._marks)


for _name in (
    *("strip", "lstrip", "rstrip", "split", "rsplit", "partition", "rpartition", "removeprefix", "removesuffix"),
    *("startswith", "endswith", "find", "rfind", "index", "rindex", "count", "isspace", "lower", "upper"),
    *("__contains__", "__getitem__", "__len__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"),
):
    setattr(_Text, _name, _on_the_text(getattr(str, _name)))


def _concat(parts: Iterable[str]) -> str:
    """Join what a macro writes. If it writes texts of the caller only, questions about them are still answered."""
    parts = [part for part in parts if part]
    whole = "".join(parts)
    is_text = bool(parts) and all(isinstance(part, _Text) for part in parts)
    return _Text("".join(part._text for part in parts), parts[0]._marks) if is_text else whole


def _tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    marked: list[_Text] = []
    _map(value, lambda text: marked.append(text) or text if isinstance(text, _Text) else text)
    options = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators, "sort_keys": sort_keys}
    text = json.dumps(_unmark(value), **options)
    return _Text(text, marked[0]._marks) if marked else text


class TemplateFormat(ChatFormat):
    """A chat format that a template in Jinja writes, and `tool_template` where there are tools."""

    family, tools = "checkpoint's own", True

    def __init__(self, tokenizer: Tokenizer, vision: Processor | None, template: str, tool_template: str | None = None):
        self.tokenizer, self.vision = tokenizer, vision
        self._template, self._tool_template = template, tool_template or template
        pieces = self._render([_ASKED, _ANSWER, _ASKED])
        if "b" not in pieces:
            raise UnsupportedError("the chat_template does not write the messages; pass another chat_format=")
        n = pieces.index("b")
        names = [self._names(piece) for piece in pieces]
        # Tokens that are not special, but that the template writes around messages, are reserved for it.
        self.tokenizer = tokenizer.reserving([name for around in names for name in around])
        self.before = "".join(names[0][-1:]) + "{}"
        self.ends = (*names[n + 1][:1], tokenizer.template_variables.get("eos_token", ""), *_ENDS)
        prompt, begun = "".join(self._render([_ASKED])), "".join(pieces[:n])
        self._continues = prompt.startswith(begun.rstrip())  # up to the answer, it writes a prompt in the same way
        self.opening = prompt[len(begun) :] if self._continues else ""

    def spell(self, messages, add_generation_prompt=True, tools=None, enable_thinking=True):
        turns, tools = self._turns(messages), self._tools(tools)
        told = [_told(message, turn) for message, turn in zip(messages, turns, strict=True)]
        options = {"add_generation_prompt": add_generation_prompt, "enable_thinking": enable_thinking}
        pieces = self._render(told, tools, **options)
        uncalled = [{key: value for key, value in message.items() if key != "tool_calls"} for message in told]
        for what, less in (("tools", (told, [])), ("tool calls", (uncalled, tools))):
            if less != (told, tools) and self._render(*less, **options) == pieces:
                raise UnsupportedError(f"the chat_template leaves out the {what}; put them into a message")
        if add_generation_prompt and not enable_thinking and pieces[-1].endswith("<think>\n"):
            raise UnsupportedError("the model always thinks; leave out enable_thinking=False")
        return self._show(pieces, turns)

    def next_prompt(self, content):
        turns = self._turns([message := {"role": "user", "content": content}])
        begun, last = [_ASKED, _ANSWER], _told(message, turns[0])
        pieces, longer = self._render([*begun, last]), self._render([*begun, *begun, last])
        n = pieces.index("b")
        if not self._continues or longer[n - len(pieces) :] != pieces[n:]:
            raise UnsupportedError("the chat_template rewrites earlier turns; answer whole lists of messages with chat")
        return self._encode(self._show(pieces[n + 1 :], turns))

    def _render(self, conversation: list[dict], tools=(), **options) -> list[str]:
        """Return a conversation in pieces: the template's own, and the caller's texts."""
        source = self._tool_template if tools else self._template
        variables = {"marks": {} if self.vision is None else self.vision.marks} | self.tokenizer.template_variables
        options["now"], marks = datetime.datetime.now(), {}
        text = _render(source, variables, conversation, tools, **options)
        written = _render(source, variables, _mark(conversation, marks), _mark(tools, marks), **options)
        pieces = [marks.get(piece, _Own(piece)) for piece in re.split("(x[0-9a-f]{32}x)", written)]
        if "".join(pieces) != text:
            raise UnsupportedError("the chat_template changes texts as pop does not follow; pass another chat_format=")
        return pieces

    def _show(self, pieces: list[str], turns: list[Turn]) -> list[str | Prepared]:
        """Put images and videos in place of the marks that the template writes for them."""
        media = [part for turn in turns for part in turn.parts if isinstance(part, Prepared)]
        if not media:
            return pieces
        marks = "|".join(map(re.escape, self.vision.marks.values()))
        split = [re.split(f"({marks})", piece) if isinstance(piece, _Own) else [piece] for piece in pieces]
        if [mark for parts in split for mark in parts[1::2]] != [self.vision.marks[one.kind] for one in media]:
            raise UnsupportedError("the chat_template does not write each image and video; pass another chat_format=")
        left, shown = iter(media), []
        for piece, parts in zip(pieces, split, strict=True):
            shown += [next(left) if n % 2 else type(piece)(part) for n, part in enumerate(parts)]
        return shown

    def _encode(self, pieces):
        split = [self.tokenizer.split(piece, True) if isinstance(piece, _Own) else [piece] for piece in pieces]
        return super()._encode([part for parts in split for part in parts])

    def _names(self, piece: str) -> list[str]:
        """Return the names of the tokens that a piece of the template's own spells."""
        found = self.tokenizer.split(piece, True) if isinstance(piece, _Own) else []
        return [self.tokenizer.decode(part, special=True) for part in found if not isinstance(part, str)]


_ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|endoftext|>", "<eos>")  # which end any answer, if a tokenizer has them
_ASKED, _ANSWER = {"role": _Own("user"), "content": "a"}, {"role": _Own("assistant"), "content": "b"}


def _told(message: dict, turn: Turn) -> dict:
    """Return a message as templates take it."""
    content = turn.text
    if any(isinstance(part, Prepared) for part in turn.parts):
        text = _Own("text")
        content = [{"type": text, "text": p} if isinstance(p, str) else {"type": _Own(p.kind)} for p in turn.parts]
    told = {key: value for key, value in message.items() if key != "tool_calls"}
    told |= {"role": _Own(message["role"]), "content": content}
    return told | ({"tool_calls": [tool_call(*call) for call in turn.calls]} if turn.calls else {})
