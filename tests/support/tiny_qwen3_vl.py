"""A tiny Qwen3-VL with the published tokenizer, and images and videos for it."""

import copy
import dataclasses

from support.chat_templates import QWEN3_INSTRUCT
from support.text import golden_tokenizer
from support.tiny import random_model, tiny_qwen3_vl_config
from support.tiny_images import random_bytes

import pop

START, END, IMAGE, VIDEO = 909, 910, 912, 913  # the tokenizer's
IMAGE_MARK, VIDEO_MARK = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
A, B = random_bytes(256, 264, 3, seed=1), random_bytes(400, 200, 3, seed=2)  # large enough not to be resized
FILM = random_bytes(5 * 24, 16, 3, seed=3).reshape(5, 24, 16, 3)


def seeing_model(chat_template: str = QWEN3_INSTRUCT) -> pop.Model:
    """Patches have 16 pixels a side, and four of them make a token: an image of 256 x 264 pixels has 8 x 8 tokens."""
    ids = {"image_id": IMAGE, "video_id": VIDEO, "start_id": START, "end_id": END}
    vision = dataclasses.replace(tiny_qwen3_vl_config().vision, patch_size=16)
    config = tiny_qwen3_vl_config(vocab_size=926, max_positions=4096, vision=vision, **ids)
    tokenizer = copy.copy(golden_tokenizer("qwen3"))
    tokenizer.chat_template = chat_template
    return pop.Model(random_model(config, seed=1), config, tokenizer, plan=0.5, compile=False)
