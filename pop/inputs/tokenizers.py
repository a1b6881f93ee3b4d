"""Tokenizers: text to token ids and back, with exactly the ids of the original tokenizers; and token ids as tensors.

Byte-level BPE (Llama-3, Qwen, SmolLM2, GPT-2) is in byte_pair.py, and Gemma's BPE of characters in sentence_piece.py.
"""

import copy
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, groupby
from os import PathLike
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch

from pop.errors import InputError, TokenizerError
from pop.system.files import read_json

Piece = str | list[int]  # a part of a prompt: text, or token ids that no text can spell


class Tokenizer:
    """What all kinds share: added tokens, the beginning-of-text token (BOS), and decoding.

    Each kind has `_encode_text`, which returns the ids of a non-empty text without looking for added tokens.
    """

    def __init__(
        self,
        special_tokens: dict[str, int],
        added: dict[str, int],
        bytes_of: dict[int, bytes],
        bos_id: int | None = None,
        normalize: Callable[[str], str] | None = None,  # what happens to a text first
        normalized: Iterable[str] = (),  # the tokens that are searched for in the normalised text
    ):
        self.special_tokens = special_tokens  # ids by name; text spells these tokens only if the caller allows it
        self.bos_id = bos_id
        self.chat_template: str | None = None  # as it is in the checkpoint's files
        self.tool_template: str | None = None  # another one for conversations with tools
        self.template_variables: dict[str, str] = {}  # what templates call bos_token and the like
        self.chat_format: str | None = None  # the name of the format if files of this kind never have a template
        self.added_tokens = added  # ordinary text spells these, but BPE lacks them
        self._normalized = {*normalized}
        self._normalize = normalize or (lambda text: text)
        self._bytes_of = {id: name.encode() for name, id in added.items()} | bytes_of
        self._bytes_of |= dict.fromkeys(special_tokens.values(), b"")
        self.vocab_size = max(self._bytes_of) + 1
        self.unused_ids = sorted({*range(self.vocab_size)} - self._bytes_of.keys())
        self._index()

    def _index(self) -> None:
        """Prepare the search for added tokens, without and with special ones."""
        self._searches = []
        for ids in (self.added_tokens, self.added_tokens | self.special_tokens):
            raw = {name: id for name, id in ids.items() if name not in self._normalized}
            normal = {self._normalize(name): id for name, id in ids.items() if name in self._normalized}
            self._searches.append([(splitter(names), names) for names in (raw, normal)])

    def reserving(self, names: Iterable[str]) -> "Tokenizer":
        """Return a tokenizer to which these added tokens are special, so that ordinary text cannot spell them."""
        if not (names := self.added_tokens.keys() & {*names}):
            return self
        other = copy.copy(self)
        other.special_tokens = self.special_tokens | {name: self.added_tokens[name] for name in names}
        other.added_tokens = {name: id for name, id in self.added_tokens.items() if name not in names}
        other._index()
        return other

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
        for part in self.split(text, allow_special):
            ids += self._encode_text(part) if isinstance(part, str) else part
        return ids

    def split(self, text: str, allow_special: bool) -> Iterator[Piece]:
        """Split a text at its added tokens: yield the normalised texts between them, and their ids."""
        (raw, raw_ids), (normal, normal_ids) = self._searches[allow_special]
        for n, part in enumerate(raw.split(text) if raw else [text]):
            if n % 2:  # every second part is a token's name
                yield [raw_ids[part]]
                continue
            part = self._normalize(part)
            for m, rest in enumerate(normal.split(part) if normal else [part]):
                if rest:
                    yield [normal_ids[rest]] if m % 2 else rest

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

    def text_stream(self) -> Callable[[int | None, bool], str]:
        """Return a function that takes an answer's next id and whether it is the last. It returns whole characters."""
        ids, start, end = [], 0, 0  # ids[start:end] have been returned; the text of an id may depend on those before

        def push(id: int | None, last: bool) -> str:
            nonlocal start, end
            ids.extend([] if id is None else [id])
            before, text = self.decode(ids[start:end]), self.decode(ids[start:])
            if text.endswith("\ufffd") and not last:
                return ""
            start, end = end, len(ids)
            return text[len(before) :]

        return push


class ForeignTokenizer(Tokenizer):
    """A caller's object with encode(text) -> ids, which adds no BOS, and decode(ids) -> text.

    It may also have special_tokens (ids by name), which its encode must not give for any text, bos_id and
    chat_template.
    """

    def __init__(self, source):
        super().__init__(dict(getattr(source, "special_tokens", {})), {}, {0: b""}, getattr(source, "bos_id", None))
        self._source, self.vocab_size, self.unused_ids = source, sys.maxsize, []
        self.chat_template = getattr(source, "chat_template", None)
        if self._encode_text(""):
            raise InputError("tokenizer.encode('') gives token ids; it must add none, such as BOS, to a text")

    def _encode_text(self, text: str) -> list[int]:
        return list(self._source.encode(text))

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        names = {id: name for name, id in self.special_tokens.items()} if special else {}
        groups = ((name, list(group)) for name, group in groupby(ids, names.get))
        return "".join(self._source.decode(group) if name is None else name * len(group) for name, group in groups)


def splitter(names: Iterable[str]) -> re.Pattern | None:
    """A pattern that splits a text at any of the names and keeps them. Of two at one place, the longer one counts."""
    longest_first = sorted(names, key=lambda name: (name[0], -len(name)))
    by_first = [
        re.escape(first) + "(?:" + "|".join(re.escape(name[1:]) for name in group) + ")"  # quicker than one long list
        for first, group in groupby(longest_first, lambda name: name[0])
    ]
    return re.compile("(" + "|".join(by_first) + ")") if by_first else None


