"""The model file of sentencepiece: a ModelProto in the wire format of protobuf."""

import struct
from collections.abc import Iterable, Sequence

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # the types of pieces


def write_model(pieces: Iterable[tuple[str, float, int]], special: Sequence[int | None], **normalizer: bool) -> bytes:
    """Return the contents of a tokenizer.model with byte-pair encoding.

    Args:
        pieces: The text, the score and the type of each id. Neighbours merge into the piece with the highest score.
        special: The ids of the unknown, BOS, EOS and padding tokens; None for one that the model lacks.
        normalizer: add_dummy_prefix and remove_extra_whitespaces, both False by default.
    """
    pieces = list(pieces)
    trainer = _field(3, 2) + _field(4, len(pieces))  # model_type = BPE, vocab_size
    trainer += _field(35, any(kind == BYTE for _, _, kind in pieces))  # byte_fallback
    for n, token_id in enumerate(special):
        trainer += _field(40 + n, -1 if token_id is None else token_id)  # unk_id, bos_id, eos_id, pad_id
        if token_id is not None:
            trainer += _field(45 + n, pieces[token_id][0])  # unk_piece ... pad_piece
    rules = _field(1, "identity")
    rules += _field(3, normalizer.get("add_dummy_prefix", False))
    rules += _field(4, normalizer.get("remove_extra_whitespaces", False))
    written = [_field(1, _field(1, text) + _field(2, float(score)) + _field(3, kind)) for text, score, kind in pieces]
    return b"".join(written) + _field(2, trainer) + _field(3, rules)


def read_pieces(model: bytes) -> list[tuple[str, int, int | None]]:
    """Return each piece's text, its type, and where in the file the type is. Raises ValueError or IndexError."""
    pieces, place = [], 0
    while place < len(model) and model[place] == 0x0A:  # the pieces come first
        size, place = _read_varint(model, place + 1)
        end, text, kind, found = place + size, "", NORMAL, None
        while place < end:
            tag, place = model[place], place + 1
            if tag == 0x0A:
                size, place = _read_varint(model, place)
                text, place = model[place : place + size].decode(), place + size
            elif tag == 0x15:  # the score
                place += 4
            elif tag == 0x18:
                kind, found, place = model[place], place, place + 1
            else:
                raise ValueError(f"piece {len(pieces)} has a field with the tag {tag}")
        pieces.append((text, kind, found))
    return pieces


def _field(number: int, value: int | float | str | bytes) -> bytes:
    """Return one protobuf field: a number as a varint, a float as four bytes, text after its length."""
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value % (1 << 64))  # two's complement for negative numbers
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while data[place] > 127:
        value, shift, place = value | (data[place] & 127) << shift, shift + 7, place + 1
    return value | data[place] << shift, place + 1
