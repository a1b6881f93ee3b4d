"""Fingerprints: equal for one model in every dtype, and different after any change of its weights or sizes."""

import pytest
import torch
from support.tiny import random_model, tiny_config

from pop.checkpoints.fingerprint import fingerprint


def test_another_dtype_is_the_same_model():
    module = random_model(tiny_config()).to(torch.bfloat16)
    prints = {fingerprint(module.to(dtype)) for dtype in (torch.bfloat16, torch.float32, torch.float16)}
    prints.add(fingerprint(random_model(tiny_config())))
    assert len(prints) == 1


@pytest.mark.parametrize("name", ["model.layers.4.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_single_changed_weight_is_another_model(name):
    module = random_model(tiny_config())
    before = fingerprint(module)
    module.get_parameter(name).view(-1)[-1] += 0.1
    assert fingerprint(module) != before


def test_the_fingerprint_sees_order_names_and_config():
    first = random_model(tiny_config())
    before = fingerprint(first)
    down = first.layers[1].mlp.down_proj.weight
    down.data = down.data.flip(0)
    assert fingerprint(first) != before
    second = random_model(tiny_config())
    a, b = second.layers[0].mlp.up_proj, second.layers[0].mlp.gate_proj
    a.weight.data, b.weight.data = b.weight.data, a.weight.data
    assert fingerprint(second) != before
    assert fingerprint(random_model(tiny_config(norm_eps=1e-6))) != before
    assert fingerprint(random_model(tiny_config(max_positions=99, dtype=torch.bfloat16))) == before


def test_the_fingerprint_of_large_parameters_looks_at_all_parts_of_them(monkeypatch):
    monkeypatch.setattr("pop.checkpoints.fingerprint.SAMPLES", 100)
    module = random_model(tiny_config())
    before = fingerprint(module)
    for row in (0, 20, 40, 64):
        module.model.embed_tokens.weight.data[row : row + 3] *= -1  # 90 of 2,010 values, of which one in 21 is read
        after = fingerprint(module)
        assert after != before
        before = after
