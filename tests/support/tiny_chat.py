"""A tiny checkpoint that chats: random weights, a tokenizer of single bytes, ChatML's control tokens."""

import json
from pathlib import Path

from support.tiny import write_checkpoint

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Byte-level BPE writes a byte as a character: itself if it is visible in Latin-1, and otherwise one from U+0100 on.
VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
BYTES = [*map(chr, VISIBLE), *(chr(256 + n) for n in range(len(HIDDEN)))]


def write_chat_checkpoint(folder: Path, **overrides) -> Path:
    """As tiny.write_checkpoint, with tokenizer.json and a ChatML template; ids 0 to 2 are the control tokens."""
    write_checkpoint(folder, **{"vocab_size": 259, "max_positions": 1024, **overrides})
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = {
        "added_tokens": [{"id": n, "content": name, "special": True, **flags} for n, name in enumerate(CONTROL)],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel"},
        "model": {
            "type": "BPE",
            "vocab": {name: n for n, name in enumerate((*CONTROL, *BYTES))},
            "merges": [],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    template = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    template += "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    return folder


def begin_with_bos(folder: Path) -> Path:
    """Change such a checkpoint: BOS begins texts and conversations, and a message is <|im_start|> and its content."""
    template = "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['content'] }}{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_end|>{% endif %}"
    settings = {"chat_template": template, "bos_token": CONTROL[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    begins = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": CONTROL[0]}}, {"Sequence": {"id": "A"}}],
        "special_tokens": {CONTROL[0]: {"ids": [0]}},
    }
    tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": begins}), encoding="utf-8")
    return folder
