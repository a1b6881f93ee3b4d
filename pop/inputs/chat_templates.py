"""Which chat format a checkpoint has, and templates of other formats.

A checkpoint's chat_template is a program in Jinja, which we render in jinja2's sandbox. `recognise` compares what it
writes for a few conversations with our formats. `TemplateFormat` uses the template itself as a format.
"""

import datetime
import functools
import json
import re
import secrets
from collections.abc import Callable
from typing import Any

from pop.errors import InputError, MissingExtra, PopError, UnsupportedError
from pop.inputs.chat import ChatFormat
from pop.inputs.chat_formats import FORMATS, Llama31, Qwen3Instruct, tool_call
from pop.inputs.processors import Prepared, Processor
from pop.inputs.tokenizers import Tokenizer


def chat_format(tokenizer: Tokenizer, vision: Processor | None = None, choice=None) -> ChatFormat:
    """Return the chat format of a checkpoint, or the caller's choice. See `chat_format` in `pop.load`.

    Raises UnsupportedError if the checkpoint has no template, or one of another format.
    """
    if isinstance(choice, type) and issubclass(choice, ChatFormat):
        return choice(tokenizer, vision)
    names, template = ", ".join(map(repr, FORMATS)), tokenizer.chat_template
    choices = f"{names}, 'template' (the checkpoint's own, rendered by jinja2), or a subclass of pop.ChatFormat"
    if choice not in (None, "template", *FORMATS):
        raise InputError(f"chat_format is {choice!r:.80}; it must be one of {choices}")
    if template is None and (choice or tokenizer.chat_format) in (None, "template"):
        base = "the checkpoint has no chat_template, so it is a base model: use generate, or pass chat_format="
        raise UnsupportedError(f"{base} {names}, or a subclass of pop.ChatFormat")
    if choice == "template":
        return TemplateFormat(tokenizer, vision)
    if choice or template is None:
        return FORMATS[choice or tokenizer.chat_format](tokenizer, vision)
    variables = tuple(sorted(tokenizer.template_variables.items()))
    name, tools = recognise(template, tokenizer.tool_template, variables)
    if name is None:
        raise UnsupportedError(f"the checkpoint's chat_template is not of a known format; pass chat_format= {choices}")
    form = FORMATS[name](tokenizer, vision)
    form.tools = tools
    return form


# Conversations that tell the formats apart: whitespace at the ends, system messages, thoughts, and tools.
_ASKED, _AGAIN = {"role": "user", "content": " a\n"}, {"role": "user", "content": "c"}
_SYSTEM, _ANSWER = {"role": "system", "content": " s "}, {"role": "assistant", "content": " b "}
_THOUGHT = {"role": "assistant", "content": "<think>\nt\n</think>\n\nb "}
_PROBES = [
    ([_ASKED], {}),
    ([_SYSTEM, _ASKED, _ANSWER, _AGAIN], {}),
    ([_ASKED, _THOUGHT], {"add_generation_prompt": False}),
    ([_ASKED, _THOUGHT, _AGAIN], {}),
]
_NO_THOUGHT = [([_ASKED], {"enable_thinking": False})]
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"é": {}}}}}
_CALL = {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": {"é": [1]}}}]}
_RESULT = {"role": "tool", "content": "r"}
_TOOL_PROBES = [
    ([_ASKED, _CALL | {"content": ""}, _RESULT, _RESULT], {"tools": [_TOOL, _TOOL]}),
    ([_SYSTEM, _ASKED, _CALL, _RESULT, _CALL, _RESULT, _AGAIN], {"tools": [_TOOL]}),
]


@functools.lru_cache
def recognise(template: str, tool_template: str | None, variables: tuple) -> tuple[str | None, bool]:
    """Return the name of the format that a template spells, or None, and whether the format's tools are the template's.

    Raises MissingExtra without jinja2.
    """

    def spells(form: ChatFormat, source: str, probes: list) -> bool:
        try:
            return all(_render(source, variables, a, **b) == "".join(form.spell(a, **b)) for a, b in probes)
        except (InputError, UnsupportedError):
            return False

    forms = {name: form(None) for name, form in FORMATS.items()}
    probes = {name: _PROBES + _NO_THOUGHT * (form.without_thoughts is not None) for name, form in forms.items()}
    names = [name for name, form in forms.items() if spells(form, template, probes[name])]
    with_tools = [n for n in names if forms[n].tools and spells(forms[n], tool_template or template, _TOOL_PROBES)]
    return next(iter(with_tools + names), None), bool(with_tools)


def _render(source: str, variables, messages: list, tools=None, now=None, enable_thinking=True, **options) -> str:
    """Render a template as transformers does."""

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
        wanted = "pip install 'pop-prefill[jinja]', or pass chat_format= the name of its format"
        raise MissingExtra(f"to read the checkpoint's chat_template, jinja2 is missing; {wanted}") from None
    options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"]}
    environment = ImmutableSandboxedEnvironment(**options)
    environment.filters["tojson"] = _tojson
    # {% generation %} marks answers for training.
    source = re.sub(r"({%-?\s*)(end)?generation(?=\s*-?%})", lambda m: m[1] + ("endif" if m[2] else "if true"), source)
    return environment.from_string(source)


class _Text(str):
    """A text of the caller, as a template sees it. Questions and cuts see the text, and writing it writes a mark.

    The mark is random, so the template cannot make a control token of the text. The sandbox hides names with _.
    """

    def __new__(cls, text: str, marks: dict[str, str]):
        mark = f"x{secrets.token_hex(16)}x"
        marks[mark], self = text, super().__new__(cls, mark)
        self._text, self._marks = text, marks
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
    return _map(value, lambda text: _Text(text, marks))


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


def _tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    marked: list[_Text] = []
    _map(value, lambda text: marked.append(text) or text if isinstance(text, _Text) else text)
    options = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators, "sort_keys": sort_keys}
    text = json.dumps(_unmark(value), **options)
    return _Text(text, marked[0]._marks) if marked else text


