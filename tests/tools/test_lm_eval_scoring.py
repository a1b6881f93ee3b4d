"""Log-likelihoods for lm-evaluation-harness are those of the naive page of the method (pop/pruning/reference.py)."""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.harness import close, ids, instances, naive
from support.tiny import tiny_gemma3_config, tiny_model

import pop
from pop.errors import InputError
from pop.inputs.tokenizers import load_tokenizer
from pop.pruning import reference
from tools.evaluate import scoring

SMOLLM2 = Path(__file__).parents[1] / "goldens" / "tokenizers" / "smollm2"


# ---- loglikelihood ----

CONTEXTS = ["Once upon a time", "The", "Question: 2 + 2?\nAnswer:"]
CHOICES = [" a", " four", ", there was a queen", " 5"]


@pytest.mark.parametrize(("batch_size", "rows"), [(1, [1, 1, 1]), (2, [2, 1]), (8, [3])])
def test_log_likelihoods_are_the_references_in_the_order_of_the_requests(make, notes, batch_size, rows):
    """A context is prefilled once for all its choices."""
    adapter = make(batch_size)
    pairs = [(context, choice) for context in CONTEXTS for choice in CHOICES]
    random.Random(0).shuffle(pairs)
    expected = [naive(adapter, ids(context), ids(choice)) for context, choice in pairs]
    calls = notes(adapter.model, "prefill_prepared", lambda tokens, *_, **_more: len(tokens))
    results = adapter.loglikelihood(instances(*pairs))
    assert close(results, expected)
    assert calls == rows
    full = make(batch_size, plan=pop.PrunePlan.none()).loglikelihood(instances(*pairs))
    assert not close(results, full)  # the plan is used


@pytest.mark.parametrize("at_once", [7, 512])
def test_the_greedy_flag_and_long_continuations(make, monkeypatch, at_once):
    """Greedy continuations, the same with another last token, and with another first one; in pieces of any size."""
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", at_once)
    adapter = make()
    module, plan = adapter.model.module, adapter.model.plan
    contexts = [[40, 50, 60, 70], [90, 91], [7]]
    continuations, flags = [], [[True, False, True, False], [True, True, False], [False, True]]
    for context, kinds in zip(contexts, ("gege", "sgf", "fs"), strict=True):  # rows of different lengths meet
        greedy = reference.generate(module, torch.tensor(context), plan, 12)
        other = {"e": [*greedy[:-1], (greedy[-1] + 1) % 259], "f": [(greedy[0] + 1) % 259, *greedy[1:]]}
        continuations.append([{**other, "g": greedy, "s": greedy[:1]}[kind] for kind in kinds])
    scored = scoring.score(adapter.model, contexts, continuations)
    for scores, context, group, expected in zip(scored, contexts, continuations, flags, strict=True):
        assert close(scores, [naive(adapter, context, continuation) for continuation in group])
        assert [greedy for _, greedy in scores] == expected


def test_a_long_continuation_leaves_the_context_to_the_next_one():
    """Layers with windows hold no more than a window and a chunk: after that, the context is prefilled again."""
    model = tiny_model(tiny_gemma3_config(), plan=0.5, chunk_size=8)
    contexts = [[9, 8, 7, 6, 5, 4], list(range(20, 32))]
    continuations = [[[11, 12], [13], [14, 15]], [list(range(40, 60)), [12, 13, 14]]]
    scored = scoring.score(model, contexts, continuations)
    for scores, context, group in zip(scored, contexts, continuations, strict=True):
        expected = [model.score(context, continuation) for continuation in group]
        assert [total for total, _ in scores] == pytest.approx(expected, abs=1e-3)


def test_without_a_context_the_prefix_token_takes_its_place(make, loaded):
    adapter = make(batch_size=2)
    expected = [naive(adapter, [1], ids(choice)) for choice in CHOICES]
    assert close(adapter.loglikelihood(instances(*[("", choice) for choice in CHOICES])), expected)
    assert adapter.encode("") == [1]
    loaded.tokenizer.bos_id = 2  # a family whose texts begin with BOS
    try:
        assert adapter.encode_pair("", " a") == ([2], ids(" a"))
        assert adapter.encode_pair("x", " a") == ([2, *ids("x")], ids(" a"))
    finally:
        loaded.tokenizer.bos_id = None
    adapter.model.config = SimpleNamespace(bos_id=None, eos_ids=())
    with pytest.raises(InputError, match="BOS or EOS"):
        adapter.encode_pair("", "x")


