"""Make the golden ids of tokenizers with added tokens, as transformers saves them.

    python -m tools.goldens.added_tokens [gemma3=FOLDER]

Makes tests/goldens/tokenizers/added.json from the reduced tokenizers that tokenizers.py makes. Gemma's is made here:
FOLDER holds the published tokenizer.json of Gemma-3. Without it, the tokenizer.json of the last time serves again.
"""

import json
import random
import sys
import tempfile
from pathlib import Path

from tools.goldens.tokenizers import GOLDENS, MADE_WITH, tokenizers, transformers, write

FAMILIES = ("llama-3.1", "qwen3", "gemma3")
ADDED = ["<tool>", "my_word", "Z\u00fcrich", "cafe\u0301", "the"]  # sought in the normalised text
SPECIAL = ["<|new|>", "<|new|>>"]
WORDS = [*ADDED, *SPECIAL, "Zu\u0308rich", "caf\u00e9", "\u0301", "my", "_word", "then", "<tool", "<|new|", "<think>"]
WORDS += [" ", "  ", "\n", "\n\n", " the", "<table>", "1", "\u4e2d", "<unused1>", "<start_of_turn>", "!", "ing", "<b>"]


def reduced_gemma(spec: dict, letters: int = 250) -> dict:
    """The tokenizer.json `spec` of Gemma with few pieces, and ids without gaps."""
    vocab = spec["model"]["vocab"]
    added = spec["added_tokens"]
    few = {*range(8), *range(107, 112), *range(138, 142), *range(168, 175)}  # runs of newlines and spaces, tags
    kept = [token for token in added if token["id"] in few or token["special"]]
    names = {token["content"] for token in added}
    pieces = sorted(vocab.keys() - names, key=vocab.get)
    short = [name for name in pieces if name.isascii() and not name.startswith("<0x")][:letters]
    single = [name for name in pieces if len(name) == 1 and (name.isascii() or name in "\u2581é中")]
    kept_names = {token["content"] for token in kept} & vocab.keys()
    ordinary = {*short, *single, *(f"<0x{byte:02X}>" for byte in range(256))} | kept_names
    order = sorted(ordinary, key=vocab.get)
    ids = {name: n for n, name in enumerate(order)}
    ids |= {token["content"]: len(ids) for token in kept if token["content"] not in ids}  # one: an image's placeholder
    merges = [pair for pair in spec["model"]["merges"] if {*pair, "".join(pair)} <= ordinary]
    for step in ("single", "pair"):
        spec["post_processor"][step] = spec["post_processor"]["single"]
    spec["post_processor"]["special_tokens"]["<bos>"]["ids"] = [ids["<bos>"]]
    return spec | {
        "added_tokens": [token | {"id": ids[token["content"]]} for token in kept],
        "model": spec["model"] | {"vocab": {name: ids[name] for name in order}, "merges": merges},
    }


def main() -> None:
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1].removeprefix("gemma3="))
        spec = json.loads((folder / "tokenizer.json").read_bytes())
        write(GOLDENS / "gemma3" / "tokenizer.json", reduced_gemma(spec))
    draw = random.Random(1)
    texts = ["".join(draw.choice(WORDS) for _ in range(draw.randint(2, 9))) for _ in range(80)]
    golden = {"made_with": MADE_WITH, "texts": texts}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(GOLDENS / family / "tokenizer.json"))
            tokenizer.add_tokens(ADDED)
            tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
            tokenizer.save_pretrained(folder)
            saved = Path(folder) / "tokenizer.json"
            added = json.loads(saved.read_bytes())["added_tokens"]
            original = tokenizers.Tokenizer.from_file(str(saved))
        with_special = [original.encode(text).ids for text in texts]
        original.encode_special_tokens = True
        as_text = [original.encode(text).ids for text in texts]
        added = [token for token in added if token["content"] in {*ADDED, *SPECIAL}]
        golden[family] = {"added": added, "as_text": as_text, "with_special": with_special}
    write(GOLDENS / "added.json", golden)


if __name__ == "__main__":
    main()
