"""Sampling: which tokens are drawn, how often, and which settings are refused."""

import dataclasses
import math
import re
from fractions import Fraction
from typing import get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.goldens import REFUSED
from support.meta_device import META, device_only
from typing_extensions import Unpack

import pop
from pop.generation.conversation import Conversation
from pop.generation.prefix import Prefix
from pop.generation.sampling import DEFAULTS, Options, SamplingParams, pick, read_tokens, sample_tokens


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def shares(logits, count, **settings) -> torch.Tensor:
    """How often each of V tokens is picked from logits [V], for `count` random numbers that are evenly spaced."""
    numbers = (torch.arange(count) * 2 + 1) * 2**52 // count
    picked = pick(logits.expand(count, -1), SamplingParams(**settings), numbers[:, None])
    return torch.bincount(picked, minlength=len(logits))


def expected_probabilities(logits, temperature, top_k=None, top_p=1.0, min_p=0.0) -> torch.Tensor:
    """From the definitions, in float64. Of equally likely tokens, the one with the smaller id comes first."""
    probs = (logits.double() / temperature).softmax(-1)
    order = sorted(range(len(logits)), key=lambda token: (-logits[token].item(), token))
    kept, total = [], 0.0
    for token in order[:top_k]:
        if total < (top_p - 1e-7) * probs[order[:top_k]].sum():
            kept.append(token)
            total += probs[token].item()
    kept = [token for token in kept if probs[token] >= min_p * probs.max()]
    return torch.zeros_like(probs).index_copy(0, torch.tensor(kept), probs[kept] / probs[kept].sum())


@given(
    st.lists(st.sampled_from([-math.inf, -2.0, -1.0, 0.0, 0.5, 0.75, 3.0]), min_size=1, max_size=12),
    st.none() | st.integers(1, 14),
    st.none() | st.floats(0.05, 1.0),
    st.none() | st.floats(0.01, 1.0),
    st.floats(0.2, 3.0),
)
def test_every_token_has_its_share_of_the_random_numbers(values, top_k, top_p, min_p, temperature):
    """Also among ties and impossible tokens. A token of probability p gets p of the numbers, up to one at each end."""
    logits = torch.tensor([*values, 0.25])
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    found = shares(logits, 1000, **settings)
    expected = expected_probabilities(logits, temperature, top_k, top_p or 1.0, min_p or 0.0)
    assert (found - 1000 * expected).abs().max() <= 1.01
    assert not found[expected == 0].any()


def test_the_long_tail_of_a_large_vocabulary():
    """A quarter of the probability is in 2**17 unlikely tokens, each of which has its place."""
    logits = torch.zeros(1, 2**17 + 1)
    logits[0, 777] = math.log(3 * 2**17)
    numbers = torch.arange(1, 2**53, 2**53 // 40)
    found = pick(logits.expand(len(numbers), -1), SamplingParams(temperature=1.0), numbers[:, None])
    place = numbers.double() / 2**34  # in units of an unlikely token: 2**19 in all
    expected = torch.where(place < 777, place, torch.where(place < 777 + 3 * 2**17, 777, place - 3 * 2**17))
    assert (found - expected).abs().max() <= 2


@pytest.mark.parametrize("settings", [{}, {"top_k": 6}, {"top_p": 0.99}])
def test_the_first_and_the_last_random_number(settings):
    """They pick the first and the last token that can be drawn, not impossible ones beside them."""
    logits = torch.tensor([-math.inf, -math.inf, 1.0, -math.inf, 1.0, 1.0, 1.0, -math.inf, -math.inf])
    numbers = torch.tensor([0, 2**51 - 1, 2**51, 2**52 - 1, 2**52, 3 * 2**51 - 1, 3 * 2**51, 2**53 - 1])[:, None]
    picked = pick(logits.expand(8, -1), SamplingParams(temperature=1.0, **settings), numbers)
    assert picked.tolist() == [2, 2, 4, 4, 5, 5, 6, 6]


def test_extreme_settings():
    """A tiny temperature or top_p, min_p=1 and top_k=1 are greedy.

    At a huge temperature, possible tokens are equally likely.
    """
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    tiny = ({"top_p": 1e-9}, {"temperature": 5e-324}, {"temperature": Fraction(1, 10**40)})
    for settings in (*tiny, {"min_p": 1}, {"top_k": 1}, {"top_k": np.int64(1), "temperature": 1e-39}):
        params = SamplingParams(**{"temperature": 5.0, **settings})
        assert sample_tokens(logits, params, generators(0, 1, 2)).tolist() == logits.argmax(-1).tolist()
    logits = torch.tensor([-math.inf, -50.0, 0.0, 50.0])
    assert shares(logits, 999, temperature=1e9).tolist() == [0, 333, 333, 333]
    for top_p, kept in ((0.1, 1), (0.3, 3), (0.31, 4), (0.7, 7), (0.999, 10), (1.0, 10)):
        drawn = shares(torch.zeros(10), 1000, temperature=1.0, top_p=top_p) > 0
        assert drawn.nonzero().flatten().tolist() == list(range(kept))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"top_k": 2}, {"top_p": 0.5}])
def test_a_row_that_is_not_finite_gets_no_token_and_raises_when_read(broken, settings):
    logits = torch.tensor([[0.0, 1.0, -math.inf], [0.0, broken, 1.0], [-math.inf] * 3, [broken] * 3])
    tokens = sample_tokens(logits, SamplingParams(**{"temperature": 1.0, **settings}), generators(0, 1, 2, 3))
    assert tokens[0] in (0, 1)  # a token may be impossible
    assert tokens[1:].tolist() == [-1, -1, -1]
    with pytest.raises(pop.InputError, match="logits are not finite"):
        read_tokens(tokens)
    assert read_tokens(tokens[:1]) == tokens[:1].tolist()


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.5}, {"top_k": 5, "top_p": 0.5}, {"min_p": 0.1}]
)
def test_nothing_waits_for_the_device(settings):
    params = SamplingParams(**{"temperature": 1.0, **settings})
    logits, numbers = torch.zeros(2, 30, device=META), torch.zeros(2, 1, dtype=torch.int64, device=META)
    with device_only():
        assert pick(logits, params, numbers if params.temperature else None).shape == (2,)
    assert sample_tokens(logits, params, generators(0, 1)).device == META  # the numbers are copied there


def test_editors_and_type_checkers_know_the_options():
    fields = {field.name: field.type for field in dataclasses.fields(SamplingParams)}
    assert Options.__annotations__ == {**fields, "sampling": str | None}
    for owner, names in ((pop.Model, ("generate", "stream", "chat")), (Conversation, ("send", "stream"))):
        for name in names:
            assert get_type_hints(getattr(owner, name))["options"] == Unpack[Options]
    for name in ("generate", "stream"):
        assert get_type_hints(getattr(Prefix, name))["options"] == Unpack[Options]


def test_settings_out_of_range_are_refused_by_name():
    assert REFUSED["settings of sampling"].keys() == DEFAULTS.keys(), "each option has values that are refused"
    for name, values in REFUSED["settings of sampling"].items():
        for value in values:
            with pytest.raises(pop.InputError, match=rf"{name} is {re.escape(repr(value))};"):
                SamplingParams(**{name: value})
    assert [SamplingParams(repetition_penalty=value).repetition_penalty for value in (1e-6, 1e6)] == [1e-6, 1e6]
    assert [SamplingParams(stop=stop).stop for stop in (None, [], "x", ("x", "y"))] == [(), (), ("x",), ("x", "y")]
