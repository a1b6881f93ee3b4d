"""Tokenizers of tests."""

import io
import json
from pathlib import Path

import sentencepiece

GOLDENS = Path(__file__).parents[1] / "goldens" / "tokenizers"


TEXTS = json.loads((GOLDENS / "texts.json").read_bytes())["texts"]


USER_DEFINED = ["<start_of_turn>", "<end_of_turn>", "<table>", "\n\n", "\n\n\n", "▁▁", "▁▁▁"]


def train(**settings) -> bytes:
    """A sentencepiece model like Gemma's, trained on our own test texts."""
    settings = {
        "vocab_size": 500,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "user_defined_symbols": USER_DEFINED,
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
        "pad_piece": "<pad>",
        "eos_piece": "<eos>",
        "bos_piece": "<bos>",
        "minloglevel": 2,
    } | settings
    model, lines = (
        io.BytesIO(),
        [text for text in TEXTS if text.isprintable()] + ["start of turn <b> user"] * 9,
    )
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **settings)
    return model.getvalue()
