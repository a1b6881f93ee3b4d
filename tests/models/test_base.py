"""What all families share: layers are called as modules, frequencies are kept, and attention can be replaced.

That a layer is the sum of its parts: tests/pruning/test_method.py and tests/engine/test_forward.py.
"""

import copy
import operator
import pickle
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from support.cases import models
from support.tiny import random_model, tiny_config, tiny_gemma3_config, tiny_qwen3_vl_config
from torch._subclasses.fake_tensor import FakeTensorMode

import pop
from pop.models import base, build


@given(models())
def test_the_pass_calls_each_layer_as_a_module(module):
    """So hooks work."""
    called = []
    for index, layer in enumerate(module.layers):
        layer.register_forward_hook(lambda layer, args, h, index=index: called.append((index, h.shape)))
    logits = module(torch.arange(12).view(2, 6))
    assert called == [(index, (2, 6, module.config.hidden_size)) for index in range(len(module.layers))]
    assert logits.shape == (2, 6, module.config.vocab_size) and logits.dtype == torch.float32


@pytest.mark.parametrize("config", [tiny_config(), tiny_gemma3_config(), tiny_qwen3_vl_config()])
def test_rotary_frequencies_are_computed_once(config):
    """A captured graph reads them at one address."""
    module, positions = random_model(config), torch.arange(5).expand(2, -1)
    module.rope(positions)
    kept = list(module._frequencies.values())
    with patch.object(base, "rope_frequencies", None):
        module.rope(positions)
    assert len(kept) == len(set(config.windows))
    assert all(map(operator.is_, module._frequencies.values(), kept))


def test_kept_frequencies_follow_a_model_anywhere():
    """Kept ones of inference mode, another device or a fake tensor must not reach a call that cannot use them."""
    module, tokens = random_model(tiny_config()), torch.arange(12).view(2, 6)
    key = (tiny_config().rope, torch.device("cpu"))
    expected = random_model(tiny_config())(tokens)
    with FakeTensorMode():
        build(tiny_config())(torch.zeros(2, 6, dtype=torch.int64))
    with torch.inference_mode():
        assert torch.equal(module(tokens), expected)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        copied.requires_grad_(True)
        logits = copied(tokens)
        assert torch.equal(logits, expected)
        logits.sum().backward()
        assert copied.layers[0].self_attn.k_proj.weight.grad.any()
        assert copied._frequencies[key].data_ptr() != module._frequencies[key].data_ptr()
    module.to("meta")
    assert module(tokens.to("meta")).device.type == "meta"
    assert not module.state_dict().keys() - dict(module.named_parameters()).keys()


def test_all_that_runs_the_plain_pass_calls_an_attention_that_replaces_its_own():
    """As of a backend: in model.logits, calibration and the importance of layers."""
    model = pop.Model(random_model(tiny_config()), tiny_config(), compile=False)
    texts = [[(n * k) % 67 for n in range(40)] for k in range(1, 12)]
    calls = []

    def no_attention(q, k, v, scale, window, last_attended=None):
        calls.append(window)
        return torch.zeros_like(q).flatten(2)

    model.module.causal_attention = no_attention
    for run in (
        lambda: model.logits([[1, 2, 3]]),
        lambda: pop.calibrate(model, texts, pop.PrunePlan((3, 4)), longest=40, progress=False, steps=0),
        lambda: pop.importance(model, [([1, 2, 3], [4, 5])], progress=False),
    ):
        calls.clear()
        run()
        assert len(calls) >= 4  # five layers, of which calibration does not run the last
