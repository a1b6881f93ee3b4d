"""Meta's tokenizer.model of Llama 3 becomes tokenizer.json.

The file has a line for each token: its bytes in base64, and its rank, which is its id. It has no merges: two neighbours
merge if their concatenation has a rank, the lowest rank first. A rule gives the ids of special tokens.
"""

import base64
from itertools import pairwise
from pathlib import Path
from typing import Any

from pop.errors import TokenizerError
from pop.inputs.byte_pair import CHARS
from pop.inputs.chat_templates import TEMPLATES
from tools.convert.checkpoint import write_json
from tools.convert.gguf_tokenizer import PRE_TOKENIZERS, bos_first

BOS = "<|begin_of_text|>"
SPECIAL = [
    *("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"),
    *("finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id"),
    *("eom_id", "eot_id", "python_tag"),
    *(f"reserved_special_token_{n}" for n in range(3, 248)),
]


def write_tokenizer(source: Path, folder: Path) -> None:
    """Write tokenizer.json, and tokenizer_config.json with Llama-3.1's chat template.

    Meta's files have no template, and do not tell instruct models from base models. Raises TokenizerError if the file
    is not a list of tokens.
    """
    try:
        lines = [line.split() for line in source.read_bytes().splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        raise TokenizerError(f"{source} is not a list of tokens in base64 with their ranks: {error}") from None
    in_order = sorted(ranks.values()) == list(range(len(lines)))
    if not in_order or b"" in ranks or any(bytes([byte]) not in ranks for byte in range(256)):
        found = "a token or a rank is missing or appears twice, or a single byte is not a token"
        raise TokenizerError(f"{source}: {found}; fetch it again")
    write_json(folder / "tokenizer.json", tokenizer_json(ranks))
    config = {"bos_token": BOS, "eos_token": "<|end_of_text|>", "chat_template": TEMPLATES["llama-3.1"]}
    write_json(folder / "tokenizer_config.json", config)


def tokenizer_json(ranks: dict[bytes, int]) -> dict[str, Any]:
    """Return the contents of tokenizer.json for these tokens."""
    normalizer, pre_tokenizer, ignore_merges = PRE_TOKENIZERS["llama-bpe"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = []
    for n, name in enumerate(SPECIAL):
        added.append({"id": len(ranks) + n, "content": f"<|{name}|>", "special": True} | flags)
    merges = []
    for token in sorted(ranks, key=ranks.get):
        pair = last_merge(token, ranks)
        if pair is not None:
            merges.append([_text(part) for part in pair])
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": bos_first(BOS, len(ranks)),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": ignore_merges,  # finds the tokens that no merges make
            "vocab": {_text(token): rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }


def last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes] | None:
    """Return the two parts that merge into a token at last. None: it is a single byte, or merging does not make it."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        candidates = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        lowest = min(candidates)
        if lowest >= ranks[token]:
            return None
        n = candidates.index(lowest)
        parts[n : n + 2] = [parts[n] + parts[n + 1]]
    return parts if len(parts) == 2 else None


def _text(token: bytes) -> str:
    return "".join(CHARS[byte] for byte in token)
