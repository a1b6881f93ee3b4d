"""Spoilt files: JSON with other values, and bytes that are flipped, cut, repeated or added."""

import json
from random import Random

NUMBERS = (0, 1, -1, 2, 7, 10**30, 1.5, 1e300)
TEXTS = ("", "\x00", "\ud800", "a", "../outside/model.safetensors", "/etc/passwd", "x" * 3000)
JUNK = (None, True, False, *NUMBERS, *TEXTS, [], {}, [[]], [None], {"": {}}, [0, 1, 2])


def spoilt_json(random: Random, value):
    """A JSON value with one part of it replaced, left out, added or repeated."""
    is_filled = isinstance(value, dict | list) and len(value) > 0
    if not is_filled or random.random() < 0.1:
        is_number = type(value) is int and random.random() < 0.5
        return value + random.choice([-1, 1, value]) if is_number else random.choice(JUNK)
    if isinstance(value, dict):
        name = random.choice([*value])
        left_out = {other: part for other, part in value.items() if other != name}
        added = value | {random.choice(["", "x", name + "2"]): random.choice(JUNK)}
        replaced = value | {name: spoilt_json(random, value[name])}
        return random.choice([left_out, added, *[replaced] * 8])
    at = random.randrange(len(value))
    middle = random.choice([[], [value[at]] * 2, [spoilt_json(random, value[at])]])
    return value[:at] + middle + value[at + 1 :]


def spoilt_bytes(random: Random, data: bytes) -> bytes:
    """Bytes with up to four changes."""
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(data) + 1)
        end = at + random.choice([1, 2, 8, 100])
        old = data[at:end]
        new = random.choice([b"", old * 2, random.randbytes(len(old)), bytes(byte ^ 1 for byte in old), b"\xff" * 8])
        rest = b"" if random.random() < 0.2 else data[end:]
        data = data[:at] + new + rest
    return data


def spoilt(random: Random, name: str, data: bytes) -> bytes:
    """The content of a file, spoilt as JSON if it is JSON, or in its header if it is of safetensors, or as bytes."""
    if random.random() < 0.3 or not name.endswith((".json", ".plan", ".safetensors")):
        return spoilt_bytes(random, data)
    if data[:1] == b"{":
        return as_json(spoilt_json(random, json.loads(data)))
    size = int.from_bytes(data[:8], "little")
    header = as_json(spoilt_json(random, json.loads(data[8 : 8 + size])))
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def as_json(value) -> bytes:
    return json.dumps(value).encode()
