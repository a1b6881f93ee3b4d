"""Gemma's tokenizer: byte-pair encoding of characters, from sentencepiece's tokenizer.model or from tokenizer.json.

A text is encoded as a whole, with ▁ in place of spaces. A character that the vocabulary lacks becomes one token for
each of its bytes. tiktoken merges bytes, so its first ranks put the bytes of each character together.
"""

import struct
from collections.abc import Iterable, Iterator
from typing import Any

from pop.errors import TokenizerError
from pop.inputs.byte_pair import BytePairTokenizer, bos_id_of, check, reachable
from pop.inputs.tokenizers import sort_added

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # sentencepiece's types of pieces
# Gemma's control symbols. Its tokenizer.model marks them as user-defined, like runs of newlines, HTML tags and others
# that text may contain.
_CONTROL = {"<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"}
_SPACE = "\u2581"  # what sentencepiece writes in place of a space
_DECODERS = [{"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}, {"type": "ByteFallback"}]
_DECODER = {"type": "Sequence", "decoders": [*_DECODERS, {"type": "Fuse"}]}


def from_tokenizer_json(spec: dict[str, Any]) -> BytePairTokenizer:
    """Build Gemma's tokenizer from the contents of a tokenizer.json."""
    model = spec["model"]
    check("the normalizer", spec.get("normalizer"), {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    check("the pre_tokenizer", spec.get("pre_tokenizer"), None, split)  # no text has a space at this step
    check("byte_fallback", model.get("byte_fallback"), True)
    check("the decoder", spec.get("decoder"), _DECODER)
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        check(f"the setting {setting}", model.get(setting) or None, None)
    special, added, normalized = sort_added(spec["added_tokens"], model["vocab"])
    special[model["unk_token"]] = model["vocab"][model["unk_token"]]
    bos_id = bos_id_of(spec.get("post_processor"), special)
    return _build(model["vocab"], reachable(model["merges"], model["vocab"]), special, added, normalized, bos_id)


def from_tokenizer_model(data: bytes, added: Iterable[dict] = ()) -> BytePairTokenizer:
    """Build Gemma's tokenizer from a tokenizer.model, and from tokens added to it, as tokenizer.json lists them."""
    fields = list(_fields(data))
    trainer, rules = (dict(_fields(dict(fields)[number])) for number in (2, 3))
    pieces = [{3: NORMAL} | dict(_fields(piece)) for number, piece in fields if number == 1]
    ids = {kind: {} for kind in range(NORMAL, BYTE + 1)}
    for id, piece in enumerate(pieces):
        ids[piece[3]][piece[1].decode()] = id
    check("model_type", trainer.get(3), 2)  # byte-pair encoding
    # A precompiled map, add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    if rules.get(2) or [rules.get(number, 1) for number in (3, 4, 5)] != [0, 0, 1]:
        raise TokenizerError("the sentencepiece model changes text (NFKC, dummy prefix, extra spaces).")
    vocab = {text: id for kind in ids.keys() - {UNUSED} for text, id in ids[kind].items()}
    special, other, _ = sort_added(added, vocab)
    special |= ids[UNKNOWN] | ids[CONTROL]
    other |= {name: id for name, id in ids[USER_DEFINED].items() if name not in special}
    # Sentencepiece merges any two neighbours that make a piece, the one with the highest score first.
    scores = {text: struct.unpack("<f", pieces[id][2])[0] for text, id in ids[NORMAL].items() if len(text) > 1}
    if len({*scores.values()}) < len(scores):
        raise TokenizerError("two sentencepiece pieces have the same score.")
    bos_id = trainer.get(41, 1)
    bos_id = bos_id if bos_id in special.values() else None
    for text in ids[UNUSED]:  # sentencepiece would make it of pieces or characters, and take it apart again
        parts = [(text[:n], text[n:]) for n in range(1, len(text))]
        if any(all(len(part) == 1 or part in vocab for part in pair) for pair in parts):
            raise TokenizerError(f"pieces merge into the unused piece {text!r}, which is not supported.")
    return _build(vocab, sorted(scores, key=scores.get, reverse=True), special, other, {*special, *other}, bos_id)


def _build(vocab, merged: list[str], special: dict, added: dict, normalized: set, bos_id: int | None):
    """Build a tokenizer from the ids of its tokens. Merging makes those in `merged`, the first of them first."""
    special = special | {name: added.pop(name) for name in _CONTROL & added.keys()}
    if spelt := {*special, *_CONTROL} & {*merged}:
        raise TokenizerError(f"ordinary text merges into the special token {min(spelt)!r}.")
    byte_ids = [vocab.get(f"<0x{byte:02X}>") for byte in range(256)]
    if None in byte_ids:
        raise TokenizerError("the vocabulary has no byte fallback: it lacks bytes such as <0x00>.")
    characters = {*"".join(merged), *(name for name in vocab if len(name) == 1)}
    tokens = [bytes([byte]) for byte in range(256)]
    for length in (2, 3, 4):  # each character in steps: its first two bytes, then three, then four
        tokens += {char.encode()[:length] for char in characters if len(char.encode()) >= length}
    ids = {token: [byte_ids[byte] for byte in token] for token in tokens}
    ids |= {char.encode(): [vocab[char]] for char in characters & vocab.keys()}
    ids |= {name.encode(): [vocab[name]] for name in merged}
    ranks = {token: rank for rank, token in enumerate(ids)}
    bytes_of = {id: name.replace(_SPACE, " ").encode() for name, id in vocab.items()}
    bytes_of |= {id: bytes([byte]) for byte, id in enumerate(byte_ids)}
    options = {"special_tokens": special, "added": added, "bytes_of": bytes_of, "bos_id": bos_id}
    options |= {"normalize": lambda text: text.replace(" ", _SPACE), "normalized": normalized}
    return BytePairTokenizer(ranks, list(ids.values()), "(?s).+", **options)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the number and the value of each field of a protobuf message: an integer, or bytes."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        size = {1: 8, 5: 4}.get(tag & 7)
        if size is None:
            size, place = _varint(message, place)
        if tag & 7 == 0:
            yield tag >> 3, size
            continue
        value, place = message[place : place + size], place + size
        if len(value) < size:
            raise ValueError("the file is truncated")
        yield tag >> 3, value


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while data[place] > 127:
        value, shift, place = value | (data[place] & 127) << shift, shift + 7, place + 1
    return value | data[place] << shift, place + 1
