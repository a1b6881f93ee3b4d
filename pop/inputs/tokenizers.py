"""Tokenizers: text to token ids and back, with exactly the ids of the original tokenizers; and token ids as tensors.

Byte-level BPE (Llama-3, Qwen, SmolLM2, GPT-2) is in byte_pair.py and uses tiktoken. Its files are tokenizer.json, or
Meta's tokenizer.model. Gemma's BPE is here and uses sentencepiece, whose file is also named tokenizer.model.
"""

import json
import re
from collections.abc import Iterable
from itertools import chain, groupby
from pathlib import Path

import torch

from pop.errors import InputError, TokenizerError

Piece = str | list[int]  # a part of a prompt: text, or token ids that no text can spell


class Tokenizer:
    """What both kinds share: added tokens, the beginning-of-text token (BOS), and decoding.

    Each kind has `_encode_text`, which returns the ids of a non-empty text without looking for added tokens.
    """

    def __init__(self, special_tokens: dict[str, int], added: dict[str, int], bytes_of: dict[int, bytes], bos_id=None):
        self.special_tokens = special_tokens  # ids by name; text spells these tokens only if the caller allows it
        self.bos_id = bos_id
        self.chat_template: str | None = None  # as it is in the checkpoint's files
        self._all = special_tokens | added  # ordinary text spells added tokens, but BPE would not find them
        self._split_added = _splitter(added)
        self._split_all = _splitter(self._all)
        self._bytes_of = bytes_of | {id: name.encode() for name, id in added.items()}
        self._bytes_of |= dict.fromkeys(special_tokens.values(), b"")
        self.vocab_size = max(self._bytes_of) + 1

    def encode(self, text: str, bos: bool = True, allow_special: bool = False) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: Any text without lone surrogates.
            bos: Put BOS first, if the family has one.
            allow_special: Turn the names of special tokens into their ids. By default they are ordinary text.
        """
        if not isinstance(text, str):
            raise InputError(f"the text to encode is a {type(text).__name__}; pass a str.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the text has a lone surrogate at character {error.start}; remove it.") from None
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        splitter = self._split_all if allow_special else self._split_added
        for n, part in enumerate(splitter.split(text) if splitter else [text]):
            if n % 2:  # every second part is a token's name
                ids.append(self._all[part])
            elif part:
                ids += self._encode_text(part)
        return ids

    def encode_pieces(self, pieces: Iterable[Piece], bos: bool = True) -> list[int]:
        """Return the ids of texts and lists of ids in order. Adjacent texts are encoded as one text."""
        ids = self.encode("", bos=bos)
        for is_text, group in groupby(pieces, lambda piece: isinstance(piece, str)):
            pieces = list(group)
            ids += self.encode("".join(pieces), bos=False) if is_text else chain.from_iterable(pieces)
        return ids

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Return the text of token ids, with U+FFFD in place of invalid UTF-8.

        Args:
            ids: A list, a tensor or an array.
            special: Write the names of special tokens. By default they are left out.
        """
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        names = {id: name for name, id in self.special_tokens.items()} if special else {}
        return b"".join(self.token_bytes(id) or names.get(id, "").encode() for id in ids).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes of a token, which may be part of a character. For a special token they are b""."""
        try:
            return self._bytes_of[id]
        except (KeyError, TypeError):
            raise InputError(f"token id {id!r} is not in the vocabulary of {self.vocab_size} tokens.") from None


def _splitter(names: Iterable[str]) -> re.Pattern | None:
    """A pattern that splits a text at any of the names and keeps them. Of two at one place, the longer one counts."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None


# Gemma's control symbols. Its model marks them as user-defined, so sentencepiece would match them in any text.
# The other user-defined symbols (runs of newlines, HTML tags, <unused0> ...) are ordinary vocabulary.
_GEMMA_CONTROL = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>")


