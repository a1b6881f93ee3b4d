"""Text to token ids and back, with the ids of the original tokenizers.

Two kinds behind one face: byte-level BPE (Llama-3, Qwen, SmolLM2, GPT-2; byte_pair.py), whose merging and splitting
is tiktoken's, and sentencepiece BPE (Gemma). `load_tokenizer` tells them apart by the files:

    tokenizer.model   a sentencepiece model, or Meta's list of base64 tokens in rank order
    tokenizer.json    vocabulary, merges, normalizer, pre-tokenizer and added tokens of a byte-level BPE
"""

import codecs
import json
import re
from collections.abc import Iterable
from itertools import chain, groupby
from pathlib import Path

from pop.errors import InputError, TokenizerError

Piece = str | list[int]  # of a prompt: text, or token ids that no text can spell


class Tokenizer:
    """What both kinds share: added tokens, BOS, decoding.

    special_tokens: name -> id of the control tokens, which text cannot spell unless the caller allows it.
    vocab_size: one more than the largest id. bos_id: the token put before a text, None where there is none.
    chat_template: the raw template of tokenizer_config.json, None if it has none.
    """

    def __init__(self, special_tokens: dict[str, int], added: dict[str, int], vocab_size: int, bos_id=None):
        self.special_tokens = special_tokens
        self.vocab_size = vocab_size
        self.bos_id = bos_id
        self.chat_template: str | None = None
        self._special_names = {id: name for name, id in special_tokens.items()}
        self._added = added  # matched in any text: ordinary vocabulary that BPE would not find
        self._split_added = _splitter(added)
        self._split_all = _splitter(added | special_tokens)

    def encode(self, text: str, bos: bool = True, allow_special: bool = False) -> list[int]:
        """The token ids of `text`, behind BOS if the family has one and `bos` is set.

        Text that looks like a special token is text, unless allow_special. InputError for lone surrogates.
        """
        if not isinstance(text, str):
            raise InputError(f"the text to encode is a {type(text).__name__}; pass a str.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text has a lone surrogate, {text[error.start]!r}, at character {error.start}; "
                "decode its source with errors='replace'."
            ) from None
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        split = self._split_all if allow_special else self._split_added
        for n, part in enumerate(split.split(text) if split else [text]):
            if n % 2:
                ids.append(self._added[part] if part in self._added else self.special_tokens[part])
            elif part:
                ids += self._encode_text(part)
        return ids

    def encode_pieces(self, pieces: Iterable[Piece], bos: bool = True) -> list[int]:
        """The token ids of texts and token ids in turn; all text between two lists of ids is encoded as one."""
        ids = self.encode("", bos=bos)
        for is_text, group in groupby(pieces, lambda piece: isinstance(piece, str)):
            group = list(group)
            ids += self.encode("".join(group), bos=False) if is_text else chain.from_iterable(group)
        return ids

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of `ids`. Special tokens are left out, unless `special`; invalid UTF-8 becomes U+FFFD."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids  # a tensor's or an array's
        return b"".join(self._bytes_shown(id, special) for id in ids).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes that an id stands for, perhaps a part of a character; b"" for a special token."""
        raise NotImplementedError

    def _encode_text(self, text: str) -> list[int]:
        """Ids of non-empty text in which no added token is looked for."""
        raise NotImplementedError

    def _bytes_shown(self, id: int, special: bool) -> bytes:
        data = self.token_bytes(id)
        return self._special_names[id].encode() if special and id in self._special_names else data

    def _unknown_id(self, id) -> InputError:
        return InputError(f"token id {id!r} is not one of the tokenizer's ids, 0 to {self.vocab_size - 1}.")


def _splitter(names: Iterable[str]) -> re.Pattern | None:
    """Splits a text at any of the names, keeping them; at the longest, where several begin at one place."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None


# Gemma's control symbols, which its model would match in any text; its other user-defined symbols (runs of
# newlines, HTML tags, <unused0> ...) are ordinary vocabulary.
_GEMMA_CONTROL = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>")


class SentencePieceTokenizer(Tokenizer):
    """Sentencepiece BPE with byte fallback and no normalisation. model: the bytes of a tokenizer.model."""

    def __init__(self, model: bytes):
        from sentencepiece import SentencePieceProcessor

        # A control symbol is never matched in text, so each of _GEMMA_CONTROL is made one. In a model file a
        # piece is its text (field 1), its score (2) and its type (3), where 4 is user-defined, 3 is control.
        for name in map(str.encode, _GEMMA_CONTROL):
            text = b"\x0a" + bytes([len(name)]) + name
            piece = re.compile(b"(" + re.escape(text) + rb"\x15.{4}\x18)\x04", re.DOTALL)
            model = piece.sub(lambda match: match[1] + b"\x03", model)
        self._model = SentencePieceProcessor(model_proto=model)
        size = self._model.get_piece_size()
        every = range(size)
        special = [id for id in every if self._model.is_control(id) or self._model.is_unknown(id)]
        names = {self._model.id_to_piece(id): id for id in special}
        missed = [name for name in _GEMMA_CONTROL if self._model.piece_to_id(name) not in {*special}]
        if missed:
            raise TokenizerError(f"the sentencepiece symbol {missed[0]} is no control symbol.")
        sample = " a  b \t\n\u2460\ufb01\uff21e\u0301 "
        if self._model.normalize(sample) != sample.replace(" ", "\u2581"):
            raise TokenizerError("the sentencepiece model changes text (NFKC, dummy prefix, extra spaces).")
        if len({self._model.id_to_piece(id) for id in every if self._model.is_byte(id)}) != 256:
            raise TokenizerError("the sentencepiece model has no byte fallback.")
        bos_id = self._model.bos_id()
        super().__init__(names, {}, size, bos_id if bos_id >= 0 else None)

    def token_bytes(self, id: int) -> bytes:
        if not isinstance(id, int) or not 0 <= id < self.vocab_size:
            raise self._unknown_id(id)
        if id in self._special_names:
            return b""
        piece = self._model.id_to_piece(id)
        if self._model.is_byte(id):  # written <0x0A>
            return bytes([int(piece[3:-1], 16)])
        return piece.replace("\u2581", " ").encode()

    def _encode_text(self, text: str) -> list[int]:
        return self._model.encode(text)


class StreamDecoder:
    """Ids to text, one at a time: whole characters only, and all together what `tokenizer.decode` gives."""

    def __init__(self, tokenizer: Tokenizer, special: bool = False):
        self._tokenizer, self._special = tokenizer, special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that `id` completes, perhaps none."""
        return self._decoder.decode(self._tokenizer._bytes_shown(id, self._special))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character whose last bytes never came."""
        return self._decoder.decode(b"", final=True)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a directory, or in a tokenizer.json or tokenizer.model.

    TokenizerError if there is none, it is broken, or it asks for what is not reproduced exactly.
    """
    from pop.inputs.byte_pair import from_tiktoken_file, from_tokenizer_json  # which builds on this file

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
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OSError) as error:
        raise TokenizerError(f"{path}: not a tokenizer ({type(error).__name__}: {error}).") from error
    return tokenizer


def _chat_template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    template = json.loads(config.read_bytes()).get("chat_template") if config.is_file() else None
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not isinstance(template, str | None):
        raise TokenizerError("the chat_template in its tokenizer_config.json is not text.")
    return template
