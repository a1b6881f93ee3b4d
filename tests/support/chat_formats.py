"""A chat format of each family, by small tokenizers."""

from support.text import GOLDENS, train

from pop.inputs.chat import chat_format
from pop.inputs.sentence_piece import SentencePieceTokenizer
from pop.inputs.tokenizers import load_tokenizer

FORMATS = {family: chat_format(load_tokenizer(GOLDENS / family)) for family in ("llama-3.1", "smollm2")}
FORMATS["gemma3"] = chat_format(SentencePieceTokenizer(train()))  # a tokenizer like Gemma's
FAMILIES = tuple(FORMATS)