class SentencePieceTokenizer(Tokenizer):
    """Sentencepiece BPE with byte fallback and without normalisation. `model` has the bytes of a tokenizer.model."""

    def __init__(self, model: bytes):
        from sentencepiece import SentencePieceProcessor

        # Sentencepiece never matches a control symbol in text, so we make each of _GEMMA_CONTROL one. In the file,
        # a piece is its text (field 1), its score (2) and its type (3): 4 is user-defined and 3 is control.
        names = "|".join(_GEMMA_CONTROL).encode()
        piece = re.compile(rb"(\x0a.(?:" + names + rb")\x15.{4}\x18)\x04", re.DOTALL)
        model = piece.sub(b"\\1\x03", model)
        self._model = SentencePieceProcessor(model_proto=model)
        special, bytes_of = {}, {}
        for id in range(self._model.get_piece_size()):
            piece = self._model.id_to_piece(id)
            if self._model.is_control(id) or self._model.is_unknown(id):
                special[piece] = id
            elif self._model.is_byte(id):  # written as <0x0A>
                bytes_of[id] = bytes([int(piece[3:-1], 16)])
            else:
                bytes_of[id] = piece.replace("\u2581", " ").encode()
        for name in _GEMMA_CONTROL:
            if self._model.piece_to_id(name) in bytes_of:
                raise TokenizerError(f"the sentencepiece symbol {name} is not a control symbol.")
        sample = " a  b \t\n\u2460\ufb01\uff21e\u0301 "
        if self._model.normalize(sample) != sample.replace(" ", "\u2581"):
            raise TokenizerError("the sentencepiece model changes text (NFKC, dummy prefix, extra spaces).")
        if not self._model.is_byte(self._model.piece_to_id("<0x00>")):  # sentencepiece has all 256 of them or none
            raise TokenizerError("the sentencepiece model has no byte fallback.")
        bos_id = self._model.bos_id()
        super().__init__(special, {}, bytes_of, bos_id if bos_id >= 0 else None)

    def _encode_text(self, text: str) -> list[int]:
        return self._model.encode(text)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer in a directory, a tokenizer.json or a tokenizer.model.

    Raises TokenizerError if it is missing or broken, or has a feature that we do not reproduce exactly.
    """
    from pop.inputs.byte_pair import from_tiktoken_file, from_tokenizer_json  # here, because it imports this file

    path = Path(path)
    folder = path if path.is_dir() else path.parent
    files = [folder / "tokenizer.json", folder / "tokenizer.model"] if path.is_dir() else [path]
    files = [file for file in files if file.is_file()]
    if not files:
        raise TokenizerError(f"{path}: there is no tokenizer.json and no tokenizer.model here.")
    try:
        data = files[-1].read_bytes()
        if files[-1].suffix != ".json" and data[:1] == b"\n":  # the first tag of a sentencepiece model
            tokenizer = SentencePieceTokenizer(data)
        elif files[0].suffix == ".json":
            tokenizer = from_tokenizer_json(json.loads(files[0].read_bytes()))
        else:
            tokenizer = from_tiktoken_file(data)
        tokenizer.chat_template = _chat_template(folder)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OSError) as error:
        reason = "" if isinstance(error, TokenizerError) else f"not a tokenizer, {type(error).__name__}: "
        raise TokenizerError(f"{path}: {reason}{error}") from error
    return tokenizer


def _chat_template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    template = json.loads(config.read_bytes()).get("chat_template") if config.is_file() else None
    if isinstance(template, list):  # several templates by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not isinstance(template, str | None):
        raise TokenizerError("chat_template in tokenizer_config.json is not text.")
    return template


def token_ids(tokens, dims: int, vocab_size: int, wait: bool = True) -> torch.Tensor:
    """Return token ids as an int64 tensor on the CPU, [B] or [B, T] by `dims`.

    Ids on another device are read back, which waits for the device. With `wait=False` they stay there, unchecked.
    """
    ids = _integers(tokens)
    if ids is None or ids.dim() != dims or not ids.numel():
        shape = "[batch]" if dims == 1 else "[batch, tokens]"
        raise InputError(f"tokens must be integers of shape {shape}, none of them empty, not {tokens!r:.80}")
    if not wait and ids.device.type != "cpu":
        return ids
    ids = ids.cpu()
    low, high = torch.stack(ids.aminmax()).tolist()
    if low < 0 or high >= vocab_size:
        raise InputError(f"token id {low if low < 0 else high} is not in the vocabulary of {vocab_size} tokens")
    return ids


def row_lengths(lengths, tokens: torch.Tensor) -> torch.Tensor:
    """Return the lengths of right-padded tokens [B, T] as int64 [B] on the CPU. None: no row is padded."""
    B, T = tokens.shape
    found = torch.full((B,), T) if lengths is None else _integers(lengths)
    found = None if found is None else found.cpu()
    if found is None or found.shape != (B,) or found.min() < 1 or found.max() > T:
        raise InputError(f"lengths is {lengths!r:.80}; it must hold {B} integers from 1 to {T}, one for each row")
    return found


def _integers(values) -> torch.Tensor | None:
    """Return an int64 tensor, or None for anything that is not integers in the form of a tensor."""
    try:
        values = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        return None
    other = values.is_floating_point() or values.is_complex() or values.dtype == torch.bool
    return None if other else values.to(torch.int64)
