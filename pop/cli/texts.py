"""Texts that commands read."""

import contextlib
import sys
from collections.abc import Iterator

from pop.calibration.texts import SHORTEST, default_texts, parted, tokens_needed
from pop.errors import InputError

MOST = 20_000_000  # characters of a text


def read_file(path: str) -> str:
    with reading(path), open(path, encoding="utf-8") as file:
        text = file.read(MOST + 1)  # a pipe may have no end
    if len(text) > MOST:
        raise InputError(f"{path} has more than {MOST:,} characters; give a part of it")
    if not text:
        raise InputError(f"{path} holds no text; give another file")
    return text


@contextlib.contextmanager
def reading(source: str) -> Iterator[None]:
    """Raise InputError, which names the source, if the block cannot read it."""
    try:
        yield
    except UnicodeDecodeError:
        raise InputError(f"{source} is not text in UTF-8; convert it, or give another file") from None
    except OSError as error:
        raise InputError(f"{source} cannot be read ({error.strerror}); check the path") from None


def calibration_texts(model, paths: list[str], given: list[str]) -> tuple[list[str], list[str] | None]:
    """The parts of texts to fit and to judge the plan by. Built-in texts are fitted too if the given ones are short.

    None: no text is given, so the plan is judged as by pop.check without texts.
    """
    model.need_tokenizer("calibrate on text")
    fitted, rest = parted(given)
    for path, text in zip(paths, rest, strict=True):
        count = len(model.encode(text, bos=False))
        if count < SHORTEST:
            raise InputError(
                f"the last fifth of {path}, which judges the plan, has {count} tokens, but needs {SHORTEST}; "
                "give a longer text"
            )
    found = sum(len(model.encode(text, bos=False)) for text in fitted)
    needed = tokens_needed(model)
    if found >= needed:
        return fitted, rest
    if given:
        print(f"{found:,} of {needed:,} tokens are given, so built-in texts are fitted as well", file=sys.stderr)
    builtin, _ = parted(default_texts(model))
    return fitted + builtin, rest or None
