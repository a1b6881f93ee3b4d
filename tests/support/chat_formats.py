"""A chat format of each family, by small tokenizers."""

from support.text import golden_tokenizer, train

from pop.inputs.chat import chat_format
from pop.inputs.sentence_piece import from_tokenizer_model

TOKENIZERS = {family: golden_tokenizer(family) for family in ("llama-3.1", "smollm2")}
TOKENIZERS["gemma3"] = from_tokenizer_model(train())  # a tokenizer like Gemma's
NAMES = {"llama-3.1": "llama-3.1", "smollm2": None, "gemma3": "gemma"}
FORMATS = {family: chat_format(tokenizer, choice=NAMES[family]) for family, tokenizer in TOKENIZERS.items()}
FAMILIES = tuple(FORMATS)
