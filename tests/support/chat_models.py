"""Tiny models that chat, with a tokenizer of single bytes and ChatML's control tokens."""

import torch
from support.letters import Letters
from support.tiny import random_model, tiny_config, tiny_gemma3_config

import pop
from pop.pruning.projections import KVProjections

START, END, OTHER_END = 253, 254, 255  # no byte of UTF-8
CONTROL = {"<|im_start|>": START, "<|im_end|>": END, "<|endoftext|>": OTHER_END}
CONFIGS = {"llama": tiny_config(vocab_size=256), "gemma3": tiny_gemma3_config(vocab_size=256, eos_ids=())}
PLANS = {
    "the paper's": pop.PrunePlan((1, 3, 4)),
    "none": pop.PrunePlan.none(),
    "first 2, last 3": pop.PrunePlan((0, 3), full_depth_last=3, full_depth_first=2),
    "two taps": "two taps",
}


def make(family, plan, **options):
    """A model with a window of 5 if it is Gemma's, whose prompts run in chunks of 7 tokens."""
    config = CONFIGS[family]
    model = pop.Model(random_model(config, seed=3), config, Letters(CONTROL), chunk_size=7, **options)
    if plan == "two taps":
        layers, KE, D = (2, 3, 4), config.num_kv_heads * config.head_dim, config.hidden_size
        random = torch.Generator().manual_seed(0)
        weight = torch.randn(3, 2, KE, 2 * D, generator=random) / (2 * D) ** 0.5
        bias = 0.1 * torch.randn(3, 2, KE, generator=random)
        plan = pop.PrunePlan(layers, 2, 1, KVProjections(layers, weight, bias, model.fingerprint, 2))
    model.plan = plan
    return model
