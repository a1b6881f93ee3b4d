"""Rules before a token is picked: repetition_penalty and the caller's function.

The reference is a loop over the plain forward pass, one row at a time.
"""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from support.chat_models import END, make
from support.letters import Letters
from support.meta_device import META, device_only
from support.tiny import tiny_config, tiny_model

import pop
from pop.generation.answers import Answer
from pop.generation.logits import LogitsRules
from pop.generation.sampling import SamplingParams

PROMPTS = [[5, 9, 200], [17], list(range(40, 70))]
ENDS = (3, 77, 150)


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config(vocab_size=256, max_positions=128, eos_ids=ENDS), seed=5, plan=None)


def penalised(logits: torch.Tensor, tokens, penalty: float) -> torch.Tensor:
    for token in {*tokens}:
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    return logits


def naive(model, prompt, count, change=lambda tokens, answer, logits: logits, ends=ENDS) -> list[int]:
    """The greedy answer. `change` gets all tokens, those of the answer, and the logits [V]."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        logits = model.logits([tokens])[0, -1].clone()
        token = int(change(tokens, tokens[len(prompt) :], logits).argmax())
        if token in ends:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def test_repetition_penalty_is_the_papers_and_sees_all_earlier_tokens(model):
    """Keskar et al. 2019, as in transformers: positive logits are divided by it, and negative ones multiplied.

    Earlier tokens are those of the prompt, a prefix, and earlier turns.
    """
    free = [answer.tokens for answer in model.generate(PROMPTS, max_new_tokens=6)]
    for penalty in (0.7, 1.4):
        expected = [naive(model, p, 6, lambda tokens, _, x, by=penalty: penalised(x, tokens, by)) for p in PROMPTS]
        options = {"max_new_tokens": 6, "repetition_penalty": penalty}
        assert [answer.tokens for answer in model.generate(PROMPTS, **options)] == expected != free
        prefix = model.prefix(PROMPTS[2][:20])
        assert prefix.generate(PROMPTS[2][20:], **options).tokens == expected[2]
    model = make("llama", pop.PrunePlan.none())
    chat = model.start_chat()
    for message in ("Hi", "And?"):
        answer = chat.send(message, max_new_tokens=6, repetition_penalty=1.5)
        prompt = chat.tokens[: answer.prompt_tokens]
        assert answer.tokens == naive(model, prompt, 6, lambda tokens, _, x: penalised(x, tokens, 1.5), ends=(END, 255))


def test_the_callers_function_decides_row_by_row(model):
    """It gets the tokens of the answer and the model's logits, and may change these in place."""
    seen = []

    def only_even(tokens, logits):
        seen.append((tokens, logits.clone()))
        logits[1::2] = -math.inf
        logits[len(tokens)] = -50.0
        return logits

    def change(_, answer, logits):
        logits[1::2] = -math.inf
        logits[len(answer)] = -50.0
        return logits

    answers = model.generate(PROMPTS, max_new_tokens=9, logits_processor=lambda *both: only_even(*both).double())
    expected = [naive(model, prompt, 9, change) for prompt in PROMPTS]
    assert [answer.tokens for answer in answers] == expected
    assert not any(token % 2 for answer in answers for token in answer.tokens)
    for tokens, logits in seen:
        row = next(n for n, answer in enumerate(expected) if answer[: len(tokens)] == tokens and (tokens or n == 0))
        if tokens:
            torch.testing.assert_close(logits, model.logits([PROMPTS[row] + tokens])[0, -1], atol=1e-4, rtol=1e-4)
    assert {len(tokens) for tokens, _ in seen} == set(range(9)) and len(seen) == sum(map(len, expected))


def test_the_order_of_the_rules(model):
    """First the penalty, then the function; what it cannot bring back are ids without text.

    The tokenizer has fewer ids than the embeddings, which are padded, and gaps, one of them beyond the embeddings.
    """
    tokenizer = Letters()
    tokenizer.vocab_size, tokenizer.unused_ids = 200, [4, 900]
    padded = pop.Model(model.module, model.config, tokenizer, plan=None)
    found = []

    def favour(tokens, logits):
        found.append(logits.clone())
        favourites = torch.tensor([4, 210, ENDS[0] if len(tokens) == 2 else 8])
        return torch.full_like(logits, -5.0).index_put((favourites,), torch.tensor([9.0, 8, 7]))

    options = {"max_new_tokens": 3, "repetition_penalty": 1.3}
    answer = padded.generate(PROMPTS[0], logits_processor=favour, **options)
    assert (answer.tokens, answer.finish_reason) == ([8, 8], "stop")
    expected = penalised(model.logits([PROMPTS[0]])[0, -1].clone(), PROMPTS[0], 1.3)
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)


