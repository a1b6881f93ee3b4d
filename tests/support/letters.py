"""A tokenizer whose tokens are single bytes."""

from pop.inputs.chat_templates import TEMPLATES
from pop.inputs.tokenizers import Tokenizer


class Letters(Tokenizer):
    """An id is a byte. Special tokens are bytes that UTF-8 never uses, such as 255."""

    def __init__(self, special_tokens=None, bos_id=None):
        special_tokens = special_tokens or {"<end>": 255}
        bytes_of = {id: bytes([id]) for id in range(256)}
        super().__init__(lambda text: list(text.encode()), special_tokens, {}, bytes_of, bos_id)
        if "<|im_end|>" in self.special_tokens:
            self.chat_template = TEMPLATES["chatml"]
