"""A tokenizer whose tokens are single bytes."""

from pop.inputs.tokenizers import Tokenizer


class Letters(Tokenizer):
    """An id is a byte. Special tokens are bytes that UTF-8 never uses, such as 255."""

    def __init__(self, special_tokens=None, bos_id=None):
        super().__init__(special_tokens or {"<end>": 255}, {}, 256, bos_id)

    def token_bytes(self, token):
        return b"" if token in self.special_tokens.values() else bytes([token])

    def _encode_text(self, text):
        return list(text.encode())