def broken_at(number, value):
    return lambda tokens, logits: logits.index_fill(0, torch.tensor([number]), value)


def test_what_the_function_may_not_return(model):
    not_finite = "returned logits whose largest is not finite"
    for function, words in (
        (lambda tokens, logits: None, "returned NoneType; .*shape \\[256\\]"),
        (lambda tokens, logits: logits[:-1], "returned torch.float32 \\[255\\]"),
        (lambda tokens, logits: logits.argsort(), "returned torch.int64 \\[256\\]"),
        (lambda tokens, logits: torch.full_like(logits, -math.inf), not_finite),
        (broken_at(9, math.nan), not_finite),
    ):
        with pytest.raises(pop.InputError, match=f"logits_processor {words}"):
            model.generate(PROMPTS, max_new_tokens=2, logits_processor=function)


def test_a_model_that_overflows_is_not_blamed_on_the_function(model, monkeypatch):
    prefill = model.prefill_prepared
    monkeypatch.setattr(model, "prefill_prepared", lambda *a, **b: prefill(*a, **b) * math.nan)
    with pytest.raises(pop.InputError, match="the logits are not finite"):
        model.generate(PROMPTS, logits_processor=lambda tokens, logits: torch.zeros_like(logits))


def test_a_row_does_not_depend_on_the_others(model):
    """With every rule, and rows that end and leave the batch."""

    def sparse(tokens, logits):
        return logits.index_fill(0, torch.arange(len(tokens) % 5, 256, 5), -math.inf)

    ends = tuple(range(0, 256, 9))
    model = pop.Model(model.module, dataclasses.replace(model.config, eos_ids=ends), plan=pop.PrunePlan((1, 3)))
    prompts = [[token, 2 * token, 3][: 1 + token % 3] for token in range(1, 9)]
    options = {"max_new_tokens": 8, "temperature": 0.6, "min_p": 0.02, "top_p": 0.97, "seed": 5}
    options |= {"repetition_penalty": 1.3, "logits_processor": sparse}
    answers = model.generate(prompts, logprobs=True, **options)
    assert len({len(answer.tokens) for answer in answers}) > 2
    alone = [model.generate(prompt, logprobs=True, **options) for prompt in prompts]
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in alone]
    for answer, other in zip(answers, alone, strict=True):
        assert answer.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_rules_do_not_wait_for_the_device(model):
    """All but the caller's function."""
    params = SamplingParams(repetition_penalty=1.2)
    there = SimpleNamespace(config=model.config, tokenizer=None, vision=model.vision, device=META)
    rules, answers = LogitsRules(there, params, PROMPTS), [Answer(None, frozenset(), (), 9, 0)] * 3
    logits = torch.zeros(3, 256, device=META)
    rules(logits, answers)  # the prompts' tokens are copied there once
    with device_only():
        for _ in range(3):
            assert rules(logits, answers).shape == (3, 256)
            rules.took(torch.zeros(3, dtype=torch.int64, device=META))


def test_log_probabilities_are_the_models_own(model):
    """Whatever temperature, penalties and functions do. Their sum is the score of the answer."""
    in_place = {"logits_processor": lambda tokens, logits: logits.mul_(0.5)}
    penalised = {"repetition_penalty": 1.5, "temperature": 1.0}
    for more, plan in (({}, None), ({"temperature": 2.0, "top_k": 9}, 0.5), (penalised, None), (in_place, 0.5)):
        answers = model.generate(PROMPTS, max_new_tokens=6, plan=plan, logprobs=True, seed=3, **more)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            assert len(answer.logprobs) == len(answer.tokens) > 0
            assert sum(answer.logprobs) == pytest.approx(model.score(prompt, answer.tokens, plan=plan), abs=1e-3)
    first = model.generate(PROMPTS[0], max_new_tokens=1, logprobs=True)
    expected = model.logits([PROMPTS[0]])[0, -1].log_softmax(-1)[first.tokens[0]]
    assert first.logprobs == [pytest.approx(expected.item(), abs=1e-5)]
    assert model.generate(PROMPTS[0], max_new_tokens=1).logprobs is None
