"""A backend may replace the attention of the plain pass, wherever that runs. See also backends/test_cpu.py."""

import torch
from support.tiny import random_model, tiny_config

import pop

TEXTS = [[(n * k) % 67 for n in range(40)] for k in range(1, 12)]
calls = []


def no_attention(q, k, v, scale, window, last_attended=None):
    """Nothing is attended."""
    calls.append((scale, window, last_attended))
    return torch.zeros_like(q).flatten(2)


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
