"""Byte-level BPE tokenizers (Llama-3, Qwen, SmolLM2, GPT-2), with the ids of the originals for every text.

A pattern splits the text into pre-tokens. Within each of them, byte-pair encoding merges neighbouring tokens. tiktoken
runs both steps. This file translates tokenizer.json for it. It refuses any feature that it does not reproduce exactly,
and names the feature.
"""

import re
import unicodedata
from collections.abc import Iterable
from functools import cache
from itertools import chain, count, groupby, pairwise
from typing import Any

from pop.errors import InputError, TokenizerError
from pop.inputs.tokenizers import Tokenizer, refuse_spelt, sort_added

_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_PATTERN = _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# SmolLM2 makes each digit one pre-token (\p{N} and the digits of Unicode 17). Then it splits the text between digits
# by GPT-2's pattern, as if each stretch were a whole text. So whitespace before a digit is not split.
_DIGIT = r"\p{N}\x{11DE0}-\x{11DE9}\x{16FF4}-\x{16FF6}"
_DIGITS_GPT2_PATTERN = (
    rf"[{_DIGIT}]|'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?[^\s\p{{L}}{_DIGIT}]+"
    rf"|\s+(?=[{_DIGIT}])|\s+(?!\S)|\s+"
)

# At a million whitespace characters in a row, tiktoken's regular expressions run out of stack.
_TOO_MUCH_WHITESPACE = re.compile(r"(?<!\s)\s{900001}")

# A vocabulary may lack these bytes. In UTF-8 they never occur in a letter, a digit or a whitespace character.
_MAY_LACK = {*range(9), *range(14, 32), 127, 0xC0, 0xC1, 0xF1, 0xF2, 0xF3, *range(0xF5, 0x100)}

# Consecutive symbols, with the whitespace before them. Only a space joins them. A symbol is no letter, digit or
# whitespace. Python counts 1C to 1F as whitespace, and the patterns do not.
_SYMBOL = r"(?:[^\w\s]|[_\x1c-\x1f])"
_SYMBOLS = re.compile(rf"([^\S \x1c-\x1f](?={_SYMBOL}))?( ?{_SYMBOL}+)")

# The original tokenizers normalise by Unicode 9. In it, these newer characters neither compose nor change places.
_NEWER = """
    5C8-5C9 7FD 897-89F 8CA-8D3 9FE C3C D3B-D3C EBA 1715 1ABF-1AF0 1DF6-1DFA A82C 105C9 105D2 105DA 105E4 10D24-10D27
    10D69-10D6D 10EAB-10EAC 10ECB-10ECF 10EF0-10EFB 10EFD-10EFF 10F46-10F50 10F82-10F85 11070 1133B 11383 11385 1138E
    11391 113B8 113BB 113C2 113C5 113C7-113C9 113CE-113D0 1145E 11839-1183A 11930 11938 1193D-1193E 11943 119E0 11A34
    11A47 11A99 11D42 11D44-11D45 11D97 11F41-11F42 1611E-16129 1612F 16D67-16D6A 16FF0-16FF1 1D127-1D128 1D250-1D252
    1D25B-1D25C 1D25F 1D280-1D281 1E08F 1E130-1E136 1E2AE 1E2EC-1E2EF 1E4EC-1E4EF 1E5EE-1E5EF 1E6E3 1E6E6 1E6EE-1E6EF
    1E6F5"""
_NEWER = re.compile("([" + re.sub(r"\s*([0-9A-F]+)", lambda hex: chr(int(hex[1], 16)), _NEWER) + "])")
_MARKS = re.compile(r"[^\w\s!-~]{64,}")  # may be a run of combining marks


