"""`model.score` against the log-softmax of the plain forward pass and of the naive reference."""

import pytest
import torch
from support.letters import Letters
from support.tiny import random_model, tiny_config

import pop
from pop.pruning import reference


@pytest.fixture(scope="module")
def model():
    config = tiny_config(vocab_size=256, max_positions=128)
    return pop.Model(random_model(config, seed=5), config, plan=pop.PrunePlan((1, 3, 4)))


def test_score_is_the_summed_log_softmax_at_full_depth(model):
    context, continuation = [5, 9, 200, 31, 8], [77, 3, 150, 9]
    logits = model.logits([context + continuation])[0].double().log_softmax(-1)
    expected = sum(logits[len(context) - 1 + i, token].item() for i, token in enumerate(continuation))
    assert model.score(context, continuation, plan=pop.PrunePlan.none()) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("length", [1, 2, 6])
def test_score_prunes_the_context_only(model, length):
    context, continuation = [5, 9, 200, 31, 8], [77, 3, 150, 9, 4, 5][:length]
    tokens = torch.tensor(context + continuation)
    full_depth = reference.full_depth_tokens(len(context), len(tokens), model.plan)
    logits, _ = reference.forward(model.module, tokens, full_depth, model.plan)
    logprobs = logits.double().log_softmax(-1)
    expected = sum(logprobs[len(context) - 1 + i, token].item() for i, token in enumerate(continuation))
    assert model.score(context, continuation) == pytest.approx(expected, abs=1e-4)
    assert model.score(context, continuation) != pytest.approx(
        model.score(context, continuation, plan=pop.PrunePlan.none()), abs=1e-4
    )


def test_a_tokenizer_larger_than_the_vocabulary(model):
    small = pop.Model(model.module, model.config, Letters({"<end>": 255}), plan=model.plan)
    small.tokenizer._encode_text = lambda text: [300]
    for call in (lambda: small.score("a", [5]), lambda: small.score([5], "a"), lambda: small.generate("a")):
        with pytest.raises(pop.InputError, match=r"token 300, but the model has 256"):
            call()


def test_long_continuations_are_scored_in_parts(model, monkeypatch):
    expected = model.score([5, 9, 200], list(range(40)))
    monkeypatch.setattr("pop.model.SCORED_AT_ONCE", 7)
    assert model.score([5, 9, 200], list(range(40))) == pytest.approx(expected, abs=1e-4)


def test_scored_text_begins_once(model):
    """Context with the token that begins a text, continuation without."""
    beginning = pop.Model(model.module, model.config, Letters(bos_id=254), plan=model.plan)
    assert beginning.score("abc", "de") == model.score([254, *b"abc"], [*b"de"])
