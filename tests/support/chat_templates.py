"""Chat templates in the style of fine-tunes whose format is none of ours, and a tokenizer with their control tokens."""

import json
from pathlib import Path

from support.goldens import GOLDENS
from support.text import spec_of

from pop.inputs.tokenizers import load_tokenizer

TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8") for path in sorted((GOLDENS / "chat_templates").glob("*.jinja"))
}
PLAIN_CHATML = TEMPLATES.pop("plain-chatml")
# What Qwen3's template writes, with tools and thoughts; QWEN3_INSTRUCT never thinks, QWEN3_THINKING always does.
_QWEN3 = TEMPLATES.pop("qwen3")
QWEN3 = "{% set thinks = true %}" + _QWEN3
QWEN3_INSTRUCT = "{% set thinks = false %}" + _QWEN3
QWEN3_THINKING = QWEN3.replace("<think>\n\n</think>\n\n{% endif", "{% endif").replace(
    "assistant\n{% if thinks and enable_thinking is false %}", "assistant\n<think>\n{% if false %}"
)
# In the style of Hermes-3 (ChatML with a default system message), Tulu-3 (roles are text), DeepSeek-R1-Distill, which
# drops thoughts, Zephyr (texts are trimmed), Mistral (roles must alternate), Llama-3.1 with other dates, which must not
# pass for Llama-3.1, and Alpaca (no control tokens but the end).
OTHERS = TEMPLATES
NAMES = {
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<｜User｜>": False,
    "<｜Assistant｜>": False,
    "<s>": True,
    "</s>": True,
}


def tokenizer_with(template: str | None, folder: Path, **more):
    """Llama's tokenizer with control tokens of fine-tunes, some of which are not special, and a chat template."""
    spec = spec_of("llama-3.1")
    free = 1 + max(token["id"] for token in spec["added_tokens"])
    spec["added_tokens"] += [
        {"id": free + n, "content": name, "special": special} for n, (name, special) in enumerate(NAMES.items())
    ]
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    config = tokens | more | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_tokenizer(folder)


def written(form, messages, *arguments, **options) -> str:
    """A conversation as text, with the names of control tokens."""
    return form.tokenizer.decode(form.encode(messages, *arguments, **options), special=True)


def assert_chats(form, golden: dict) -> None:
    """The conversations of a golden, as text and as ids."""
    for case in golden["chat"]:
        assert written(form, case["messages"], case["prompt"]) == case["rendered"]
        assert form.encode(case["messages"], case["prompt"]) == case["ids"]
