"""A tokenizer of single bytes."""

from pop.inputs.tokenizers import Tokenizer


class Letters(Tokenizer):
    """A tokenizer of single bytes: id = byte, and special tokens among them, such as 255, which no UTF-8 text has."""

    def __init__(self, special_tokens=None, bos_id=None):
        super().__init__(special_tokens or {"<end>": 255}, {}, 256, bos_id)

    def token_bytes(self, token):
        return b"" if token in self.special_tokens.values() else bytes([token])

    def _encode_text(self, text):
        return list(text.encode())
