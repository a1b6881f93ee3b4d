"""One decode step through the parts of every family takes nothing from the host, so a CUDA graph can capture it."""

import pytest
import torch
from support.cases import FAMILIES
from support.meta_device import META, device_only
from support.tiny import tiny_config, tiny_qwen3_moe_config

from pop.backends import accelerate
from pop.models import build
from pop.models.config import RopeConfig
from pop.models.images import Images
from pop.models.layers import causal_attention

CONFIGS = {family: make() for family, make in FAMILIES.items()} | {
    "llama": tiny_config(rope=RopeConfig(kind="llama3", factor=8.0)),
    "qwen3_moe": tiny_qwen3_moe_config(),
}


def attend(layer, q, k, v):
    return causal_attention(q, k, v, layer.scale, layer.window)


@pytest.fixture(params=CONFIGS)
def module(request):
    with META:
        module = build(CONFIGS[request.param]).requires_grad_(False)
    accelerate(module)  # the plain loop over experts waits for their numbers of tokens
    return module


def test_a_step_takes_nothing_from_the_host(module):
    tokens, positions = (torch.zeros(2, 1, dtype=torch.int64, device=META) for _ in range(2))
    module.rope(positions)  # the first call may compute what the others reuse
    with torch.no_grad(), device_only():
        h, ropes = module.embed(tokens), module.rope(positions)
        for layer in module.layers:
            rope = ropes[layer.window]
            h = layer(h, rope, attend)
            k, v = layer.placed(*layer.projected(h), rope)
            assert [x.shape for x in (k, v)] == [x.shape for x in layer.keys_values(layer.normalised(h), rope)]
        logits = module.head(h)
    assert logits.shape == (2, 1, 67) and logits.device == META


def test_image_tokens_take_nothing_from_the_host():
    """M-RoPE, and DeepStack with features and indices on the device."""
    with META:
        module = build(CONFIGS["qwen3_vl"]).requires_grad_(False)
        h, features, index = torch.zeros(2, 3, 30), torch.zeros(4, 30), torch.zeros(2, 3, dtype=torch.int64)
        positions = torch.zeros(3, 2, 3, dtype=torch.int64)
    images = Images(features, index, deepstack=(features,))
    with torch.no_grad(), device_only():
        cos, sin = module.rope(positions)[None]
        h = images.add_deepstack(images.place(h), 0)
    assert cos.shape == sin.shape == (2, 3, 1, 5) and h.shape == (2, 3, 30)


HOST, NUMBER = torch.zeros(2, dtype=torch.int64), torch.tensor(3)
REJECTED = {
    "an operand": lambda x: x + HOST,
    "an index": lambda x: x[HOST],
    "a copy to the device": lambda x: HOST.to(META),
    "a number's copy to the device": lambda x: NUMBER.to(META),
    "a copy into a tensor": lambda x: x.copy_(HOST),
    "a new tensor": lambda x: torch.tensor([1, 2], device=META),
    "a copy to the host": lambda x: x.cpu(),
    "a number": lambda x: x[0].item(),
    "a boolean index": lambda x: x[x > 0],
    "an assignment by a boolean index": lambda x: x.__setitem__(x > 0, x[:1].expand(2)),
    "a search": lambda x: x.nonzero(),
}
ALLOWED = {
    "numbers": lambda x: 2 * x + NUMBER,
    "a new constant": lambda x: x + x.new_full((), 3),
    "an index": lambda x: x[torch.arange(2, device=META)],
    "another dtype": lambda x: x.to(torch.float32),
    "an assignment by an index": lambda x: x.__setitem__(x, 1),
}


@pytest.mark.parametrize("operation", REJECTED.values(), ids=REJECTED)
def test_the_host_is_rejected(operation):
    x = torch.zeros(2, dtype=torch.int64, device=META)
    with pytest.raises((RuntimeError, NotImplementedError)), device_only():
        operation(x)


@pytest.mark.parametrize("operation", ALLOWED.values(), ids=ALLOWED)
def test_work_of_the_device_is_allowed(operation):
    x = torch.zeros(2, dtype=torch.int64, device=META)
    with device_only():
        operation(x)