def test_context_and_continuation_are_encoded_together(make, loaded):
    adapter = make()
    tokenizer = adapter.model.tokenizer = load_tokenizer(SMOLLM2)
    for context, continuation, kept in (("Hello, the  \n", "one", "Hello, the"), ("It is in", "ter", "It is in")):
        before = tokenizer.encode(kept)
        after = tokenizer.encode(context + continuation)[len(before) :]
        assert adapter.encode_pair(context, continuation) == (before, after)
        assert after != tokenizer.encode(continuation)
    adapter.model.tokenizer = loaded.tokenizer


def test_contexts_in_which_the_plan_prunes_nothing_are_counted(make, caplog):
    """A task of short questions says nothing about a plan with many tokens at full depth."""
    requests = instances(*[(context, " yes") for context in ("ab", "abcdef", "abcdefghijkl")])
    for plan in (pop.PrunePlan.none(), pop.PrunePlan((3, 4))):
        make(plan=plan).loglikelihood(requests, disable_tqdm=True)
    assert not caplog.records
    plan = pop.PrunePlan((3, 4), full_depth_last=6, full_depth_first=1)
    make(plan=plan).loglikelihood(requests, disable_tqdm=True)
    assert "prunes nothing in 2 of 3 contexts" in caplog.text


def test_too_long_a_context_is_cut_on_the_left_and_this_is_said_once(make, caplog):
    adapter = make(batch_size=2, max_seq_len=16)
    context = "0123456789abcdefghij"
    choices = ["x", "xyz", "x" * 16]
    results = adapter.loglikelihood(instances(*[(context, choice) for choice in choices]))
    kept = [context[-16:], context[-14:], context[-1:]]  # 17 tokens in all: the last one is only predicted
    assert close(results, [naive(adapter, ids(a), ids(b)) for a, b in zip(kept, choices, strict=True)])
    assert len(caplog.records) == 1 and "20 tokens is cut on the left to 16" in caplog.text
    for choice, tokens in (("", 0), ("x" * 17, 17)):
        with pytest.raises(InputError, match=f"request 1 has {tokens} tokens.* 1 to 16 "):
            adapter.loglikelihood(instances(("a", "b"), ("a", choice)))


def test_a_long_continuation_and_a_long_context_do_not_meet_in_one_batch(make):
    adapter = make(batch_size=4, max_seq_len=16)
    pairs = [("a" * 16, "x"), ("b" * 15, "xy"), ("c" * 2, "x" * 15), ("d" * 3, "z" * 14)]
    expected = [naive(adapter, ids(context), ids(choice)) for context, choice in pairs]
    assert close(adapter.loglikelihood(instances(*pairs)), expected)


def test_results_go_to_the_harness_cache(make):
    adapter = make(batch_size=2)
    kept = []
    adapter.cache_hook = SimpleNamespace(add_partial=lambda *entry: kept.append(entry))
    asked = {
        "loglikelihood": [("ab", "c"), ("d", "ef"), ("ab", "g")],
        "loglikelihood_rolling": [("abc",)],
        "generate_until": [("abc", {"max_gen_toks": 3})],
    }
    for name, requests in asked.items():
        results = getattr(adapter, name)(instances(*requests))
        expected = [(name, *entry) for entry in zip(requests, results, strict=True)]
        assert sorted(kept, key=str) == sorted(expected, key=str)
        kept.clear()


# ---- loglikelihood_rolling ----


@given(count=st.integers(0, 40), length=st.integers(1, 12))
def test_windows_predict_each_token_once_and_are_as_full_as_can_be(count, length):
    tokens = list(range(100, 100 + count))
    windows = list(scoring.rolling_windows(tokens, 7, length))
    assert [token for _, continuation in windows for token in continuation] == tokens
    inputs = [7, *tokens]
    for context, continuation in windows:
        seen = context + continuation[:-1]
        end = inputs.index(context[-1]) + len(continuation)  # the inputs up to here are what the window may see
        assert seen == inputs[max(0, end - length) : end]
    assert all(len(context) == 1 for context, _ in windows[:-1])


@pytest.mark.parametrize("length", [96, 10])
def test_rolling_runs_over_windows_of_max_seq_len(make, caplog, length):
    texts = ["Alice was beginning to get very tired", "", "of sitting by her sister"]
    adapter = make(batch_size=3, max_seq_len=length)
    totals = adapter.loglikelihood_rolling(instances(*[(text,) for text in texts]))
    assert "prunes (almost) nothing" in caplog.text
    windows = [scoring.rolling_windows(ids(text), 1, length) for text in texts]
    expected = [sum(naive(adapter, *window)[0] for window in group) for group in windows]
    assert totals == pytest.approx(expected, abs=1e-3)
