"""Strict reading of JSON objects: every field is taken by name, checked, and nothing is left over unread."""

from collections.abc import Callable
from typing import Any

from pop.errors import ConfigError


class Fields:
    """A JSON object whose fields are taken one by one and checked; `finish` refuses what nobody took.

    The bounds of integers lie above any real model: a corrupt size must end here, not in the allocator.
    """

    def __init__(self, values: dict[str, Any]):
        self.left = {name: value for name, value in values.items() if value is not None}

    def take(self, name: str, kind: str, accepts: Callable[[Any], bool], default: Any = ...) -> Any:
        if name not in self.left:
            if default is ...:
                raise ConfigError(f"the required field {name} is missing")
            return default
        if not accepts(value := self.left.pop(name)):
            raise ConfigError(f"{name} must be {kind}, not {value!r:.80}")
        return value

    def integer(self, name: str, default: Any = ..., least: int = 1, most: int = 2**24) -> int:
        kind = f"an integer from {least} to {most}"
        return self.take(name, kind, lambda v: type(v) is int and least <= v <= most, default)

    def number(self, name: str, default: Any = ...) -> float:
        kind = "a positive number"
        value = self.take(name, kind, lambda v: type(v) in (int, float) and 0 < v < 1e30, default)
        return value if value is None else float(value)

    def boolean(self, name: str) -> bool:
        return self.take(name, "true or false", lambda v: type(v) is bool, False)

    def choice(self, name: str, known: Any, default: Any = ...) -> str:
        return self.take(name, f"one of {', '.join(known)}", lambda v: v in list(known), default)

    def fixed(self, name: str, only: Any) -> None:
        def is_it(value: Any) -> bool:
            return value == only and isinstance(value, bool) == isinstance(only, bool)

        self.take(name, f"{only!r} (nothing else is supported)", is_it, only)

    def finish(self) -> None:
        if self.left:
            named = ", ".join(f"{name} = {value!r:.80}" for name, value in list(self.left.items())[:5])
            raise ConfigError(f"unknown or unsupported: {named}{' ...' if len(self.left) > 5 else ''}")
