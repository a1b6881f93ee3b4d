"""Virtual gates: gradients against finite differences, memory, and sampled responses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import FAMILIES, models
from support.gated_loss import assert_close, in_float64, slopes
from support.tiny import tiny_config, tiny_model

import pop
from pop.calibration.importance import Sample, gate_gradients, sample_responses


def gradients(model, samples):
    """Of samples (prompt, response) without images."""
    return gate_gradients(model, [Sample(prompt, response, [], (0, 0)) for prompt, response in samples])


def sampled(model, prompts, seeds, count):
    """Responses to prompts without images."""
    samples = [Sample(prompt, None, [], seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    return sample_responses(model, samples, count)


TOKENS = st.lists(st.integers(0, 59), min_size=1, max_size=6)  # below the ids of images


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=settings().max_examples // 2)
@given(data=st.data(), pairs=st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=3))
def test_gradients_are_the_slopes_of_the_gated_loss(family, data, pairs):
    """Of each pair by itself, though they run as a batch. In float64, since tiny heads magnify rounding.

    tests/inputs/test_images_everywhere.py has float32 and images.
    """
    module = data.draw(models([family]))
    model = pop.Model(module, module.config, compile=False)
    module.double()
    expected = torch.stack([slopes(model, *pair) for pair in pairs])
    with in_float64():
        assert_close(gradients(model, pairs), expected, 1e-5)


def test_activations_inside_a_layer_are_not_kept(model, samples, monkeypatch):
    """Computing them again changes no gradient."""

    def kept():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            found = gradients(model, samples)
        return found, sum(sizes)

    between = 5 * 12 * 30  # rows, tokens a row, width: what one layer hands to the next
    expected, size = kept()
    assert size < (5 + 1) * between
    for file in ("importance", "passes"):
        monkeypatch.setattr(f"pop.calibration.{file}.checkpointed", lambda function, *args: function(*args))
    found, size = kept()
    assert size > 5 * (5 + 1) * between
    assert torch.equal(found, expected)


def test_logits_are_computed_for_the_responses_only_and_one_after_the_other(samples, monkeypatch):
    model = tiny_model(tiny_config())
    rows, head = [], model.module.head
    monkeypatch.setattr(model.module, "head", lambda h: rows.append(h.shape[0]) or head(h))
    gradients(model, samples)
    lengths = [len(response) for _, response in samples]
    assert rows == lengths + lengths[::-1]  # forward, and again for the backward


@pytest.mark.parametrize(("plan", "is_same"), [("none", True), ("default", False)])
def test_responses_are_those_of_generate_at_full_depth_and_temperature_one(model, prompts, plan, is_same):
    """With the same random numbers. tests/generation holds `generate` to the reference."""
    seeds = [(1, number) for number in range(len(prompts))]
    generated = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        options = {"temperature": 1.0, "seed": int(np.random.SeedSequence(seed).generate_state(1)[0])}
        generated.append(model.generate(prompt, plan=plan, max_new_tokens=20, **options).tokens)
    assert (sampled(model, prompts, seeds, 20) == generated) is is_same


def test_an_end_token_ends_a_response_and_is_part_of_it():
    model = tiny_model(tiny_config(eos_ids=tuple(range(0, 67, 4))))
    responses = sampled(model, [[5, 6]] * 40, [(0, n) for n in range(40)], 12)
    assert len({len(response) for response in responses}) > 3
    for response in responses:
        assert all(token % 4 for token in response[:-1])
        assert response[-1] % 4 == 0 or len(response) == 12
