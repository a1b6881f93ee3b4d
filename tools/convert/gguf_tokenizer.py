"""Rebuild tokenizer files from the metadata of a GGUF file.

`gpt2` is byte-level BPE and becomes tokenizer.json; `llama` is sentencepiece BPE and becomes tokenizer.model. Both get
a tokenizer_config.json. The pre-tokenizer, which splits text before BPE, is only a name in `tokenizer.ggml.pre`.
"""

import struct
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from pop.errors import CheckpointError, UnsupportedError
from tools.convert.checkpoint import write_json

# The types of tokens, in GGUF as in sentencepiece
NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT2 = _BYTES | {"use_regex": True}  # splits by GPT-2's own pattern first


def _llama3_split(digits: str) -> dict[str, Any]:
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    others = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    pattern = {"Regex": f"{words}|{digits}|{others}"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _BYTES]}


_DIGITS = {"type": "Digits", "individual_digits": True}
# tokenizer.ggml.pre -> the fields of tokenizer.json that differ: normalizer, pre_tokenizer, ignore_merges
PRE_TOKENIZERS = {
    "gpt-2": (None, _GPT2, False),
    "smollm": (None, {"type": "Sequence", "pretokenizers": [_DIGITS, _GPT2]}, False),
    "llama-bpe": (None, _llama3_split(r"\p{N}{1,3}"), True),
    "qwen2": ({"type": "NFC"}, _llama3_split(r"\p{N}"), False),
}
# GGUF's name -> tokenizer_config.json's, in the order of sentencepiece's fields
SPECIAL = {"unknown": "unk_token", "bos": "bos_token", "eos": "eos_token", "padding": "pad_token"}


def write_tokenizer(source, folder: Path, config: dict[str, Any]) -> None:
    """Write the tokenizer files, or none if the open GGUFFile `source` holds no tokenizer."""
    model = source.get("tokenizer.ggml.model", str, "none")
    if model in ("none", "no_vocab"):
        return
    if model not in ("gpt2", "llama"):
        raise UnsupportedError(f"{source.path}: the tokenizer {model!r} is not supported (supported: gpt2, llama)")
    tokens = source.get("tokenizer.ggml.tokens", list)
    types = source.get("tokenizer.ggml.token_type", list, [NORMAL] * len(tokens))
    if len(types) != len(tokens) or len(set(tokens)) < len(tokens) or len(tokens) > config["vocab_size"]:
        what = f"must be at most {config['vocab_size']} (vocab_size) different texts, with one token_type each"
        raise CheckpointError(f"{source.path}: tokenizer.ggml.tokens {what}")
    special = {name: source.get(f"tokenizer.ggml.{name}_token_id", int, None) for name in SPECIAL}
    pre = source.get("tokenizer.ggml.pre", str, None)
    add_bos = source.get("tokenizer.ggml.add_bos_token", bool, model == "llama" or pre == "llama-bpe")
    settings = {
        "add_bos_token": add_bos,
        "add_eos_token": source.get("tokenizer.ggml.add_eos_token", bool, False),
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }
    for name, key in SPECIAL.items():
        if special[name] is not None:
            settings[key] = tokens[special[name]]
    template = source.get("tokenizer.chat_template", str, None)
    if template:
        settings["chat_template"] = template
    if model == "gpt2":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        bos_id = special["bos"] if add_bos else None
        write_json(folder / "tokenizer.json", _byte_level_bpe(source, tokens, types, pre, bos_id))
    else:
        is_llama = config["model_type"] == "llama"
        settings["tokenizer_class"] = "LlamaTokenizer" if is_llama else "GemmaTokenizer"
        proto = _sentencepiece_model(source, tokens, types, special)
        SentencePieceProcessor(model_proto=proto)  # raises RuntimeError for a broken model
        (folder / "tokenizer.model").write_bytes(proto)
    write_json(folder / "tokenizer_config.json", settings)


def _byte_level_bpe(source, tokens: list, types: list, pre: str | None, bos_id: int | None) -> dict[str, Any]:
    """Return the contents of tokenizer.json. With a `bos_id`, encoding puts that token in front."""
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise UnsupportedError(f"{source.path}: the pre-tokenizer {pre!r} is not supported (supported: {known})")
    normalizer, pre_tokenizer, ignore_merges = PRE_TOKENIZERS[pre]
    merges = source.get("tokenizer.ggml.merges", list)
    # In published files, the vocabulary ends with the last token of BPE itself. The tokens after it are listed as added
    # tokens only, and the padding at the end (UNUSED) is omitted.
    own = [i for i, kind in enumerate(types) if kind not in (CONTROL, USER_DEFINED, UNUSED)]
    end = max(own, default=-1) + 1
    vocab = {token: i for i, token in enumerate(tokens[:end])}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": i, "content": token} | flags | {"special": types[i] == CONTROL}
        for i, token in enumerate(tokens)
        if types[i] in (CONTROL, USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None if bos_id is None else bos_first(tokens[bos_id], bos_id),
        "decoder": _GPT2,
        "model": {"type": "BPE", "ignore_merges": ignore_merges, "vocab": vocab, "merges": merges},
    }


def bos_first(bos: str, bos_id: int) -> dict[str, Any]:
    """Return the post_processor of tokenizer.json that puts the token `bos` before each text."""
    single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    second = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single + second,
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def _sentencepiece_model(source, tokens: list, types: list, special: dict[str, int | None]) -> bytes:
    """Return the contents of tokenizer.model: sentencepiece's ModelProto in the wire format of protobuf."""
    scores = source.get("tokenizer.ggml.scores", list)
    # llama.cpp's converter replaces sentencepiece's mark by a blank in user-defined pieces.
    tokens = [t.replace(" ", "\u2581") if kind == USER_DEFINED else t for t, kind in zip(tokens, types, strict=True)]
    pieces = [
        _field(1, _field(1, token) + _field(2, float(score)) + _field(3, kind))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    ]
    trainer = _field(3, 2) + _field(4, len(tokens))  # model_type = BPE, vocab_size
    trainer += _field(35, BYTE in types)  # byte_fallback
    for n, token_id in enumerate(special.values()):
        trainer += _field(40 + n, -1 if token_id is None else token_id)  # unk_id, bos_id, eos_id, pad_id
        if token_id is not None:
            trainer += _field(45 + n, tokens[token_id])  # unk_piece ... pad_piece
    normalizer = _field(1, "identity")
    normalizer += _field(3, source.get("tokenizer.ggml.add_space_prefix", bool, True))  # add_dummy_prefix
    normalizer += _field(4, source.get("tokenizer.ggml.remove_extra_whitespaces", bool, False))
    return b"".join(pieces) + _field(2, trainer) + _field(3, normalizer)


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
