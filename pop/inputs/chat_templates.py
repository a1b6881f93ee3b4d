"""Templates write a conversation as text: programs in Jinja, run in jinja2's sandbox, or functions of the caller.

A template is run twice: with the texts of a conversation, and with a random mark in place of each text. Between the
marks, the text is the template's own, and only there do names of control tokens become ids. Both must write the same
conversation, so a template that changes texts in a way that `_Text` does not follow is refused.
"""

import datetime
import functools
import json
import re
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pop.errors import InputError, PopError, UnsupportedError, import_extra

Template = Callable[..., str]  # called with messages, tools and other variables by name

# For checkpoints without a template: what `chat_format` of `pop.load` may name.
FOLDER = Path(__file__).parents[1] / "data" / "chat"
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))}


def write(template: Template, messages: list[dict], tools: list[dict], **variables) -> list[str]:
    """Return a conversation in pieces: each text of the caller, and as `Own` what the template writes around them."""
    marks, now = {}, datetime.datetime.now()
    variables |= {"strftime_now": now.strftime, "raise_exception": _refuse}
    text = template(messages=messages, tools=tools or None, **variables)
    written = template(messages=_mark(messages, marks), tools=_mark(tools, marks) or None, **variables)
    pieces = [marks.get(piece, Own(piece)) for piece in re.split("(x[0-9a-f]{32}x)", written)]
    if "".join(pieces) != text:
        raise UnsupportedError("the chat_template changes texts as pop does not follow; pass another chat_format=")
    return pieces


def _refuse(message: str) -> None:
    raise InputError(f"the checkpoint's chat_template refuses the conversation: {message!s:.200}")


@functools.lru_cache
def jinja(source: str) -> Template:
    """Return a template in Jinja as a function, with the settings of transformers. Raises MissingExtra without jinja2.

    Whatever its program raises becomes an UnsupportedError.
    """
    sandbox = import_extra("jinja2.sandbox", "jinja2, or a function as chat_format=", "jinja")
    options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"]}
    environment = sandbox.ImmutableSandboxedEnvironment(**options)
    environment.filters["tojson"], environment.concat = _tojson, _concat
    # {% generation %} marks answers for training.
    source = re.sub(r"({%-?\s*)(end)?generation(?=\s*-?%})", lambda m: m[1] + ("endif" if m[2] else "if true"), source)
    compiled = functools.cache(environment.from_string)

    def run(**variables) -> str:
        try:
            return compiled(source).render(variables)
        except PopError:
            raise
        except Exception as error:  # whatever a program may do
            what = f"{type(error).__name__}: {error!s:.200}"
            message = f"the checkpoint's chat_template fails ({what}); pass another chat_format="
            raise UnsupportedError(message) from error

    return run


class Own(str):
    """What a template writes itself, or a word of ours in a message."""


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
    return _map(value, lambda text: text if isinstance(text, Own) else _Text(text, marks))


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
