"""Tokenizers: text to token ids and back, with exactly the ids of the original tokenizers.

Byte-level BPE (Llama-3, Qwen, SmolLM2, GPT-2) is in byte_pair.py, and Gemma's BPE of characters in sentence_piece.py.
"""

import copy
import re
from collections.abc import Callable, Collection, Iterable
from functools import partial
from itertools import chain, groupby
from os import PathLike
from os.path import expanduser, isfile
from pathlib import Path
from typing import Any

from pop.errors import InputError, TokenizerError
from pop.system.files import read_json

Piece = str | list[int]  # a part of a prompt: text, or token ids that no text can spell
Splitter = Callable[[str], list[Piece]]


class Tokenizer:
    """Text to ids and back, with added tokens and the beginning-of-text token (BOS).

    Args:
        encode_text: Returns the ids of a non-empty text without looking for added tokens.
        special_tokens: Ids by name. Text spells these tokens only if the caller allows it.
        added: The ids of other tokens that BPE lacks. Ordinary text spells them.
        bytes_of: The bytes of each token, which may be part of a character.
        bos_id: The token that begins a text, if the family has one.
        normalize: What happens to a text first.
        normalized: The names that are searched for in the normalised text. The others are searched for before.
    """

    def __init__(
        self,
        encode_text: Callable[[str], list[int]],
        special_tokens: dict[str, int],
        added: dict[str, int],
        bytes_of: dict[int, bytes],
        bos_id: int | None = None,
        normalize: Callable[[str], str] = str,
        normalized: Collection[str] = (),
    ):
        self._encode_text = encode_text
        self.special_tokens = special_tokens
        self.added_tokens = added
        self.bos_id = bos_id
        self.chat_template: str | None = None  # as it is in the checkpoint's files
        self.template_variables: dict[str, str] = {}  # what templates call bos_token and the like
        self._normalized = normalized
        self._normalize = normalize
        self._bytes_of = {id: name.encode() for name, id in added.items()} | bytes_of
        self._bytes_of |= dict.fromkeys(special_tokens.values(), b"")
        self.vocab_size = max(self._bytes_of) + 1
        self.unused_ids = sorted(set(range(self.vocab_size)) - self._bytes_of.keys())
        self._prepare_search()

    def _prepare_search(self) -> None:
        self._ordinary = self._splitters(self.added_tokens)
        self._with_special = self._splitters(self.added_tokens | self.special_tokens)

    def _splitters(self, ids: dict[str, int]) -> "tuple[Splitter, Splitter]":
        """Return what splits a text at these tokens before and after it is normalised."""
        raw = {name: id for name, id in ids.items() if name not in self._normalized}
        normal = {self._normalize(name): id for name, id in ids.items() if name in self._normalized}
        return splitter(raw), splitter(normal)

    def reserving(self, names: Iterable[str]) -> "Tokenizer":
        """Return a tokenizer to which these added tokens are special, so that ordinary text cannot spell them."""
        added = dict(self.added_tokens)
        reserved = {name: added.pop(name) for name in names if name in added}
        if not reserved:
            return self
        other = copy.copy(self)
        other.special_tokens = self.special_tokens | reserved
        other.added_tokens = added
        other._prepare_search()
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
        ids = []
        if bos and self.bos_id is not None:
            ids.append(self.bos_id)
        split_raw, split_normal = self._with_special if allow_special else self._ordinary
        for raw in split_raw(text):
            pieces = split_normal(self._normalize(raw)) if isinstance(raw, str) else [raw]
            for piece in pieces:
                ids += self._encode_text(piece) if isinstance(piece, str) else piece
        return ids

    def encode_pieces(self, pieces: Iterable[Piece], bos: bool = True) -> list[int]:
        """Return the ids of texts and lists of ids in order. Adjacent texts are encoded as one text."""
        ids = self.encode("", bos=bos)
        for is_text, group in groupby(pieces, lambda piece: isinstance(piece, str)):
            if is_text:
                ids += self.encode("".join(group), bos=False)
            else:
                ids += chain.from_iterable(group)
        return ids

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Return the text of token ids, with U+FFFD in place of invalid UTF-8.

        Args:
            ids: A list, a tensor or an array.
            special: Write the names of special tokens. By default they are left out.
        """
        names = {id: name for name, id in self.special_tokens.items()} if special else {}
        if hasattr(ids, "tolist"):
            ids = ids.tolist()
        found = [self.token_bytes(id) or names.get(id, "").encode() for id in ids]
        return b"".join(found).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes of a token, which may be part of a character. For a special token they are b""."""
        try:
            return self._bytes_of[id]
        except (KeyError, TypeError):
            raise InputError(f"token id {id!r} is not in the vocabulary of {self.vocab_size} tokens.") from None


