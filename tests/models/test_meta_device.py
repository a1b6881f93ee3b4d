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
            k, v = layer.finished_keys_values(*layer.projected(h), rope)
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


def test_the_host_is_rejected_and_work_of_the_device_is_allowed():
    """Or else the tests above could not fail."""
    host, x = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64, device=META)
    rejected = (
        lambda: x + host,
        lambda: x[host],
        lambda: host.to(META),
        lambda: torch.tensor([1, 2], device=META),
        lambda: x.cpu(),
        lambda: x[0].item(),
        lambda: x[x > 0],
        lambda: x.nonzero(),
    )
    for operation in rejected:
        with pytest.raises((RuntimeError, NotImplementedError)), device_only():
            operation()
    with device_only():
        x[torch.arange(2, device=META)] = 1
        assert (2 * x.to(torch.float32) + x.new_full((), 3) + torch.tensor(3)).shape == (2,)
