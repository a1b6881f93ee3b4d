"""A tokenizer whose tokens are single bytes."""

from pop.inputs.chat_templates import TEMPLATES
from pop.inputs.tokenizers import Tokenizer


class Letters(Tokenizer):
    """An id is a byte. Special tokens are bytes that UTF-8 never uses, such as 255."""

    def __init__(self, special_tokens=None, bos_id=None):
        super().__init__(special_tokens or {"<end>": 255}, {}, {id: bytes([id]) for id in range(256)}, bos_id)
        if "<|im_end|>" in self.special_tokens:
            self.chat_template = TEMPLATES["chatml"]

    def _encode_text(self, text):
        return list(text.encode())
