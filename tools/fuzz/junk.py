"""Spoilt files: JSON with other values, and bytes that are flipped, cut, repeated or added."""

from __future__ import annotations

import json
from random import Random

JUNK = (
    *(None, True, False, 0, 1, -1, 2, 7, 10**30, 1.5, 1e300),
    *("", "\x00", "\ud800", "a", "../outside/model.safetensors", "/etc/passwd", "x" * 3000),
    *([], {}, [[]], [None], {"": {}}, [0, 1, 2]),
)


def spoilt_json(random: Random, value):
    """A JSON value with one part of it replaced, left out, added or repeated."""
    goes_on = random.random() < 0.9
    if isinstance(value, dict) and value and goes_on:
        name = random.choice([*value])
        if random.random() < 0.1:
            return {other: part for other, part in value.items() if other != name}
        if random.random() < 0.1:
            return value | {random.choice(["", "x", name + "2"]): random.choice(JUNK)}
        return value | {name: spoilt_json(random, value[name])}
    if isinstance(value, list) and value and goes_on:
        at = random.randrange(len(value))
        middle = random.choice([[], [value[at]] * 2, [spoilt_json(random, value[at])]])
        return value[:at] + middle + value[at + 1 :]
    if type(value) is int and random.random() < 0.5:
        return value + random.choice([-1, 1, value])
    return random.choice(JUNK)


def spoilt_bytes(random: Random, data: bytes) -> bytes:
    """Bytes with up to four changes."""
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(data) + 1)
        end = at + random.choice([1, 2, 8, 100])
        old = data[at:end]
        new = random.choice([b"", old * 2, random.randbytes(len(old)), bytes([byte ^ 1 for byte in old]), b"\xff" * 8])
        cut = random.random() < 0.2
        data = data[:at] + new + (b"" if cut else data[end:])
    return data


def spoilt(random: Random, name: str, data: bytes) -> bytes:
    """The content of a file, spoilt as JSON if it is JSON, or in its header if it is of safetensors, or as bytes."""
    as_bytes = random.random() < 0.3
    if as_bytes or not name.endswith((".json", ".plan", ".safetensors")):
        return spoilt_bytes(random, data)
    if data[:1] == b"{":
        return as_json(spoilt_json(random, json.loads(data)))
    size = int.from_bytes(data[:8], "little")
    header = as_json(spoilt_json(random, json.loads(data[8 : 8 + size])))
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def as_json(value) -> bytes:
    return json.dumps(value).encode()
