"""Answers that follow a JSON schema: a `logits_processor` made with llguidance, which knows grammars and schemas.

pip install llguidance
python -m tools.examples.json_schema "The capital of France, as JSON:"
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

import pop
from pop.errors import InputError, MissingExtra
from pop.generation.answers import end_ids

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "population": {"type": "integer", "minimum": 0, "maximum": 99_999_999},
    },
    "required": ["city", "population"],
    "additionalProperties": False,  # otherwise a model may add properties until the answer is cut
}
# As json.dumps writes. Otherwise JSON may have any white space, and a small model may write nothing else. The keys of a
# schema's "x-guidance" win over these.
FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class JsonSchema:
    """A `logits_processor` that allows only the tokens after which an answer can still become JSON of a schema.

    It keeps no state between calls, so all rows of a batch may share it.

    Args:
        model: a model with a tokenizer.
        schema: a JSON schema, as a dict or as text.
        tokenizer: what `tokenizer_of` has made for the model. It takes a second, so share it among schemas.
    """

    def __init__(self, model: pop.Model, schema: dict[str, Any] | str, tokenizer: Any = None):
        if not isinstance(schema, dict | str):  # a class of pydantic, for instance
            raise InputError(
                f"the JSON schema is {schema!r:.80}; give a dict or its text, such as pydantic's model_json_schema()"
            )
        tokenizer = tokenizer or tokenizer_of(model)
        matcher = import_llguidance().LLMatcher
        try:
            grammar = matcher.grammar_from_json_schema(schema, defaults=FORM)
        except ValueError as error:
            raise InputError(f"the JSON schema is not JSON: {error}") from None
        self.start = matcher(tokenizer, grammar)
        if self.start.is_error():
            raise InputError(f"the JSON schema cannot be used: {self.start.get_error()}")

    def __call__(self, tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        matcher = self.start.deep_copy()
        matcher.consume_tokens(tokens)
        if matcher.is_error():  # such as a pattern with too many states
            reason, *_ = str(matcher.get_error()).splitlines()
            raise InputError(f"the JSON schema cannot be followed: {reason:.200}")
        bias = torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8)  # [V]
        allowed = bias[: len(logits)] > 0
        return logits.masked_fill(~allowed.to(logits.device), -torch.inf)


def import_llguidance() -> Any:
    """The package. Raises MissingExtra without it."""
    try:
        import llguidance
    except ImportError:
        raise MissingExtra("a JSON schema needs llguidance; install it: `pip install llguidance`") from None
    return llguidance


def tokenizer_of(model: pop.Model) -> Any:
    """A model's tokens as llguidance reads them."""
    package = import_llguidance()
    model.need_tokenizer("a JSON schema")
    vocabulary = package.TokenizerWrapper(_Vocabulary(model))
    return package.LLTokenizer(vocabulary, n_vocab=model.config.vocab_size, eos_token=sorted(end_ids(model)))


class _Vocabulary:
    """What llguidance asks of a tokenizer: the bytes of all tokens, and the ids of a text."""

    def __init__(self, model: pop.Model):
        self.tokenizer = model.tokenizer
        self.tokens = []
        padding = range(model.tokenizer.vocab_size, model.config.vocab_size)
        unused = {*model.tokenizer.unused_ids, *padding}
        for token in range(model.config.vocab_size):
            text = b"" if token in unused else model.tokenizer.token_bytes(token)
            if not text and token not in unused:  # such as an end token
                text = b"\xff<%d>" % token  # a name after the byte 255, which no text has
            self.tokens.append(text)
        self.special_token_ids = [token for token, text in enumerate(self.tokens) if text.startswith(b"\xff")]
        self.bos_token_id = model.tokenizer.bos_id
        self.eos_token_id = min(end_ids(model))

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, bos=False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="json_schema", description="Continue a text with JSON of a schema.")
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--model", default="smollm2-135m", metavar="NAME_OR_DIR")
    parser.add_argument("--schema", type=json.loads, default=SCHEMA, metavar="JSON", help="default: a city")
    args = parser.parse_args(argv)
    try:
        model = pop.load(args.model)
        processor = JsonSchema(model, args.schema)
        print(model.generate(args.prompt, max_new_tokens=64, logits_processor=processor).text)
    except pop.PopError as error:
        print(f"json_schema: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
