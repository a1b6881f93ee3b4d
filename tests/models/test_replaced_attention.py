"""A backend may replace the attention of the plain pass and of the vision towers, in one model and its copies."""

import copy
import io
import pickle

import pytest
import torch
from support.cases import assert_close
from support.tiny import random_model, tiny_config, tiny_gemma3_config, tiny_gemma3_vl_config, tiny_qwen3_vl_config

import pop
from pop.models.vision import qwen3_vl as qwen3_vl_vision
from pop.models.vision import siglip

TEXTS = [[(n * k) % 67 for n in range(40)] for k in range(1, 12)]
TOWERS = {"gemma3": tiny_gemma3_vl_config(), "qwen3_vl": tiny_qwen3_vl_config()}
calls = []


def no_attention(q, k, v, scale, window, last_attended=None):
    """Nothing is attended."""
    calls.append((scale, window, last_attended))
    return torch.zeros_like(q).flatten(2)


def own_value(q, k, v):
    """Each patch attends itself only."""
    return v.clone()


@pytest.mark.parametrize("config", [tiny_config(), tiny_gemma3_config()], ids=["llama", "gemma3"])
def test_the_plain_pass_calls_it(config):
    """Without attention, a model is one whose output projections are zero. Both copies keep the replacement."""
    module, silent = random_model(config), random_model(config)
    tokens, before = torch.arange(12).view(2, 6), module(torch.arange(12).view(2, 6))
    for layer in silent.layers:
        layer.self_attn.o_proj.weight.zero_()
    expected = silent(tokens)
    module.causal_attention = no_attention
    for copied in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        calls.clear()
        assert_close(copied(tokens), expected)
        assert calls == [(layer.scale, layer.window, None) for layer in module.layers]
    assert torch.equal(random_model(config)(tokens), before)  # no other model has changed


def test_all_that_runs_the_plain_pass_calls_it():
    """model.logits, calibration and the importance of layers."""
    model = pop.Model(random_model(tiny_config()), tiny_config(), compile=False)
    model.module.causal_attention = no_attention
    for run in (
        lambda: model.logits([[1, 2, 3]]),
        lambda: pop.calibrate(model, TEXTS, pop.PrunePlan((3, 4)), longest=40, progress=False, steps=0),
        lambda: pop.importance(model, [([1, 2, 3], [4, 5])], progress=False),
    ):
        calls.clear()
        run()
        assert len(calls) >= 4  # five layers, of which calibration does not run the last


@pytest.mark.parametrize("name", TOWERS)
def test_the_towers_call_it(name):
    module = random_model(TOWERS[name])
    blocks, inputs = module.get_submodule(module.vision_blocks), module.vision_block_inputs(2, 6)
    h = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(0))
    before = blocks[0](h, *inputs[1:])
    for part in module.modules():
        if isinstance(part, (siglip.Attention, qwen3_vl_vision.Attention)):
            part.attention = own_value
    changed = blocks[0](h, *inputs[1:])
    assert not torch.allclose(changed, before, atol=0.01)
    assert_close(blocks[0](h[:, :1], *(table[:1] for table in inputs[1:])), changed[:, :1])
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for copied in (copy.deepcopy(module), torch.load(saved, weights_only=False)):
        assert_close(copied.get_submodule(module.vision_blocks)[0](h, *inputs[1:]), changed)
