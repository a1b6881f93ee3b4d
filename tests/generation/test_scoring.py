"""`model.score` and `prefix.score` against the log-softmax of the naive reference."""

import pytest
import torch
from support.chat_models import CONFIGS, PLANS, make
from support.letters import Letters
from support.tiny import random_model, tiny_config

import pop
from pop.pruning import reference


def naive(model, context, continuation) -> float:
    """By the naive page: each pair runs all of its tokens."""
    tokens = torch.tensor(context + continuation)
    full_depth = reference.full_depth_tokens(len(context), len(tokens), model.plan)
    logits, _ = reference.forward(model.module, tokens, full_depth, model.plan)
    picked = logits[len(context) - 1 : -1].double().log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])
    return picked.sum().item()


CONTEXTS = [[5, 9, 200, 31, 8], list(range(40, 61)), [17]]
CONTINUATIONS = [[77, 3, 150, 9], [4], [(7 * n) % 250 for n in range(30)]]


@pytest.mark.parametrize("at_once", [3, 256])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", CONFIGS)
def test_scores_are_the_references(family, plan, at_once, monkeypatch):
    """Of one pair, of lists, and after a prefix. A long continuation is scored in parts."""
    monkeypatch.setattr("pop.generation.scoring.SCORED_AT_ONCE", at_once)
    model = make(family, PLANS[plan])
    expected = [naive(model, *pair) for pair in zip(CONTEXTS, CONTINUATIONS, strict=True)]
    assert model.score(CONTEXTS, CONTINUATIONS) == pytest.approx(expected, abs=1e-3)
    for context in CONTEXTS:
        expected = [naive(model, context, continuation) for continuation in CONTINUATIONS]
        assert model.score(context, CONTINUATIONS) == pytest.approx(expected, abs=1e-3)
        assert model.score(context, CONTINUATIONS[0]) == pytest.approx(expected[0], abs=1e-4)
        prefix = model.prefix(context)
        assert prefix.score(CONTINUATIONS) == pytest.approx(expected, abs=1e-3)
        assert prefix.score(CONTINUATIONS[0]) == pytest.approx(expected[0], abs=1e-3)


@pytest.fixture(scope="module")
def model():
    config = tiny_config(vocab_size=256, max_positions=128)
    return pop.Model(random_model(config, seed=5), config, plan=pop.PrunePlan((1, 3, 4)))


def test_a_tokenizer_larger_than_the_vocabulary(model):
    small = pop.Model(model.module, model.config, Letters({"<end>": 255}), plan=model.plan)
    small.tokenizer._encode_text = lambda text: [300]
    for call in (lambda: small.score("a", [5]), lambda: small.score([5], "a"), lambda: small.generate("a")):
        with pytest.raises(pop.InputError, match=r"token 300, but the model has 256"):
            call()


def test_scored_text_begins_once(model):
    """Context with the token that begins a text, continuation without."""
    beginning = pop.Model(model.module, model.config, Letters(bos_id=254), plan=model.plan)
    assert beginning.score("abc", "de") == model.score([254, *b"abc"], [*b"de"])


def test_a_context_runs_once_for_all_its_continuations(monkeypatch):
    model, ran = make("llama", pop.PrunePlan((3, 4))), []
    embed = type(model.module).embed
    monkeypatch.setattr(type(model.module), "embed", lambda self, x: ran.append(x.numel()) or embed(self, x))
    model.score(CONTEXTS[1], CONTINUATIONS)
    assert sum(ran) == len(CONTEXTS[1]) + 3 * 29


def test_padding_may_exceed_the_context_but_a_row_may_not(model):
    rows = [[3] * 127, [3]], [[1, 2], [4] * 128]
    expected = [model.score(*pair) for pair in zip(*rows, strict=True)]
    assert model.score(*rows) == pytest.approx(expected, abs=1e-3)
    with pytest.raises(pop.ContextOverflow, match="context plus continuation has 129 tokens.* 128"):
        model.score(rows[0], [[1, 2], [4] * 129])


def test_contexts_and_continuations_must_be_as_many(model):
    for contexts, continuations in (([[1], [2]], [[3]]), ([[1], [2]], [3]), ([[1]], [3])):
        with pytest.raises(pop.InputError, match=rf"{len(contexts)} contexts, but 1 continuations"):
            model.score(contexts, continuations)
    assert len(model.score([[1]], [[3]])) == 1


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["prefill_checked", "extend"])
def test_logits_that_are_not_finite_are_no_score(model, where, broken, monkeypatch):
    """In the context's last token, and in the continuation."""
    call = getattr(model, where)
    monkeypatch.setattr(model, where, lambda *a, **b: call(*a, **b).index_fill(-1, torch.tensor([9]), broken))
    for continuations in ([1, 2, 3], [[1], [1, 2, 3]]):
        with pytest.raises(pop.InputError, match="logits are not finite"):
            model.score([5, 9, 200], continuations)


def test_a_broken_model_has_no_score_and_no_answer_but_logits():
    config = tiny_config(vocab_size=256)
    model = pop.Model(random_model(config, seed=5), config)
    model.module.layers[2].mlp.up_proj.weight.data.fill_(float("inf"))
    for call in (lambda: model.score([5, 9], [1, 2]), lambda: model.generate([5, 9])):
        with pytest.raises(pop.InputError, match="logits are not finite"):
            call()
    assert model.logits([[5, 9]]).isnan().all()
    assert model.prefill([[5, 9]], model.new_cache(1, 9)).isnan().all()
