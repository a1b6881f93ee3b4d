"""Every error that `pop` raises on purpose.

Each is a `PopError` and also the built-in it refines, so both `except pop.PopError` and `except ValueError`
do what a caller expects. A message is one sentence: what is wrong, where, and what to do about it.
"""

from contextlib import suppress
from importlib import import_module
from math import inf
from operator import index
from types import ModuleType


class PopError(Exception):
    """Base class of all errors of this library."""

    def __str__(self) -> str:
        """The message in printable characters."""
        return printable(super().__str__())


class InputError(PopError, ValueError):
    """A prompt, message, token id, length or option that the call cannot take."""


class ContextOverflow(InputError):
    """More tokens than the cache or the model's context holds."""


class PlanError(PopError, ValueError):
    """A pruning plan that contradicts itself or the model."""


class ConfigError(PopError, ValueError):
    """A config.json that is broken, contradicts itself, or asks for something this library does not build."""


class CheckpointError(PopError, ValueError):
    """Weight files that are missing, truncated, corrupt, or not the model that config.json describes."""


class TokenizerError(PopError, ValueError):
    """Tokenizer files that are broken or use a feature this library does not build."""


class UnknownModel(PopError, LookupError):
    """A name that is neither in the registry nor a directory."""


class WeightsNotFound(PopError, FileNotFoundError):
    """A known model whose files are in none of the folders where they may be."""


class DownloadError(PopError, OSError):
    """Files that could not be fetched, or that are not the ones expected."""


class MissingExtra(PopError, ImportError):
    """An optional package that this call needs and that is not installed."""


class UnsupportedError(PopError, NotImplementedError):
    """Something this library knows of and does not do (yet)."""


class CacheMemoryError(PopError, MemoryError):
    """A KV cache, weights with room for one, or an image, that the device has no memory for."""


def printable(text: str) -> str:
    """A text that cannot drive a terminal, whatever it quotes from a file or a server."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def check_count(name: str, value, least: int = 1, most: float = inf, error: type[PopError] = InputError) -> int:
    """Return `value` as an int. Raise `error`, which names it, unless it is an integer from `least` to `most`."""
    with suppress(TypeError):
        number = index(value)
        if least <= number <= most and not isinstance(value, bool):
            return number
    wanted = f"of at least {least}" if most == inf else f"from {least} to {most}"
    raise error(f"{name} is {value!r}; it must be an integer {wanted}")


def some(items: list[str], separator: str = ", ") -> str:
    """Return the first five items, escaped because names in a file may hold anything, and how many more there are."""
    named = separator.join(ascii(item)[1:-1][:200] for item in items[:5])
    return named + (f" and {len(items) - 5} more" if len(items) > 5 else "")


def reason_of(error: Exception) -> str:
    """The class of an error and its message, on one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def import_extra(module: str, package: str, extra: str) -> ModuleType:
    """Import a module of an optional package. Raises MissingExtra with the command that installs it."""
    try:
        return import_module(module)
    except ImportError:
        raise MissingExtra(f"this needs the package {package}; run `pip install 'pop-prefill[{extra}]'`") from None
