"""The contract of layers and models: the parts of a layer agree with its forward pass, in every family."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import assert_close, models
from support.tiny import random_model, tiny_config, tiny_gemma3_config, tiny_qwen3_vl_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import pop
from pop.models import build
from pop.models.config import RopeConfig
from pop.models.layers import causal_attention, rope_frequencies


def inputs(module, seed):
    """h [2, 5, D] and the rotary tables of each window."""
    h = torch.randn(2, 5, module.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    return h, module.rope(torch.arange(5).expand(2, -1))


@given(models(), st.integers(0, 9))
def test_keys_and_values_are_those_of_the_whole_layer(module, seed):
    h, ropes = inputs(module, seed)
    for layer in module.layers:
        _, *expected = layer.queries_keys_values(h, ropes[layer.window])
        placed = layer.placed(*layer.projected(h), ropes[layer.window])
        for part, other, wanted in zip(layer.keys_values(h, ropes[layer.window]), placed, expected, strict=True):
            assert_close(part, wanted)
            assert_close(other, wanted)


@given(models())
def test_the_pass_calls_each_layer_as_a_module(module):
    """So hooks work. A layer is the sum of its parts."""
    tokens, called, features = torch.arange(12).view(2, 6), [], module.config.hidden_size
    for index, layer in enumerate(module.layers):
        layer.register_forward_hook(lambda layer, args, h, index=index: called.append((index, h.shape)))
    logits = module(tokens)
    assert called == [(index, (2, 6, features)) for index in range(len(module.layers))]
    assert logits.shape == (2, 6, module.config.vocab_size) and logits.dtype == torch.float32

    ropes = module.rope(torch.arange(6).expand(2, -1))
    h = module.embed(tokens)
    for layer in module.layers:
        q, k, v = layer.queries_keys_values(h, ropes[layer.window])
        h = h + layer.attention_update(causal_attention(q, k, v, layer.scale, layer.window))
        h = h + layer.mlp_update(h)
    assert_close(module.head(h), logits)


ROPE, ROPE_OF_TINY = RopeConfig(kind="llama3", factor=8.0), (tiny_config().rope, torch.device("cpu"))


@pytest.mark.parametrize("config", [tiny_config(rope=ROPE), tiny_gemma3_config(), tiny_qwen3_vl_config()])
def test_rotary_frequencies_are_computed_once(config):
    """Then a call only turns positions into angles. A captured graph reads the frequencies at one address."""
    module, positions, operations = random_model(config), torch.arange(5).expand(2, -1), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            operations.append(function.__name__.split(".")[0])
            return function(*args, **(kwargs or {}))

    first = module.rope(positions)
    kept = {key: tensor.data_ptr() for key, tensor in module._frequencies.items()}
    with Watch():
        second = module.rope(positions)
    kinds = len(set(config.windows))
    assert [operations.count(name) for name in ("mul", "cos", "sin")] == [kinds] * 3
    assert {*operations} <= {"mul", "cos", "sin", "slice", "unsqueeze", "_to_copy"}
    for window in first:
        assert all(map(torch.equal, first[window], second[window]))
    assert kept == {key: tensor.data_ptr() for key, tensor in module._frequencies.items()}
    for (rope, _), frequencies in module._frequencies.items():
        assert torch.equal(frequencies, rope_frequencies(rope, config.head_dim, "cpu"))


def test_kept_frequencies_follow_a_model_anywhere():
    """Kept ones of inference mode, another device or a fake tensor must not reach a call that cannot use them."""
    module, tokens = random_model(tiny_config()), torch.arange(12).view(2, 6)
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
        assert copied._frequencies[ROPE_OF_TINY].data_ptr() != module._frequencies[ROPE_OF_TINY].data_ptr()
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