def as_tokenizer(given) -> Tokenizer:
    """Return a tokenizer, given one, the path of one, or an object with encode and decode (see ForeignTokenizer)."""
    if isinstance(given, str | PathLike):
        return load_tokenizer(given)
    if isinstance(given, Tokenizer):
        return given
    if not all(callable(getattr(given, name, None)) for name in ("encode", "decode")):
        raise InputError(f"tokenizer is {given!r:.80}; give a path, None, or an object with encode and decode")
    return ForeignTokenizer(given)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer in a directory, a tokenizer.json or a tokenizer.model.

    Raises TokenizerError if it is missing or broken, or has a feature that we do not reproduce exactly.
    """
    from pop.inputs import byte_pair, sentence_piece  # here, because they import this file

    path = Path(expanduser(path))
    folder = path if path.is_dir() else path.parent
    files = [folder / "tokenizer.json", folder / "tokenizer.model"] if path.is_dir() else [path]
    files = [file for file in files if file.is_file()]
    if not files:
        raise TokenizerError(f"{path}: there is no tokenizer.json and no tokenizer.model here.")
    try:
        config, data = _read(folder, "tokenizer_config.json"), files[-1].read_bytes()
        spec = json.loads(files[0].read_bytes()) if files[0].suffix == ".json" else None
        variables = _read(folder, "special_tokens_map.json") | config
        # add_bos_token and its like are true or false, not tokens.
        variables = {key: x for key, x in variables.items() if key.endswith("_token") and x and x is not True}
        variables = {key: x if isinstance(x, str) else x["content"] for key, x in variables.items()}
        added = _added_tokens(folder, config, {} if spec is None else spec, {*variables.values()})
        if files[-1].suffix != ".json" and data[:1] == b"\n":  # the first tag of a sentencepiece model
            tokenizer = sentence_piece.from_tokenizer_model(data, added)
        elif spec is None:
            tokenizer = byte_pair.from_tiktoken_file(data)
        else:
            replaces = (spec.get("normalizer") or {}).get("type") == "Replace"  # spaces, by sentencepiece's mark
            kind = sentence_piece if replaces else byte_pair
            tokenizer = kind.from_tokenizer_json(spec | {"added_tokens": added})
        tokenizer.template_variables = variables
        templates = _chat_templates(folder, config)
        tokenizer.chat_template, tokenizer.tool_template = templates.get("default"), templates.get("tool_use")
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OSError) as error:
        reason = "" if isinstance(error, TokenizerError) else f"not a tokenizer, {type(error).__name__}: "
        raise TokenizerError(f"{path}: {reason}{error}") from error
    return tokenizer


def _read(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder / name, TokenizerError) if (folder / name).is_file() else {}


def _added_tokens(folder: Path, config: dict[str, Any], spec: dict[str, Any], special: set[str]) -> list[dict]:
    """Return the added tokens of all files, in the form of tokenizer.json, whose own entries come first."""
    older = _read(folder, "added_tokens.json")
    tokens = {name: {"id": id, "content": name, "special": name in special} for name, id in older.items()}
    in_config = config.get("added_tokens_decoder", {})
    tokens |= {token["content"]: {"id": int(id)} | token for id, token in in_config.items()}
    return list((tokens | {token["content"]: token for token in spec.get("added_tokens", ())}).values())


def sort_added(tokens: list[dict], vocab: dict[str, int]) -> tuple[dict, dict, set[str]]:
    """Return the ids of special and of other added tokens, and the names that are sought in the normalised text."""
    special, added, normalized = {}, {}, set()
    for token in tokens:
        name, id = token["content"], token["id"]
        for flag in ("single_word", "lstrip", "rstrip"):
            if token.get(flag, False):
                raise TokenizerError(f"{flag} of the added token {name!r} is set, which is not supported.")
        if not name.encode() or vocab.get(name, id) != id:
            raise TokenizerError(f"the added token {name!r} has two ids or no text.")
        (special if token["special"] else added)[name] = id
        if token.get("normalized", False):
            normalized.add(name)
    ids = list({**vocab, **special, **added}.values())
    if not all(type(id) is int and 0 <= id < 2**24 for id in ids) or len({*ids}) < len(ids) or "" in vocab:
        raise TokenizerError("an id appears twice, is not a non-negative integer or is too large, or lacks a text.")
    return special, added, normalized


def _chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Return the chat templates by name; the usual one is "default"."""
    template = config.get("chat_template")
    for name in ("chat_template.json", "processor_config.json"):
        template = template or _read(folder, name).get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(template, list):  # several templates by name
        template = {entry["name"]: entry["template"] for entry in template}
    templates = dict(template) if isinstance(template, dict) else {"default": template} if template else {}
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates.setdefault(file.stem, file.read_text(encoding="utf-8"))
    if not all(isinstance(template, str) for template in templates.values()):
        raise TokenizerError("a chat_template is not text.")
    return templates


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


def token_mask(mask, tokens: torch.Tensor) -> torch.Tensor | None:
    """Return a bool tensor [B, T], as the tokens, on the CPU. None stays None, and anything else is an InputError."""
    if mask is not None and (getattr(mask, "dtype", None) != torch.bool or mask.shape != tokens.shape):
        raise InputError(f"full_depth is {mask!r:.80}; it must be a bool tensor {list(tokens.shape)}, as tokens are")
    return None if mask is None else mask.cpu()


def _integers(values) -> torch.Tensor | None:
    """Return an int64 tensor, or None for anything that is not integers in the form of a tensor."""
    try:
        values = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        return None
    other = values.is_floating_point() or values.is_complex() or values.dtype == torch.bool
    return None if other else values.to(torch.int64)