class _Own(str):
    """What a template writes itself."""


class TemplateFormat(ChatFormat):
    """The checkpoint's own template as a format.

    The template is rendered twice: with the texts, and with a mark in place of each text. What stands between the marks
    is the template's own, and only there do names of control tokens become ids. Both must write the same conversation,
    so a template that changes texts in a way that `_Text` does not follow is refused.
    """

    family, tools = "checkpoint's own", True

    def __init__(self, tokenizer: Tokenizer, vision: Processor | None = None):
        self.tokenizer, self.vision = tokenizer, vision
        pieces = self._render([self._asked, self._answer, self._asked])
        if "b" not in pieces:
            raise UnsupportedError("the chat_template does not write the messages; pass another chat_format=")
        names = [self._names(piece) for piece in pieces]
        # Tokens that are not special, but that the template writes around messages, are reserved for it.
        self.tokenizer = tokenizer.reserving([name for around in names for name in around])
        self.before = "".join(names[0][-1:]) + "{}"
        self.ends = (*names[pieces.index("b") + 1][:1], tokenizer.template_variables.get("eos_token", ""))

    _asked, _answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}

    def spell(self, messages, add_generation_prompt=True, tools=None, enable_thinking=True):
        conversation = []
        for message, turn in zip(messages, turns := self._turns(messages), strict=True):
            calls = {"tool_calls": [tool_call(*given) for given in turn.calls]} if turn.calls else {}
            conversation.append(message | {"content": turn.text} | calls)
        if any(isinstance(part, Prepared) for turn in turns for part in turn.parts):
            raise UnsupportedError("images and videos need one of pop's own formats; pass its name as chat_format=")
        options = {"add_generation_prompt": add_generation_prompt, "enable_thinking": enable_thinking}
        pieces = self._render(conversation, self._tools(tools), **options)
        if tools and pieces == self._render(conversation, **options):
            raise UnsupportedError("the checkpoint's chat_template leaves out the tools; put them into a message")
        return pieces

    def next_prompt(self, content):
        (turn,) = self._turns([{"role": "user", "content": content}])
        begun, message = [self._asked, self._answer], {"role": "user", "content": turn.text}
        pieces, longer = self._render([*begun, message]), self._render([*begun, *begun, message])
        n = pieces.index("b")
        opened = "".join(self._render([self._asked]))
        if not opened.startswith("".join(pieces[:n]).rstrip()) or longer[n - len(pieces) :] != pieces[n:]:
            raise UnsupportedError("the chat_template rewrites earlier turns; answer whole lists of messages with chat")
        return self._encode(pieces[n + 1 :])

    def parse_tool_calls(self, text):
        return Qwen3Instruct.parse_tool_calls(self, text) or Llama31.parse_tool_calls(self, text)

    def _render(self, conversation: list[dict], tools=(), **options) -> list[str]:
        """Return a conversation in pieces: the template's own, and the caller's texts."""
        source, variables, marks = self.tokenizer.chat_template, self.tokenizer.template_variables, {}
        if tools and self.tokenizer.tool_template:
            source = self.tokenizer.tool_template
        options["now"] = datetime.datetime.now()
        text = _render(source, variables, conversation, tools, **options)
        marked = [_mark(message, marks) | {"role": message["role"]} for message in conversation]
        written = _render(source, variables, marked, _mark(tools, marks), **options)
        pieces = [marks.get(piece, _Own(piece)) for piece in re.split("(x[0-9a-f]{32}x)", written)]
        if "".join(pieces) != text:
            raise UnsupportedError("the chat_template changes texts as pop does not follow; pass another chat_format=")
        return pieces

    def _encode(self, pieces):
        split = [self.tokenizer.split(piece, True) if isinstance(piece, _Own) else [piece] for piece in pieces]
        return super()._encode([part for parts in split for part in parts])

    def _names(self, piece: str) -> list[str]:
        """Return the names of the tokens that a piece of the template's own spells."""
        found = self.tokenizer.split(piece, True) if isinstance(piece, _Own) else []
        return [self.tokenizer.decode(part, special=True) for part in found if not isinstance(part, str)]
