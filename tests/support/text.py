"""Tokenizers for tests, and texts on which tokenizers differ."""

import functools
import io
import json
from itertools import pairwise
from pathlib import Path

import sentencepiece
from hypothesis import strategies as st

from pop.inputs.tokenizers import Tokenizer, load_tokenizer

GOLDENS = Path(__file__).parents[1] / "goldens" / "tokenizers"
BYTE_PAIR_FAMILIES = ("llama-3.1", "qwen3", "smollm2")
TEXTS = json.loads((GOLDENS / "texts.json").read_bytes())["texts"]

# Runs of whitespace, digits, marks, contractions, control tokens and code.
PIECES = st.sampled_from(
    ["  ", "\n", " \n", "\t", "\u3000", "'s", "'LL", "1", "٣", "½", "é", "e\u0301", "中", "👍🏽", "!", "the", "ing"]
)
CONTROL = st.sampled_from(["<|eot_id|>", "<|im_start|>", "<|im_end|>", "<think>", "<repo_name>", "<|", "|>", "\x1c"])
TRICKY_TEXT = st.lists(PIECES | CONTROL | st.text(st.characters(codec="utf-8")), max_size=12).map("".join)
USER_DEFINED = ["<start_of_turn>", "<end_of_turn>", "<table>", "\n\n", "\n\n\n", "▁▁", "▁▁▁"]


def spec_of(family: str) -> dict:
    """The contents of the family's tokenizer.json, cut down to its first tokens."""
    return json.loads((GOLDENS / family / "tokenizer.json").read_bytes())


@functools.cache
def golden_tokenizer(family: str) -> Tokenizer:
    """The family's tokenizer, cut down to its first tokens. It is read once for all tests of a process."""
    return load_tokenizer(GOLDENS / family)


def load(spec: dict | str, folder: Path) -> Tokenizer:
    """Write a tokenizer.json and load it."""
    (folder / "tokenizer.json").write_text(spec if isinstance(spec, str) else json.dumps(spec), encoding="utf-8")
    return load_tokenizer(folder)


def assert_golden(tokenizer: Tokenizer, ids: dict, texts: list[str] = TEXTS) -> None:
    for text, as_text, with_special in zip(texts, ids["as_text"], ids["with_special"], strict=True):
        assert tokenizer.encode(text) == as_text, ascii(text)
        assert tokenizer.encode(text, allow_special=True) == with_special, ascii(text)


def naive_bpe(parts: list[str], merges: list) -> list[str]:
    """Byte-pair encoding by its definition: all neighbours are compared again after each merge."""
    ranks = {tuple(pair): n for n, pair in enumerate(merges)}
    while pairs := [(ranks[pair], n) for n, pair in enumerate(pairwise(parts)) if pair in ranks]:
        _, n = min(pairs)
        parts[n : n + 2] = ["".join(parts[n : n + 2])]
    return parts


@functools.cache
def train(**settings) -> bytes:
    """Train a sentencepiece model like Gemma's on our test texts, once for all tests of a process."""
    ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
    pieces = {"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"}
    kept = {
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "user_defined_symbols": USER_DEFINED,
    }
    kind = {"vocab_size": 500, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    settings = kind | kept | ids | pieces | settings
    model, lines = io.BytesIO(), [text for text in TEXTS if text.isprintable()] + ["start of turn <b> user"] * 9
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **settings)
    return model.getvalue()
