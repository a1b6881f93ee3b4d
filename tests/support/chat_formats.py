"""A chat format of each family."""

from pathlib import Path

from pop.inputs.chat import chat_format
from pop.inputs.tokenizers import load_tokenizer

GOLDENS = Path(__file__).parents[1] / "goldens" / "tokenizers"


FAMILIES = ("llama-3.1", "smollm2", "gemma3")


FORMATS = {family: chat_format(load_tokenizer(GOLDENS / family)) for family in FAMILIES[:2]}
