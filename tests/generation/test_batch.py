"""Batches of prompts: greedy and sampled answers, where they end, and what each row is given."""

import numpy as np
import pytest
import torch
from support.letters import Letters
from support.tiny import tiny_config, tiny_model

import pop
from pop import engine
from pop.generation.batch import Batch
from pop.generation.sampling import SamplingParams
from pop.pruning import reference

PROMPTS = [[5, 9, 200], [17], list(range(40, 70))]


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config(vocab_size=256, max_positions=128), seed=5, plan=pop.PrunePlan((1, 3, 4)))


def test_greedy_generation_is_the_reference(model):
    """Of each prompt by itself, and of a batch, by the model's plan and by the call's."""
    for plan in (None, pop.PrunePlan.none()):
        expected = [reference.generate(model.module, torch.tensor(p), plan or model.plan, 6) for p in PROMPTS]
        alone = [model.generate(prompt, max_new_tokens=6, plan=plan) for prompt in PROMPTS]
        for answers in (alone, model.generate(PROMPTS, max_new_tokens=6, plan=plan)):
            assert [answer.tokens for answer in answers] == expected
            assert [answer.prompt_tokens for answer in answers] == [3, 1, 30]
            assert [answer.pruned_tokens for answer in answers] == ([0, 0, 0] if plan else [2, 0, 29])
            assert {(answer.text, answer.finish_reason) for answer in answers} == {("", "length")}


def test_prompts_come_as_lists_tensors_and_batches_of_either(model):
    expected = model.generate([5, 9, 200], max_new_tokens=4).tokens
    arrays = [np.array([5, 9, 200], dtype) for dtype in (np.uint8, np.uint16, np.int64)]
    for prompt in (torch.tensor([5, 9, 200]), (5, 9, 200), torch.tensor([5, 9, 200], dtype=torch.int32), *arrays):
        assert model.generate(prompt, max_new_tokens=4).tokens == expected
    for batch in ([[5, 9, 200]], torch.tensor([[5, 9, 200]]), [torch.tensor([5, 9, 200])]):
        assert [answer.tokens for answer in model.generate(batch, max_new_tokens=4)] == [expected]


@pytest.mark.parametrize(("seeds", "is_same"), [((11, 11), True), ((11, 12), False), ((None, None), False)])
def test_a_seed_gives_the_same_tokens_in_every_call(model, seeds, is_same):
    """test_logits.py has a seed alone and in batches."""
    first, second = (model.generate([5], max_new_tokens=8, temperature=1.3, seed=seed).tokens for seed in seeds)
    assert (first == second) is is_same


def test_each_row_draws_from_its_own_generator(monkeypatch):
    """Also when others have ended. Without a seed, each row gets a random one."""
    model = tiny_model(tiny_config(vocab_size=256, max_positions=128, eos_ids=tuple(range(0, 256, 8))), seed=5)
    options = {"max_new_tokens": 24, "temperature": 3.0}
    expected = [model.generate(prompt, seed=seed, **options).tokens for seed, prompt in enumerate(PROMPTS)]
    assert len({len(tokens) for tokens in expected}) == 3
    seeds = iter(range(3))
    monkeypatch.setattr("pop.generation.sampling.secrets.randbits", lambda bits: next(seeds))
    assert [answer.tokens for answer in model.generate(PROMPTS, **options)] == expected


def test_an_end_token_ends_the_answer_and_is_not_part_of_it(model):
    """The checkpoint's, and the one that ends a turn in the chat format."""
    free = model.generate(PROMPTS[2], max_new_tokens=9).tokens
    end = free[4]
    config = tiny_config(vocab_size=256, max_positions=128, eos_ids=(end,))
    ending = pop.Model(model.module, config, plan=model.plan)
    batch = ending.generate(PROMPTS, max_new_tokens=9)
    assert (batch[2].tokens, batch[2].finish_reason) == (free[: free.index(end)], "stop")
    for answer, prompt in zip(batch, PROMPTS, strict=True):
        assert answer.tokens == ending.generate(prompt, max_new_tokens=9).tokens
    tokenizer = Letters({"<|im_start|>": 255, "<|im_end|>": end})
    answer = pop.Model(model.module, model.config, tokenizer, plan=model.plan).generate(PROMPTS[2], max_new_tokens=9)
    assert (answer.tokens, answer.finish_reason) == (free[: free.index(end)], "stop")


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}])
def test_logits_that_are_not_finite_end_a_batch(model, options, monkeypatch):
    """In one row, at the third token. The rows' tokens so far have come out."""
    calls, decode = [], engine.decode

    def broken(module, tokens, cache, stages):
        logits = decode(module, tokens, cache, stages)
        calls.append(tokens)
        return logits.index_fill(0, torch.tensor([1]), np.inf) if len(calls) == 2 else logits

    monkeypatch.setattr(engine, "decode", broken)
    steps = Batch(model, PROMPTS, [[]] * 3, SamplingParams(max_new_tokens=9, **options), model.plan, 0.0).steps()
    assert len([next(steps), next(steps)]) == 2
    with pytest.raises(pop.InputError, match="logits are not finite"):
        next(steps)


def test_times_belong_to_the_tokens_of_the_row(model, monkeypatch):
    config = tiny_config(vocab_size=256, eos_ids=(model.generate(PROMPTS[0], max_new_tokens=3).tokens[2],))
    ending = pop.Model(model.module, config, plan=model.plan)
    clock = iter([100.0, 101.0, 102.0, 104.0, 108.0])  # the call, then each token of the batch
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    first, second = ending.generate(PROMPTS[:2], max_new_tokens=4)
    assert (len(first.tokens), first.ttft_s, first.decode_s) == (2, 1.0, 1.0)
    assert (len(second.tokens), second.ttft_s, second.decode_s) == (4, 1.0, 7.0)


def test_a_full_context_ends_an_answer_and_only_its_own(model):
    short = pop.Model(model.module, model.config, plan=model.plan, max_seq_len=32)
    batch = short.generate(PROMPTS, max_new_tokens=9)  # the last prompt has 30 tokens
    assert [len(answer.tokens) for answer in batch] == [9, 9, 3]
    assert [answer.finish_reason for answer in batch] == ["length"] * 3
    for answer, prompt in zip(batch, PROMPTS, strict=True):
        assert answer.tokens == model.generate(prompt, max_new_tokens=9).tokens[: len(answer.tokens)]
    assert len(short.generate([3] * 32).tokens) == 1
