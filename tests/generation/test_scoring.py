"""`model.score` against the log-softmax of the naive reference."""

import pytest
import torch
from support.chat_models import PAIRS, PLANS, make
from support.harness import naive_logits
from support.letters import Letters
from support.tiny import tiny_config, tiny_model

import pop


def naive(model, context, continuation) -> float:
    """By the naive page: each pair runs all of its tokens."""
    log_probs = naive_logits(model, model.plan, context, continuation).double().log_softmax(-1)
    return log_probs.gather(1, torch.tensor(continuation)[:, None]).sum().item()


CONTEXTS = [[5, 9, 200, 31, 8], list(range(40, 61)), [17]]
CONTINUATIONS = [[77, 3, 150, 9], [4], [(7 * n) % 250 for n in range(14)]]


@pytest.mark.parametrize(("family", "plan"), PAIRS, ids=str)
def test_scores_are_the_references(family, plan, monkeypatch):
    """Of one pair, and of lists. A long continuation is scored in parts."""
    model = make(family, PLANS[plan])
    expected = torch.tensor([[naive(model, context, one) for one in CONTINUATIONS] for context in CONTEXTS])
    for at_once in (3, 256):
        monkeypatch.setattr("pop.generation.scoring.SCORED_AT_ONCE", at_once)
        assert model.score(CONTEXTS, CONTINUATIONS) == pytest.approx(expected.diag().tolist(), abs=1e-3)
    for context, scores in zip(CONTEXTS, expected.tolist(), strict=True):
        assert model.score(context, CONTINUATIONS) == pytest.approx(scores, abs=1e-3)
        assert model.score(context, CONTINUATIONS[0]) == pytest.approx(scores[0], abs=1e-4)


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config(vocab_size=256, max_positions=128), seed=5, plan=pop.PrunePlan((1, 3, 4)))


def test_a_tokenizer_larger_than_the_vocabulary(model):
    small = pop.Model(model.module, model.config, Letters({"<end>": 255}), plan=model.plan)
    small.tokenizer._encode_text = lambda text: [300]
    for call in (lambda: small.score("a", [5]), lambda: small.score([5], "a"), lambda: small.generate("a")):
        with pytest.raises(pop.InputError, match="token id 300"):
            call()


def test_scored_text_begins_once(model):
    beginning = pop.Model(model.module, model.config, Letters(bos_id=254), plan=model.plan)
    assert beginning.score("abc", "de") == model.score([254, *b"abc"], [*b"de"])


def test_a_context_runs_once_for_all_its_continuations(notes):
    model = make("llama", pop.PrunePlan((3, 4)))
    ran = notes(type(model.module), "embed", lambda self, tokens: tokens.numel())
    model.score(CONTEXTS[1], CONTINUATIONS)
    assert sum(ran) == len(CONTEXTS[1]) + 3 * 13


def test_padding_may_exceed_the_context_but_a_row_may_not(model):
    rows = [[3] * 127, [3]], [[1, 2], [4] * 128]
    expected = [model.score(*pair) for pair in zip(*rows, strict=True)]
    assert model.score(*rows) == pytest.approx(expected, abs=1e-3)
    with pytest.raises(pop.ContextOverflow, match="context plus continuation has 129 tokens.* 128"):
        model.score(rows[0], [[1, 2], [4] * 129])


def test_contexts_and_continuations_must_be_as_many(model):
    assert len(model.score([[1]], [[3]])) == 1
    for contexts, continuations in (([[1], [2]], [[3]]), ([[1], [2]], [3]), ([[1]], [3])):
        with pytest.raises(pop.InputError, match=rf"{len(contexts)} contexts, but 1 continuations"):
            model.score(contexts, continuations)


@pytest.mark.parametrize("where", ["prefill_prepared", "extend"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("continuations", [[1, 2, 3], [[1], [1, 2, 3]]], ids=["one", "several"])
def test_a_logit_that_is_not_finite_gives_no_score(model, where, value, continuations, monkeypatch):
    """After the context, or in the continuation."""
    call = getattr(model, where)
    monkeypatch.setattr(model, where, lambda *a, **b: call(*a, **b).index_fill(-1, torch.tensor([9]), value))
    with pytest.raises(pop.InputError, match="logits are not finite"):
        model.score([5, 9, 200], continuations)


def test_weights_that_are_not_finite_give_logits_and_no_answer(model):
    broken = tiny_model(model.config)
    broken.module.layers[2].mlp.up_proj.weight.data.fill_(float("inf"))
    for call in (lambda: broken.score([5, 9], [1, 2]), lambda: broken.generate([5, 9])):
        with pytest.raises(pop.InputError, match="logits are not finite"):
            call()
    assert broken.logits([[5, 9]]).isnan().all()
    assert broken.prefill([[5, 9]], broken.new_cache(1, 9)).isnan().all()


def test_labels_of_one_token_copy_no_cache(model, monkeypatch):
    """The score of a single token follows from the context's last logits."""
    expected = [model.score(CONTEXTS[0], [label]) for label in range(4)]
    monkeypatch.setattr(pop.KVCache, "copy_from", None)
    assert model.score(CONTEXTS[0], [[label] for label in range(4)]) == pytest.approx(expected, abs=1e-5)