def splitter(ids: dict[str, int]) -> Splitter:
    """Return a function that splits a text at the names of tokens, into texts and, for each name, a list of its id."""
    return partial(_split, any_of(ids), ids)  # no closure, so that a tokenizer can be pickled


def _split(pattern: re.Pattern, ids: dict[str, int], text: str) -> list[Piece]:
    return [[ids[part]] if part in ids else part for part in pattern.split(text) if part]


def any_of(names: Collection[str]) -> re.Pattern:
    """Return a pattern that finds any of the names, as its group. Of two at one place, the longer one counts.

    Names share their beginnings in the pattern, so a search takes linear time even for thousands of names.
    """
    return re.compile(f"({_longest(sorted(names)) if names else '(?!)'})")


def _longest(names: list[str]) -> str:
    """Return a regular expression for the longest of some sorted names."""
    groups = groupby(filter(None, names), lambda name: name[0])
    branches = [re.escape(first) + _longest([name[1:] for name in group]) for first, group in groups]
    if "" in names:  # a name ends here, unless a longer one follows
        branches.append("")
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer in a directory, a tokenizer.json or a tokenizer.model.

    Raises TokenizerError if it is missing or broken, or has a feature that we do not reproduce exactly.
    """
    if not isinstance(path, str | PathLike):
        raise InputError(f"tokenizer is {path!r:.80}; give the path of one, or None")
    path = Path(expanduser(path))
    places = (path, path / "tokenizer.json", path / "tokenizer.model")
    files = [place for place in places if isfile(place)]  # the path of a file has no files below it
    if not files:
        raise TokenizerError(f"{path}: there is no tokenizer.json and no tokenizer.model here.")
    try:
        return _load(files)
    except Exception as error:  # broken files can raise nearly anything
        reason = "" if isinstance(error, TokenizerError) else f"not a tokenizer, {type(error).__name__}: "
        raise TokenizerError(f"{path}: {reason}{error}") from error


def _load(files: list[Path]) -> Tokenizer:
    """Load a tokenizer.json, a tokenizer.model, or both in this order, with the other files of their folder."""
    from pop.inputs import byte_pair, sentence_piece  # here, because they import this file

    folder = files[0].parent
    is_json = files[0].suffix == ".json"
    spec = read_json(files[0], TokenizerError) if is_json else {}
    config = _read(folder, "tokenizer_config.json")
    byte_pair.refuse_settings(config, ("add_prefix_space", "split_special_tokens"))  # which would change ids
    listed = config.get("added_tokens_decoder")
    special_map = {}
    older = {}
    if listed is None:  # otherwise transformers does not read these older files
        special_map = _read(folder, "special_tokens_map.json")
        older = _read(folder, "added_tokens.json")
    named = _named_tokens(config, special_map)
    added = _added_tokens(listed, older, spec, named.values())
    data = files[-1].read_bytes()
    if files[-1].suffix != ".json" and data.startswith(b"\n"):  # the first tag of a sentencepiece model
        tokenizer = sentence_piece.from_tokenizer_model(data, added)
    elif not is_json:
        raise TokenizerError(
            "tokenizer.model is not sentencepiece's; "
            "if the folder has Meta's files, run `python -m tools.convert SOURCE DIR` in a checkout of pop first"
        )
    else:
        normalizer = (spec.get("normalizer") or {}).get("type")
        kind = sentence_piece if normalizer == "Replace" else byte_pair  # spaces, by sentencepiece's mark
        tokenizer = kind.from_tokenizer_json(spec | {"added_tokens": added})
    tokenizer.template_variables = {key: token["content"] for key, token in named.items() if key.endswith("_token")}
    tokenizer.chat_template = _chat_template(folder, config)
    return tokenizer


def _read(folder: Path, name: str) -> dict:
    file = folder / name
    return read_json(file, TokenizerError) if file.is_file() else {}


# The order in which transformers adds the tokens that only the configuration names.
_FIRST = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _named_tokens(config: dict, special_map: dict) -> dict[str, dict]:
    """Return the special tokens that two files name, in the form of tokenizer.json and in transformers' order.

    Templates call them by their keys: bos_token, eos_token and the like.
    """
    both = special_map | config
    listed = both.get("additional_special_tokens") or []
    extra = both.get("extra_special_tokens") or {}
    if extra != special_map.get("extra_special_tokens", extra):
        raise TokenizerError("special_tokens_map.json has other extra_special_tokens than tokenizer_config.json")
    if isinstance(extra, list):
        listed = extra
        extra = {}
    in_order = dict.fromkeys(_FIRST) | both | special_map
    named = {key: token for key, token in in_order.items() if key.endswith("_token")}
    named |= extra
    named |= dict(enumerate(listed))
    tokens = {}
    for key, token in named.items():
        if token and token is not True:  # add_bos_token and its like are true or false
            tokens[str(key)] = {"content": token} if isinstance(token, str) else token
    return tokens


def _added_tokens(listed: dict | None, older: dict, spec: dict, named: Iterable[dict]) -> list[dict]:
    """Return the added tokens of all files, in the form of tokenizer.json.

    Those `listed` in the configuration count most, and must be all that `spec`, the tokenizer.json, has: some classes
    of transformers spell the others. `older` are those of added_tokens.json.

    The last of them have no id: those that the configuration names, and no file lists.
    """
    special = {token["content"]: token | {"special": True} for token in named}
    tokens = {name: {"id": id, "content": name, "special": name in special} for name, id in older.items()}
    tokens |= {token["content"]: token for token in spec.get("added_tokens", ())}
    if listed is not None:
        theirs = {token["content"]: {"id": int(id)} | token for id, token in listed.items()}
        if missing := tokens.keys() - theirs.keys():
            raise TokenizerError(f"added_tokens_decoder in tokenizer_config.json lacks the token {min(missing)!r}.")
        tokens = theirs
    by_id = sorted(tokens.values(), key=lambda token: token["id"])
    return by_id + [token for name, token in special.items() if name not in tokens]


def sort_added(tokens: list[dict], vocab: dict[str, int]) -> tuple[dict, dict, set[str]]:
    """Return the ids of special and of other added tokens, and the names that are sought in the normalised text.

    As in transformers, tokens that the vocabulary lacks get the ids after it, in order. Other ids are refused.
    """
    special = {}
    added = {}
    normalized = {token["content"] for token in tokens if token.get("normalized")}
    free = len(vocab)
    for token in tokens:
        name = token["content"]
        for flag in ("single_word", "lstrip", "rstrip"):
            if token.get(flag):
                raise TokenizerError(f"{flag} of the added token {name!r} is set, which is not supported.")
        expected = vocab.get(name, free)
        id = token.get("id", expected)
        if not name.encode() or id != expected:
            raise TokenizerError(
                f"the added token {name!r} has the id {id!r}; "
                f"it must have a text and the id {expected}, since ids have no gaps."
            )
        if name not in vocab:
            free += 1
        kind = special if token["special"] else added
        kind[name] = id
    ids = list({**vocab, **special, **added}.values())
    are_ids = all(type(id) is int and 0 <= id < 2**24 for id in ids)
    if not are_ids or len(set(ids)) < len(ids) or "" in vocab:
        raise TokenizerError("an id appears twice, is not a non-negative integer or is too large, or lacks a text.")
    return special, added, normalized


def refuse_spelt(special: Iterable[str], merged: Iterable[str]) -> None:
    """Raise TokenizerError if ordinary text merges into a special token."""
    if spelt := set(special).intersection(merged):
        raise TokenizerError(f"ordinary text merges into the special token {min(spelt)!r}.")


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """Return the chat template. Of several with names, it is the one that is called "default"."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template") or _read(folder, "chat_template.json").get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    if not isinstance(template, str | None):
        raise TokenizerError("the chat_template is not text.")
    return template
