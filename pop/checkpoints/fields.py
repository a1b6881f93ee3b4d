"""Read a JSON object field by field, with checks.

A reader takes the fields that it knows. `Fields.finish` then refuses others. Errors name field and value.
"""

from collections.abc import Callable, Container, Iterable
from dataclasses import MISSING
from typing import Any

from pop.errors import ConfigError, some

# Upper limits, far above any real model: a corrupt size must be refused here, not fail in the allocator.
MOST = 2**24
MOST_MODULES = 2**12  # for fields that count modules, or that enter the size of a tensor more than once
MODULES = {
    "num_hidden_layers", "num_attention_heads", "head_dim", "num_experts", "depth", "num_heads", "n_layers", "n_heads",
    "patch_size", "spatial_merge_size", "temporal_patch_size",
}  # fmt: skip
# Fields that have another name in some releases of transformers.
OTHER_NAMES = {
    "dtype": "torch_dtype", "num_experts": "num_local_experts", "image_token_id": "image_token_index",
    "boi_token_id": "boi_token_index", "eoi_token_id": "eoi_token_index", "rope_type": "type",
}  # fmt: skip


class Fields:
    """The fields of a JSON object. A null counts as absent. Fields with two names go by their key in OTHER_NAMES.

    `place` precedes a field's name in messages, such as "text_config.". `left` holds what no reader has taken.
    """

    def __init__(self, values: dict[str, Any], place: str = ""):
        self.left = {name: value for name, value in values.items() if value is not None}
        self.place = place
        self.parts: list[Fields] = []
        if "dtype" in self.left:  # as in transformers, it takes precedence
            self.left.pop("torch_dtype", None)
        for name, other in OTHER_NAMES.items():
            self.add(name, self.left.pop(other, None))

    def add(self, name: str, value: Any) -> None:
        """Add a field. If it is there already, its value must be the same."""
        if value is not None and self.left.setdefault(name, value) != value:
            raise ConfigError(f"{self.called(name)} is given twice, as {self.left[name]!r:.80} and as {value!r:.80}")

    def called(self, name: str) -> str:
        """Return what messages call a field: its full name, and its other name if it has one."""
        full = self.place + name
        return f"{full} ({OTHER_NAMES[name]})" if name in OTHER_NAMES else full

    def take(self, name: str, kind: str, accepts: Callable[[Any], bool], default: Any = MISSING) -> Any:
        """Remove a field and return its value, which must be of a `kind`. Without a default, the field is required."""
        if name not in self.left:
            if default is MISSING:
                raise ConfigError(f"{self.called(name)} is missing")
            return default
        value = self.left.pop(name)
        if not accepts(value):
            raise ConfigError(f"{self.called(name)} must be {kind}, not {value!r:.80}")
        return value

    def integer(self, name: str, default: Any = MISSING, least: int = 1, most: int | None = None) -> int:
        if most is None:
            most = MOST_MODULES if name in MODULES else MOST
        return self.take(name, f"an integer from {least} to {most}", lambda v: _fits(v, least, most), default)

    def integers(self, name: str) -> tuple[int, ...]:
        def accepts(value: Any) -> bool:
            return type(value) is list and all(_fits(number, 0, MOST) for number in value)

        return tuple(self.take(name, f"a list of integers from 0 to {MOST}", accepts))

    def number(self, name: str, default: Any = MISSING) -> float:
        return float(self.take(name, "a positive number", lambda v: type(v) in (int, float) and 0 < v < 1e30, default))

    def boolean(self, name: str, default: Any = False) -> bool:
        return self.take(name, "true or false", lambda v: type(v) is bool, default)

    def choice(self, name: str, known: Iterable[str], default: Any = MISSING) -> str:
        return self.take(name, f"one of {', '.join(known)}", lambda v: v in list(known), default)

    def fixed(self, **only: Any) -> None:
        """Take fields of which only one value is supported. They may be absent, or empty lists."""
        for name, supported in only.items():
            accepts = lambda v, s=supported: v == [] or (v == s and (v is True) == (s is True))  # noqa: E731
            self.take(name, repr(supported), accepts, supported)

    def object(self, name: str) -> dict[str, Any]:
        return self.take(name, "an object", lambda v: type(v) is dict, {})

    def part(self, name: str) -> "Fields":
        """Take an object as fields that `finish` checks together with these."""
        part = Fields(self.object(name), f"{self.place}{name}.")
        self.parts.append(part)
        return part

    def finish(self, unsupported: Container[str] | None = None) -> None:
        """Refuse fields left that are `unsupported`, unless they are off. None: refuse all."""
        refused = []
        for part in (self, *self.parts):
            for name, value in part.left.items():
                if unsupported is None or (name in unsupported and value):
                    refused.append(f"{part.called(name)} = {value!r:.80}")
        if refused:
            advice = "" if unsupported is None else "; remove what the model was trained without"
            raise ConfigError(f"not supported: {some(refused)}{advice}")


def _fits(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most
