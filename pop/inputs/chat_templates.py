"""Templates write a conversation as text: programs in Jinja, run in jinja2's sandbox, or functions of the caller.

A template sees ordinary strings. A text of the caller must never become a control token. So `StandIns` changes the
names of control tokens in the texts before the template runs. Afterwards it restores them in what is encoded as text.
"""

import datetime
import functools
import json
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from pop.errors import InputError, PopError, UnsupportedError, import_extra
from pop.inputs.tokenizers import splitter

Template = Callable[..., str]  # called with messages, tools and other variables by name

# For checkpoints without a template: what `chat_format` of `pop.load` may name.
FOLDER = Path(__file__).parents[1] / "data" / "chat"
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))}

PRIVATE_USE = range(0x100000, 0x10FFF0)  # code points without a meaning, which text hardly ever has
MASK = "\U0010fffb"  # for `masked`
# Values of "role" and "type" that `masked` leaves, since templates compare them.
COMPARED = (
    *("system", "user", "assistant", "tool", "developer", "ipython", "model", "text", "image", "video", "function"),
    *("string", "object", "number", "integer", "boolean", "array", "null"),
)


def write(template: Template, messages: list[dict], tools: list[dict], **variables) -> str:
    """Return what a template writes. The variables are those that templates know from transformers."""
    now = datetime.datetime.now()
    return template(
        messages=messages,
        tools=tools or None,
        strftime_now=now.strftime,
        raise_exception=_refuse,
        **variables,
    )


def _refuse(message: str) -> None:
    raise InputError(f"the checkpoint's chat_template refuses the conversation: {message!s:.200}")


@functools.lru_cache
def jinja(source: str) -> Template:
    """Return a template in Jinja as a function, with the settings of transformers. Raises MissingExtra without jinja2.

    Every exception that the template raises becomes an UnsupportedError.
    """
    sandbox = import_extra("jinja2.sandbox", "jinja2, or a function as chat_format=", "jinja")
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _tojson
    # {% generation %} ... {% endgeneration %} marks answers for training. It changes nothing in what is written.
    source = re.sub(r"({%-?\s*)generation(?=\s*-?%})", r"\1if true", source)
    source = re.sub(r"({%-?\s*)endgeneration(?=\s*-?%})", r"\1endif", source)
    compiled = functools.cache(environment.from_string)

    def run(**variables) -> str:
        try:
            return compiled(source).render(variables)
        except PopError:
            raise
        except Exception as error:  # a template is a program, so it can raise anything
            what = f"{type(error).__name__}: {error!s:.200}"
            message = f"the checkpoint's chat_template fails ({what}); pass another chat_format="
            raise UnsupportedError(message) from error

    return run


def _tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class StandIns:
    """Private-use characters in place of the first characters of control tokens' names in a caller's texts.

    A text keeps its length and nearly all of its characters, so a template can compare it, cut it and trim it as usual.

    Args:
        names: The names to hide. They are found in upper and lower case, because templates may change the case.
        spoken: Those of the names that a model's answers may have, such as <think>. Templates look for them there.
        conversation: All texts of the conversation. None of the stand-ins occurs in it.
    """

    def __init__(self, names: Collection[str], spoken: Collection[str], conversation: str):
        self._begin = _beginnings(names)
        self._begin_in_answers = _beginnings(name for name in names if name not in spoken)
        self._unused = (char for char in map(chr, PRIVATE_USE) if char not in conversation)
        self._stand_ins: dict[str, str] = {}  # by the character that they replace

    def hide(self, messages: list[dict]) -> list[dict]:
        """Return messages or tools with stand-ins in their texts and keys."""
        hidden = []
        for message in messages:
            is_answer = message.get("role") == "assistant"
            hidden.append(self._hide(message, self._begin_in_answers if is_answer else self._begin))
        return hidden

    def _hide(self, value: Any, begin: re.Pattern | None) -> Any:
        if begin is None:
            return value
        if isinstance(value, str):
            return begin.sub(self._stand_in, value)
        if isinstance(value, dict):
            return {self._hide(key, begin): self._hide(part, begin) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [self._hide(part, begin) for part in value]
        return value

    def _stand_in(self, match: re.Match) -> str:
        char = match[0]
        if char not in self._stand_ins:
            found = next(self._unused, None)
            if found is None:
                raise InputError("the conversation has all private-use characters of Unicode's plane 16; remove some")
            self._stand_ins[char] = found
        return self._stand_ins[char]

    def restore(self, text: str) -> str:
        """Return a text with the characters that `hide` replaced."""
        for char, stand_in in self._stand_ins.items():
            text = text.replace(stand_in, char)
        return text


def _beginnings(names: Iterable[str]) -> re.Pattern | None:
    """A pattern of each character at which a name begins. The names may overlap, so they are only looked ahead at."""
    name = splitter(names)
    return name and re.compile(f"(?={name.pattern}).", re.IGNORECASE | re.DOTALL)


def masked(value: Any, is_free: bool = False) -> Any:
    """Return a JSON value with a private-use character in place of every visible one.

    No part of such a text can belong to a control token. What templates look up and compare stays: the words of keys,
    and the usual roles and types. But arguments of calls are `is_free`: their keys are the caller's texts. So are the
    names of a schema's properties.
    """
    if isinstance(value, str):
        return re.sub(r"\S", MASK, value)
    if isinstance(value, list):
        return [masked(part, is_free) for part in value]
    if not isinstance(value, dict):
        return value
    result = {}
    for key, part in value.items():
        name = re.sub(r"\S" if is_free else r"[^\w\s]", MASK, key)
        while name in result:  # two keys of one length
            name += MASK
        if key == "properties" and isinstance(part, dict):
            part = {MASK * number: schema for number, schema in enumerate(part.values(), 1)}
        is_compared = key in ("role", "type") and not is_free and part in COMPARED
        result[name] = part if is_compared else masked(part, is_free or key == "arguments")
    return result
