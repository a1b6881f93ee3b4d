"""Sampling: which tokens are drawn, how often, and which settings are refused."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pop
from pop.generation.sampling import Sampler, SamplingParams


def make(rows, **settings):
    return Sampler(rows, SamplingParams(**settings))


@given(st.integers(0, 2**32), st.integers(1, 12), st.floats(0.05, 1.0), st.floats(0.2, 3.0))
def test_samples_come_from_the_kept_tokens_only(seed, top_k, top_p, temperature):
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(seed)) * 3
    probs = (logits[0].double() / temperature).softmax(-1)
    order = probs.argsort(descending=True).tolist()
    kept = order[:top_k]
    renormalised, total = probs[kept] / probs[kept].sum(), 0.0
    nucleus = set()
    for token, p in zip(kept, renormalised.tolist(), strict=True):
        if total < top_p + 1e-6:
            nucleus.add(token)
        total += p
    sampler = make(1, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    assert {sampler(logits).item() for _ in range(20)} <= nucleus


def test_sampling_frequencies_are_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    sampler = make(1, temperature=0.7, seed=0)
    counts = torch.bincount(torch.cat([sampler(logits) for _ in range(4000)]), minlength=4)
    expected = (logits[0] / 0.7).softmax(-1)
    assert (counts / 4000 - expected).abs().max() < 4 * math.sqrt(0.25 / 4000)


def test_top_k_one_and_a_tiny_top_p_are_greedy():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    tiny = ({"top_p": 1e-9}, {"top_p": 5e-324}, {"temperature": 5e-324}, {"temperature": Fraction(1, 10**40)})
    for settings in (*tiny, {"top_k": 1}, {"top_k": np.int64(1), "temperature": 1e-39}):
        assert make(3, **{"temperature": 5.0, "seed": 0, **settings})(logits).tolist() == logits.argmax(-1).tolist()


def test_top_k_keeps_k_tokens_of_those_that_tie():
    logits = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert len({make(1, temperature=1.0, top_k=1, seed=seed)(logits).item() for seed in range(20)}) == 1


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_is_picked_from_logits_that_are_not_finite(broken, temperature):
    logits = torch.tensor([[0.0, 1.0, -math.inf], [0.0, broken, 1.0]])
    sampler = make(2, temperature=temperature, seed=0)
    assert sampler(logits[[0, 0]]).max() < 2  # a token may be impossible
    with pytest.raises(pop.InputError, match="logits"):
        sampler(logits)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", True),
        ("temperature", -1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", None),
        ("temperature", True),
        ("top_k", 0),
        ("top_k", 1.5),
        ("top_p", 0),
        ("top_p", 1.1),
        ("seed", -1),
        ("seed", 0.5),
        ("seed", 2**63),
        ("stop", ""),
        ("stop", ["x", ""]),
        ("stop", [3]),
        ("stop", 5),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(pop.InputError, match=rf"{name} is {re.escape(repr(value))};"):
        SamplingParams(**{name: value})


def test_stop_strings_come_alone_or_in_a_list():
    assert [SamplingParams(stop=stop).stop for stop in (None, [], "x", ("x", "y"))] == [(), (), ("x",), ("x", "y")]
