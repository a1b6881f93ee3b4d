"""Tiny models that chat, with a tokenizer of single bytes and ChatML's control tokens."""

from support.cases import random_corrections
from support.letters import Letters
from support.nightly import thinned
from support.tiny import tiny_config, tiny_gemma3_config, tiny_model

import pop

START, END, OTHER_END = 253, 254, 255  # no byte of UTF-8
CONTROL = {"<|im_start|>": START, "<|im_end|>": END, "<|endoftext|>": OTHER_END}
CONFIGS = {"llama": tiny_config(vocab_size=256), "gemma3": tiny_gemma3_config(vocab_size=256, eos_ids=())}
PLANS = {
    "the paper's": pop.PrunePlan((1, 3, 4)),
    "none": pop.PrunePlan.none(),
    "first 2, last 3": pop.PrunePlan((0, 3), full_depth_last=3, full_depth_first=2),
    "calibrated": "calibrated",
}
# Each plan in one of the families.
PAIRS = thinned([(family, name) for family in CONFIGS for name in PLANS], [0, 5, 2, 7])


def make(family, plan, **options):
    """A model with a window of 5 if it is Gemma's, whose prompts run in chunks of 7 tokens."""
    model = tiny_model(CONFIGS[family], seed=3, tokenizer=Letters(CONTROL), chunk_size=7, **options)
    if plan == "calibrated":
        layers = (1, 3, 4)  # h is updated between them
        plan = pop.PrunePlan(layers, 2, 1, random_corrections(model.config, layers, 1, model=model))
    model.plan = plan
    return model