class BytePairEncoding:
    """BPE of bytes: neighbours merge if the result is a token, and of several results, the first token counts.

    Args:
        ids: What each token becomes. A byte that the vocabulary lacks, and that texts lose, becomes no id.
        pattern: The regular expression of pre-tokens.
    """

    def __init__(self, ids: dict[bytes, list[int]], pattern: str):
        import tiktoken  # here, so that `import pop` stays fast

        ranks = {token: rank for rank, token in enumerate(ids)}
        self.bpe = tiktoken.Encoding("pop", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self._ids = list(ids.values())  # of each rank
        self._lacking = bytes(token[0] for token, found in ids.items() if not found)

    def encode(self, text: str) -> list[int]:
        if len(text) > 900_000 and _TOO_MUCH_WHITESPACE.search(text):
            raise InputError("the text has more than 900,000 whitespace characters in a row; remove some.")
        if self._lacking and not set(self._lacking).isdisjoint(text.encode()):
            ranks = self._ranks_without_lacking(text)
        else:
            ranks = self.bpe.encode_ordinary(text)
        return [id for rank in ranks for id in self._ids[rank]]

    def _ranks_without_lacking(self, text: str) -> list[int]:
        """Return the ranks of a text that has bytes which the vocabulary lacks.

        The original leaves them out after splitting and before merging. They occur in symbols only, that is, not in
        letters, digits or whitespace. GPT-2's pattern makes consecutive symbols one pre-token, with the space before
        them. So we cut these pre-tokens out of the text and merge each by itself.
        """
        ranks = []
        start = 0
        for match in _SYMBOLS.finditer(text):
            piece = match[2].encode()
            kept = piece.translate(None, self._lacking)
            if len(kept) < len(piece):
                for before in (text[start : match.start()], match[1] or ""):
                    ranks += self.bpe.encode_ordinary(before)
                ranks += self.bpe._encode_single_piece(kept) if kept else []
                start = match.end()
        return ranks + self.bpe.encode_ordinary(text[start:])


def _nfc(text: str) -> str:
    return "".join(unicodedata.normalize("NFC", _MARKS.sub(_in_order, part)) for part in _NEWER.split(text))


def _in_order(run: re.Match) -> str:
    """Long runs of combining marks in their canonical order. Python's own way takes time with the square of a run."""
    text = "".join(unicodedata.normalize("NFD", char) for char in run[0])
    groups = groupby(text, lambda char: unicodedata.combining(char) > 0)
    return "".join(chain.from_iterable(sorted(group, key=unicodedata.combining) for _, group in groups))


# All that a tokenizer.json may set. Other settings must be off. Truncation and padding do not change a text's ids.
_SETTINGS = {
    "version",
    "added_tokens",
    "truncation",
    "padding",
    "normalizer",
    "pre_tokenizer",
    "post_processor",
    "decoder",
    "model",
}
_MODEL_SETTINGS = {"type", "unk_token", "ignore_merges", "vocab", "merges"}


def from_tokenizer_json(spec: dict[str, Any]) -> Tokenizer:
    """Build a tokenizer from the contents of a tokenizer.json."""
    model = spec["model"]
    refuse_settings(spec, spec.keys() - _SETTINGS)
    refuse_settings(model, model.keys() - _MODEL_SETTINGS)
    check("the model type", model["type"], "BPE")
    check("the decoder's type", (spec.get("decoder") or {}).get("type"), "ByteLevel")
    check("the normalizer", spec.get("normalizer"), None, {"type": "NFC"})
    vocab = model["vocab"]
    special, added, normalized = sort_added(spec["added_tokens"], vocab)

    ranked = [*CHARS, *reachable(model["merges"], vocab)]
    refuse_spelt(special, ranked)
    ids = {_to_bytes(token): [vocab[token]] if token in vocab else [] for token in ranked}
    bytes_of = {id: _to_bytes(token) for token, id in vocab.items() if token not in special and token not in added}
    pattern = _pattern(spec.get("pre_tokenizer") or {})
    ignore_merges = model.get("ignore_merges", False)
    lacking = {byte for byte, char in enumerate(CHARS) if char not in vocab}
    if not (ignore_merges or model.get("unk_token") or pattern in (_LLAMA3_PATTERN, _QWEN_PATTERN)):
        lacking -= _MAY_LACK
    if lacking:
        raise TokenizerError(f"its vocabulary lacks the single byte {min(lacking)}.")
    if ignore_merges:
        _add_whole_pre_tokens(ids, pattern, bytes_of)
    return Tokenizer(
        BytePairEncoding(ids, pattern).encode,
        special_tokens=special,
        added=added,
        bytes_of=bytes_of,
        bos_id=bos_id_of(spec.get("post_processor"), special),
        normalize=str if spec.get("normalizer") is None else _nfc,
        normalized=normalized,
    )


def refuse_settings(part: dict[str, Any], names: Iterable[str]) -> None:
    """Raise TokenizerError if one of these settings is on."""
    for name in names:
        check(f"the setting {name}", part.get(name) or None, None)


def _add_whole_pre_tokens(ids: dict[bytes, list[int]], pattern: str, bytes_of: dict[int, bytes]) -> None:
    """Give every token a rank, in place. With ignore_merges, a pre-token in the vocabulary becomes that token.

    tiktoken looks up whole pre-tokens first. The rank changes other texts only if it lets tiktoken merge two tokens.
    """
    bpe = BytePairEncoding(ids, pattern).bpe
    for id, text in bytes_of.items():
        if text in ids:
            continue
        if len(bpe._encode_single_piece(text)) == 2:
            raise TokenizerError(f"ignore_merges is set, but no merge makes the token {text!r}.")
        ids[text] = [id]


def check(name: str, value, *supported) -> None:
    if value not in supported:
        names = ", ".join(map(repr, supported))
        raise TokenizerError(f"{name} is {value!r}, which is not supported (supported: {names}).")


# In tokenizer.json a character stands for each byte: itself if visible in Latin-1, otherwise one from U+0100 on.
_VISIBLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = count(0x100)
CHARS = [chr(byte if byte in _VISIBLE else next(_OTHERS)) for byte in range(256)]
_BYTES = {char: byte for byte, char in enumerate(CHARS)}


def _to_bytes(token: str) -> bytes:
    return bytes([_BYTES[char] for char in token])


def reachable(merges: list, vocab: dict[str, int]) -> list[str]:
    """Return the tokens whose own text merges into them, in the order of their last merges.

    Args:
        merges: Pairs of tokens, or texts of two tokens with a space between them.
        vocab: The id of each token.

    tiktoken merges any two neighbours whose concatenation has a rank. The original merges listed pairs only. Both give
    the same tokens if exactly these tokens have ranks, in this order. The reason: between two boundaries that no merge
    crosses, merging does not depend on the text outside. So the last merge of a token is always the same pair, and this
    pair's place in the list is the token's rank.
    """
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    places = {pair: n for n, pair in enumerate(merges)}
    never = len(merges)

    @cache
    def last_merge(token: str) -> int:
        """Return the place of the pair that is merged last when merging starts from the token's characters."""
        parts = list(token)
        place = 0
        while len(parts) > 1 and place < never:
            candidates = [places.get(pair, never) for pair in pairwise(parts)]
            place = min(candidates)
            n = candidates.index(place)
            parts[n : n + 2] = [parts[n] + parts[n + 1]]
        return place

    found = []
    for n, (left, right) in enumerate(merges):
        token = left + right
        if not {left, right, token} <= vocab.keys() or places[left, right] != n:
            raise TokenizerError(f"the merge of {left!r} and {right!r} appears twice or is not of tokens.")
        if last_merge(token) == n:
            found.append(token)
    return found


def _split_by(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


# Patterns, the steps before byte-level encoding that stand for them, and whether that step splits by GPT-2's pattern.
_STEPS = [
    (_GPT2_PATTERN, [], True),
    (_DIGITS_GPT2_PATTERN, [{"type": "Digits", "individual_digits": True}], True),
    (_LLAMA3_PATTERN, [_split_by(_LLAMA3_PATTERN)], False),
    # OLMo-2 removes what Llama-3's pattern does not match. It matches everything, so both are the same.
    (_LLAMA3_PATTERN, [_split_by(_LLAMA3_PATTERN) | {"behavior": "Removed", "invert": True}], False),
    (_QWEN_PATTERN, [_split_by(_QWEN_PATTERN)], False),
]


def _pattern(pre_tokenizer: dict[str, Any]) -> str:
    """Return the regular expression of pre-tokens."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    *before, last = steps
    uses_regex = last.get("use_regex", True)  # older files lack use_regex
    if last.get("type") == "ByteLevel" and last["add_prefix_space"] is False:
        for pattern, *known in _STEPS:
            if known == [before, uses_regex]:
                return pattern
    raise TokenizerError(f"the pre_tokenizer {steps} is not supported, only Llama-3's, Qwen's, SmolLM2's and GPT-2's.")


def bos_id_of(post_processor: dict[str, Any] | None, special: dict[str, int]) -> int | None:
    """Return the token that the post-processor puts before a text."""
    steps = [] if post_processor is None else post_processor.get("processors", [post_processor])
    steps = [step for step in steps if step["type"] != "ByteLevel"]  # which changes offsets only
    match steps:
        case [] | [{"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}]}]:
            return None
        case [{"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": name}}, {"Sequence": {"id": "A"}}]}]:
            if steps[0]["special_tokens"][name]["ids"] == [special[name]]:
                return special[name]
    raise TokenizerError(f"the post_processor does more than put one token first: {post_processor}.")
