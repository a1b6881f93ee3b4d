"""Gemma's tokenizer: byte-pair encoding of characters, from sentencepiece's tokenizer.model or from tokenizer.json.

A text is encoded as a whole, with ▁ in place of spaces. A character that the vocabulary lacks becomes one token for
each of its bytes. The sentencepiece library runs a tokenizer.model. tiktoken runs a tokenizer.json: it merges bytes, so
its first ranks put the bytes of each character together.
"""

import re
from collections.abc import Iterable
from typing import Any

from pop.errors import TokenizerError
from pop.inputs.byte_pair import BytePairEncoding, bos_id_of, check, reachable, refuse_settings
from pop.inputs.tokenizers import Tokenizer, refuse_spelt, sort_added

# Gemma's control symbols. Its tokenizer.model marks them as user-defined, like runs of newlines, HTML tags and others
# that text may contain.
_CONTROL = {"<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"}
_SPACE = "\u2581"  # what sentencepiece writes in place of a space
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]  # the names of bytes, for characters that the vocabulary lacks
_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ],
}
# In the bytes of a tokenizer.model, the end of a user-defined piece: its score, and its type, 4.
_USER_DEFINED = re.compile(rb"(\x15.{4}\x18)\x04", re.DOTALL)


def from_tokenizer_model(data: bytes, added: Iterable[dict] = ()) -> Tokenizer:
    """Build Gemma's tokenizer from a tokenizer.model, and from tokens added to it, as tokenizer.json lists them."""
    from sentencepiece import SentencePieceProcessor  # here, so that `import pop` stays fast

    original = SentencePieceProcessor(model_proto=data)
    # sentencepiece finds user-defined pieces in every text, but control pieces (type 3) never. Tokenizer searches for
    # the user-defined pieces instead, together with the added tokens, and leaves out those that text must not spell.
    model = SentencePieceProcessor(model_proto=_USER_DEFINED.sub(b"\\1\x03", data))
    probe = "  \ufb01  a "
    if model.normalize(probe) != _normalize(probe):
        raise TokenizerError("the sentencepiece model changes text (NFKC, dummy prefix, extra spaces).")

    vocab = {model.id_to_piece(id): id for id in range(len(model)) if not model.is_unused(id)}
    bytes_of = _bytes_of(vocab)
    # The pieces that sentencepiece finds in no text: the unknown piece, control pieces and user-defined ones.
    not_found = {name: id for name, id in vocab.items() if model.is_control(id) or model.is_unknown(id)}

    special, others, _ = sort_added(added, vocab)
    for name, id in not_found.items():
        if name in _CONTROL or model.is_unknown(id) or original.is_control(id):
            special[name] = id
    others |= not_found
    others = {name: id for name, id in others.items() if name not in special}
    refuse_spelt(special.keys() | _CONTROL, vocab.keys() - not_found.keys())
    bos_id = model.bos_id()
    return Tokenizer(
        model.encode,
        special_tokens=special,
        added=others,
        bytes_of=bytes_of,
        bos_id=bos_id if bos_id in special.values() else None,
        normalize=_normalize,
        normalized={*special, *others},
    )


def from_tokenizer_json(spec: dict[str, Any]) -> Tokenizer:
    """Build Gemma's tokenizer from the contents of a tokenizer.json."""
    model = spec["model"]
    check("the normalizer", spec.get("normalizer"), {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    check("the pre_tokenizer", spec.get("pre_tokenizer"), None, split)  # no text has a space at this step
    check("byte_fallback", model.get("byte_fallback"), True)
    check("the decoder", spec.get("decoder"), _DECODER)
    refuse_settings(model, model.keys() - {"type", "unk_token", "fuse_unk", "byte_fallback", "vocab", "merges"})
    vocab = model["vocab"]
    special, added, normalized = sort_added(spec["added_tokens"], vocab)
    special[model["unk_token"]] = vocab[model["unk_token"]]
    bos_id = bos_id_of(spec.get("post_processor"), special)
    special |= {name: added.pop(name) for name in _CONTROL & added.keys()}
    merged = reachable(model["merges"], vocab)
    refuse_spelt(special.keys() | _CONTROL, merged)
    bytes_of = _bytes_of(vocab)
    return Tokenizer(
        BytePairEncoding(_ids_of_bytes(vocab, merged), "(?s).+").encode,
        special_tokens=special,
        added=added,
        bytes_of=bytes_of,
        bos_id=bos_id,
        normalize=_normalize,
        normalized=normalized,
    )


def _bytes_of(vocab: dict[str, int]) -> dict[int, bytes]:
    """Return the bytes of each token. Raises TokenizerError if a byte has none."""
    if not vocab.keys() >= set(_BYTES):
        raise TokenizerError("the vocabulary has no byte fallback: it lacks bytes such as <0x00>.")
    texts = {id: name.replace(_SPACE, " ").encode() for name, id in vocab.items()}
    return texts | {vocab[name]: bytes([byte]) for byte, name in enumerate(_BYTES)}


def _ids_of_bytes(vocab: dict[str, int], merged: list[str]) -> dict[bytes, list[int]]:
    """Return the ids that each of tiktoken's tokens stands for, in the order of their ranks.

    Args:
        vocab: The id of each token.
        merged: The tokens that merging makes, the first of them first.
    """
    characters = {name for name in vocab if len(name) == 1}  # all that merges begin with
    tokens = [bytes([byte]) for byte in range(256)]
    for length in (2, 3, 4):  # each character in steps: its first two bytes, then three, then four
        tokens += {char.encode()[:length] for char in characters}
    ids = {token: [vocab[_BYTES[byte]] for byte in token] for token in tokens}
    return ids | {name.encode(): [vocab[name]] for name in (*characters, *merged)}


def _normalize(text: str) -> str:
    return text.replace(" ", _SPACE)
