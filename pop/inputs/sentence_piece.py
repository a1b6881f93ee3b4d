"""Sentencepiece BPE with byte fallback and without normalisation (Gemma), from tokenizer.model or tokenizer.json."""

from collections import Counter
from itertools import groupby
from typing import Any

from pop.errors import TokenizerError
from pop.inputs.byte_pair import bos_id_of, check
from pop.inputs.tokenizers import Tokenizer, sort_added
from pop.system.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, read_pieces, write_model

# Gemma's control symbols. Its model marks them as user-defined, so sentencepiece would match them in any text.
# The other user-defined symbols (runs of newlines, HTML tags, <unused0> ...) are ordinary vocabulary.
_CONTROL = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>")
_SPACE = "\u2581"  # what sentencepiece writes in place of a space
_DECODERS = [{"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}, {"type": "ByteFallback"}]
_DECODER = {"type": "Sequence", "decoders": [*_DECODERS, {"type": "Fuse"}]}


class SentencePieceTokenizer(Tokenizer):
    """The tokenizer in the bytes of a tokenizer.model, and tokens added to it, as tokenizer.json lists them."""

    def __init__(self, model: bytes, added: list[dict] = ()):
        from sentencepiece import SentencePieceProcessor

        pieces = read_pieces(model)
        vocab = {text: id for id, (text, kind, _) in enumerate(pieces) if kind != UNUSED}
        special, other, normalized = sort_added(added, vocab)
        # Sentencepiece never matches a control symbol in text, so we make each special token one.
        model, bytes_of, matched = bytearray(model), {}, set()
        for id, (text, kind, place) in enumerate(pieces):
            if kind == USER_DEFINED and (text in special or text in _CONTROL):
                model[place] = kind = CONTROL
            if kind in (CONTROL, UNKNOWN):
                special[text] = id
            elif kind == BYTE:  # written as <0x0A>
                bytes_of[id] = bytes([int(text[3:-1], 16)])
            elif kind != UNUSED:
                bytes_of[id] = text.replace(_SPACE, " ").encode()
            if kind == USER_DEFINED:
                matched.add(text)
        if spelt := [name for name in (*special, *_CONTROL) if vocab.get(name) in bytes_of]:
            raise TokenizerError(f"the sentencepiece symbol {spelt[0]} is not a control symbol.")
        other = {name: id for name, id in other.items() if name.replace(" ", _SPACE) not in matched}
        _check_overlaps(other, normalized, matched)
        self._model = SentencePieceProcessor(model_proto=bytes(model))
        sample = " a  b \t\n\u2460\ufb01\uff21e\u0301 "
        if self._model.normalize(sample) != sample.replace(" ", _SPACE):
            raise TokenizerError("the sentencepiece model changes text (NFKC, dummy prefix, extra spaces).")
        if not self._model.is_byte(self._model.piece_to_id("<0x00>")):  # sentencepiece has all 256 of them or none
            raise TokenizerError("the sentencepiece model has no byte fallback.")
        bos_id = self._model.bos_id()
        super().__init__(special, other, bytes_of, bos_id if bos_id >= 0 else None, normalized)

    def _encode_text(self, text: str) -> list[int]:
        return self._model.encode(text)


def _check_overlaps(added: dict[str, int], normalized: set[str], matched: set[str]) -> None:
    """Refuse an added token if the original could find a symbol in its place. We look for added tokens first."""
    for name in added:
        starts = tuple(name[:length] for length in range(1, len(name) + 1))
        for symbol in matched:
            if symbol.endswith(starts) or (name in normalized and (symbol in name or name.endswith(symbol[:1]))):
                raise TokenizerError(f"the added token {name!r} may overlap with {symbol!r}, which is not supported.")


def from_tokenizer_json(spec: dict[str, Any]) -> SentencePieceTokenizer:
    """Build Gemma's tokenizer from the contents of a tokenizer.json.

    Sentencepiece merges any two neighbours whose concatenation is a piece, the one with the highest score first. That
    equals the listed merges if they are all such pairs, and if those that give one piece follow each other.
    """
    model, added = spec["model"], {token["content"]: token for token in spec["added_tokens"]}
    vocab = model["vocab"]
    sort_added(spec["added_tokens"], vocab)  # raises for ids that cannot be
    check("the normalizer", spec.get("normalizer"), {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    check("the pre_tokenizer", spec.get("pre_tokenizer"), None, split)  # no text has a space at this step
    check("byte_fallback", model.get("byte_fallback"), True)
    check("the decoder", spec.get("decoder"), _DECODER)
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        check(f"the setting {setting}", model.get(setting) or None, None)
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    merged = [left + right for left, right in merges if left + right not in added]
    order = [name for name, _ in groupby(merged)]
    listed = Counter(merged)
    for name in vocab.keys() - added.keys():
        if len(name) > 1 and not _is_byte(name):
            pairs = sum(name[:n] in vocab and name[n:] in vocab for n in range(1, len(name)))
            if pairs != listed[name]:
                raise TokenizerError(f"the merges of the token {name!r} are not all pairs that make it.")
    if len(order) > len(listed):
        raise TokenizerError("the merges that make one token do not follow each other.")
    rank = {name: n for n, name in enumerate(order)}
    unknown, bos_id = model["unk_token"], bos_id_of(spec.get("post_processor"), vocab)
    pieces = [(f"<gap {id}>", 0.0, UNUSED) for id in range(max(vocab.values()) + 1)]
    for name, id in vocab.items():
        if name in added:
            kind = CONTROL if added[name]["special"] else USER_DEFINED
        else:
            kind = BYTE if _is_byte(name) else NORMAL
        pieces[id] = (name, -float(rank.get(name, len(rank))), UNKNOWN if name == unknown else kind)
    special = [vocab[unknown], bos_id, None, None]
    return SentencePieceTokenizer(write_model(pieces, special), spec["added_tokens"])


def _is_byte(name: str) -> bool:
    return len(name) == 6 and name.startswith("<0x") and name.endswith(">")
