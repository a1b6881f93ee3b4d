"""Templates write a conversation as text: programs in Jinja, run in jinja2's sandbox.

A text of the caller must never become a control token, so names of control tokens in the output prove nothing. Instead
`ControlMarks` changes the template: in its own texts, a lone surrogate stands for each control token. Such a character
is no text, so no message can contain it.
"""

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from pop.errors import InputError, PopError, UnsupportedError, import_extra
from pop.inputs.tokenizers import any_of, splitter

Template = Callable[..., str]  # called with messages, tools and other variables by name

# For checkpoints without a template: what `chat_format` of `pop.load` may name.
FOLDER = Path(__file__).parents[1] / "data" / "chat"
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))}


class ControlMarks:
    """A lone surrogate for each control token whose name is in the texts of a template, for at most 2,048 of them.

    Args:
        ids: The ids of control tokens by name.
        texts: The template, and the variables that it may write.
    """

    def __init__(self, ids: dict[str, int], texts: Iterable[str]):
        found = dict.fromkeys(any_of(ids).findall("\n".join(texts)))
        self._marks = dict(zip(found, map(chr, range(0xD800, 0xE000)), strict=False))
        self._pattern = any_of(self._marks)
        self.split = splitter({mark: ids[name] for name, mark in self._marks.items()})

    def put(self, text: str) -> str:
        """Return a text with marks in place of the names."""
        return self._pattern.sub(lambda match: self._marks[match[0]], text)


def _refuse(message: str) -> None:
    raise InputError(f"the checkpoint's chat_template refuses the conversation: {message!s:.200}")


def _now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def jinja(source: str) -> Template:
    """Return a template in Jinja as a function, with the settings of transformers.

    Raises MissingExtra without jinja2. Every exception that the template raises becomes an UnsupportedError.
    """
    sandbox = import_extra("jinja2.sandbox", "jinja2", "jinja")
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    # {% generation %} ... {% endgeneration %} marks answers for training. It changes nothing in what is written.
    source = re.sub(r"({%-?\s*(end)?)generation(?=\s*-?%})", r"\1with", source)

    @functools.cache
    def compiled():
        return environment.from_string(source)

    def run(**variables) -> str:
        try:
            return compiled().render(variables)
        except PopError:
            raise
        except Exception as error:  # a template is a program, so it can raise anything
            raise UnsupportedError(
                f"the checkpoint's chat_template fails ({type(error).__name__}: {error!s:.200}); "
                "pass another chat_format="
            ) from error

    return run
