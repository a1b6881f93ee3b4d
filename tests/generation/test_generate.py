"""Generation: sampling, seeds, stop strings, streaming, batches, limits; on tiny random models."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.letters import Letters
from support.tiny import random_model, tiny_config

import pop
from pop import engine
from pop.generation.generate import Answer, Run, Sampler
from pop.pruning import reference


@pytest.fixture(scope="module")
def model():
    config = tiny_config(vocab_size=256, max_positions=128)
    return pop.Model(random_model(config, seed=5), config, plan=pop.PrunePlan((1, 3, 4)))


@pytest.fixture(scope="module")
def text_model(model):
    return pop.Model(model.module, model.config, Letters(), plan=model.plan)


CPU = torch.device("cpu")
PROMPTS = [[5, 9, 200], [17], list(range(40, 70))]


# Greedy


def test_greedy_generation_is_the_reference(model):
    for prompt in PROMPTS:
        answer = model.generate(prompt, max_new_tokens=9)
        assert answer.tokens == reference.generate(model.module, torch.tensor(prompt), model.plan, 9)
        assert (answer.text, answer.prompt_tokens, answer.finish_reason) == (None, len(prompt), "length")


def test_a_batch_is_its_prompts_alone(model):
    together = model.generate(PROMPTS, max_new_tokens=9)
    assert [answer.tokens for answer in together] == [model.generate(p, max_new_tokens=9).tokens for p in PROMPTS]
    assert [answer.prompt_tokens for answer in together] == [3, 1, 30]


def test_the_plan_of_the_call_replaces_the_models(model):
    prompt = PROMPTS[2]
    full = model.generate(prompt, max_new_tokens=9, plan=pop.PrunePlan.none())
    assert full.tokens == reference.generate(model.module, torch.tensor(prompt), pop.PrunePlan.none(), 9)
    assert full.tokens != model.generate(prompt, max_new_tokens=9).tokens


def test_prompts_come_as_lists_tensors_and_batches_of_either(model):
    expected = model.generate([5, 9, 200], max_new_tokens=4).tokens
    arrays = [np.array([5, 9, 200], dtype) for dtype in (np.uint8, np.uint16, np.int64)]
    for prompt in (torch.tensor([5, 9, 200]), (5, 9, 200), torch.tensor([5, 9, 200], dtype=torch.int32), *arrays):
        assert model.generate(prompt, max_new_tokens=4).tokens == expected
    for batch in ([[5, 9, 200]], torch.tensor([[5, 9, 200]]), [torch.tensor([5, 9, 200])]):
        assert [answer.tokens for answer in model.generate(batch, max_new_tokens=4)] == [expected]


# Sampling


def test_a_seed_gives_the_same_tokens_alone_and_anywhere_in_a_batch(model):
    options = {"max_new_tokens": 12, "temperature": 1.3, "seed": 11}
    alone = model.generate(PROMPTS[0], **options).tokens
    assert alone == model.generate(PROMPTS[0], **options).tokens
    for batch in (PROMPTS, PROMPTS[::-1]):
        assert model.generate(batch, **options)[batch.index(PROMPTS[0])].tokens == alone
    assert model.generate(PROMPTS[0], **{**options, "seed": 12}).tokens != alone


def test_rows_that_end_leave_the_batch_and_the_others_are_sampled_on(model):
    """Answers of 12 tokens and less: each is what its prompt gets alone, although the batch gets smaller."""
    ends = tuple(range(0, model.config.vocab_size, 9))
    model = pop.Model(model.module, dataclasses.replace(model.config, eos_ids=ends), plan=model.plan)
    prompts = [[token, 2 * token, 3] for token in range(1, 9)]
    options = {"max_new_tokens": 12, "temperature": 0.3, "seed": 5}
    answers = model.generate(prompts, **options)
    assert len({len(answer.tokens) for answer in answers}) > 2
    assert [answer.tokens for answer in answers] == [model.generate(prompt, **options).tokens for prompt in prompts]


def test_without_a_seed_every_call_differs(model):
    first, second = (model.generate(PROMPTS[0], max_new_tokens=30, temperature=2.0).tokens for _ in range(2))
    assert first != second


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
    sampler = Sampler(1, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    assert {sampler(logits).item() for _ in range(20)} <= nucleus


def test_sampling_frequencies_are_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    sampler = Sampler(1, temperature=0.7, seed=0)
    counts = torch.bincount(torch.cat([sampler(logits) for _ in range(4000)]), minlength=4)
    expected = (logits[0] / 0.7).softmax(-1)
    assert (counts / 4000 - expected).abs().max() < 4 * math.sqrt(0.25 / 4000)


def test_top_k_one_and_a_tiny_top_p_are_greedy():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    tiny = ({"top_p": 1e-9}, {"top_p": 5e-324}, {"temperature": 5e-324}, {"temperature": Fraction(1, 10**40)})
    for settings in (*tiny, {"top_k": 1}, {"top_k": np.int64(1), "temperature": 1e-39}):
        assert Sampler(3, **{"temperature": 5.0, "seed": 0, **settings})(logits).tolist() == logits.argmax(-1).tolist()


def test_top_k_keeps_k_tokens_of_those_that_tie():
    logits = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert len({Sampler(1, temperature=1.0, top_k=1, seed=seed)(logits).item() for seed in range(20)}) == 1


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_is_picked_from_logits_that_are_not_finite(broken, temperature):
    logits = torch.tensor([[0.0, 1.0, -math.inf], [0.0, broken, 1.0]])
    sampler = Sampler(2, temperature=temperature, seed=0)
    assert sampler(logits[[0, 0]]).max() < 2  # a token may be impossible
    with pytest.raises(pop.InputError, match="the logits are not finite"):
        sampler(logits)


# Where an answer ends


def test_an_end_token_ends_the_answer_and_is_not_part_of_it(model):
    free = model.generate(PROMPTS[2], max_new_tokens=9).tokens
    end = free[4]
    config = tiny_config(vocab_size=256, max_positions=128, eos_ids=(end,))
    ending = pop.Model(model.module, config, plan=model.plan)
    batch = ending.generate(PROMPTS, max_new_tokens=9)
    assert (batch[2].tokens, batch[2].finish_reason) == (free[: free.index(end)], "stop")
    for answer, prompt in zip(batch, PROMPTS, strict=True):
        assert answer.tokens == ending.generate(prompt, max_new_tokens=9).tokens


def test_a_turn_ends_where_the_chat_format_says(model):
    """Also where the checkpoint does not list the token that ends a turn."""
    free = model.generate(PROMPTS[2], max_new_tokens=9).tokens
    tokenizer = Letters({"<|im_start|>": 255, "<|im_end|>": free[4]})
    answer = pop.Model(model.module, model.config, tokenizer, plan=model.plan).generate(PROMPTS[2], max_new_tokens=9)
    assert (answer.tokens, answer.finish_reason) == (free[: free.index(free[4])], "stop")


def test_ids_beyond_the_tokenizer_are_never_picked(model):
    """Embeddings are padded: such ids have a logit, but no text."""
    tokenizer = Letters()
    tokenizer.vocab_size = 100
    padded = pop.Model(model.module, model.config, tokenizer, plan=model.plan)
    for options in ({}, {"temperature": 2.0, "seed": 0}):
        assert max(model.generate(PROMPTS[0], max_new_tokens=20, **options).tokens) >= 100
        assert max(padded.generate(PROMPTS[0], max_new_tokens=20, **options).tokens) < 100


def test_times_belong_to_the_tokens_of_the_row(model):
    config = tiny_config(vocab_size=256, eos_ids=(model.generate(PROMPTS[0], max_new_tokens=3).tokens[2],))
    run = Run(pop.Model(model.module, config, plan=model.plan), PROMPTS[:2], max_new_tokens=4)
    list(run.steps())
    first, second = run.generations([1.0, 2.0, 4.0, 8.0])
    assert (len(first.tokens), first.ttft_s, first.decode_s) == (2, 1.0, 1.0)
    assert (len(second.tokens), second.ttft_s, second.decode_s) == (4, 1.0, 7.0)
    assert second.tokens_per_s == 3 / 7


def test_text_ends_before_a_stop_string(text_model):
    free = text_model.generate("abc", max_new_tokens=20).text
    stop = free[5:8]
    answer = text_model.generate("abc", max_new_tokens=20, stop=stop)
    assert (answer.text, answer.finish_reason) == (free[: free.index(stop)], "stop")
    assert "".join(text_model.stream("abc", max_new_tokens=20, stop=[stop])) == answer.text


def test_streamed_pieces_are_the_generated_text(text_model):
    pieces = list(text_model.stream("abc", max_new_tokens=40))
    assert "".join(pieces) == text_model.generate("abc", max_new_tokens=40).text
    assert all(pieces)


@given(st.text(min_size=1, max_size=20), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_any_text_streams_in_whole_characters_and_stops_where_it_should(text, stop):
    answer = Answer(Letters(), frozenset({255}), stop, max_new_tokens=len(text.encode()))
    pieces = [answer.push(byte) for byte in text.encode()]
    # The stop string whose end comes first ends the answer; of several that end there, the longest.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    expected = text[: min(ends)[1]] if ends else text
    assert "".join(pieces) == answer.text == expected
    assert answer.finish_reason == ("stop" if ends else "length")
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


def test_a_character_cut_by_the_end_is_shown_as_such():
    first, second = "é".encode()
    assert Answer(Letters(), frozenset(), [], max_new_tokens=1).push(first) == "\ufffd"
    answer = Answer(Letters(), frozenset({255}), [], max_new_tokens=5)
    assert [answer.push(byte) for byte in (first, second, first, 255, 65)] == ["", "é", "", "\ufffd", ""]
    assert (answer.text, answer.finish_reason, answer.tokens) == ("é\ufffd", "stop", [first, second, first])


def test_a_full_context_ends_an_answer_and_only_its_own(model):
    short = pop.Model(model.module, model.config, plan=model.plan, max_seq_len=32)
    batch = short.generate(PROMPTS, max_new_tokens=9)  # the last prompt has 30 tokens
    assert [len(answer.tokens) for answer in batch] == [9, 9, 3]
    assert [answer.finish_reason for answer in batch] == ["length"] * 3
    for answer, prompt in zip(batch, PROMPTS, strict=True):
        assert answer.tokens == model.generate(prompt, max_new_tokens=9).tokens[: len(answer.tokens)]
    assert len(short.generate([3] * 32).tokens) == 1


# Tensors


def test_prefill_and_decode_by_hand(model):
    cache = model.new_cache(batch_size=2, max_seq_len=12)
    tokens = torch.tensor([[5, 9, 200, 0], [17, 18, 19, 20]])
    logits = model.prefill(tokens, cache, lengths=[3, 4])
    assert logits.shape == (2, 256)
    assert logits.dtype == torch.float32
    assert cache.lengths.tolist() == [3, 4]
    assert model.decode(logits.argmax(-1), cache).shape == (2, 256)
    assert cache.lengths.tolist() == [4, 5]
    cache.reset()
    assert torch.equal(model.prefill(tokens, cache, lengths=torch.tensor([3, 4])), logits)


def test_chunks_do_not_change_the_result(model):
    tokens = torch.arange(100, 131)[None]
    expected = model.prefill(tokens, model.new_cache(1, 40))
    widths = []
    hook = model.module.model.embed_tokens.register_forward_hook(lambda _, args, out: widths.append(out.shape[1]))
    for size, chunks in ((1, [1] * 31), (7, [7, 7, 7, 7, 3]), (31, [31])):
        widths.clear()
        torch.testing.assert_close(model.prefill(tokens, model.new_cache(1, 40), chunk_size=size), expected)
        assert widths == chunks
    hook.remove()


def test_the_size_of_a_cache_is_known_before_it_is_made(model):
    expected = pop.KVCache.size_in_bytes(model.config, 3, 50, torch.float32)
    cache = model.new_cache(3, 50)
    assert cache.nbytes == expected == sum(x.nbytes for x in (*cache.keys, *cache.values, cache.states))
    assert expected == (2 * 5 * 3 * 51 * 2 * 10 + 5 * 3 * 30) * 4


def test_a_cache_that_does_not_fit_is_refused_with_its_size(model):
    huge = tiny_config(vocab_size=256, max_positions=10**12)
    size = pop.KVCache.size_in_bytes(huge, 1, 10**12, torch.float32)
    with pytest.raises(pop.CacheMemoryError, match=f"{size:,} bytes"):
        pop.Model(model.module, huge).new_cache()


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


def test_long_continuations_are_scored_in_parts(model, monkeypatch):
    expected = model.score([5, 9, 200], list(range(40)))
    monkeypatch.setattr("pop.model.SCORED_AT_ONCE", 7)
    assert model.score([5, 9, 200], list(range(40))) == pytest.approx(expected, abs=1e-4)


def test_scored_text_begins_once(model):
    """Context with the token that begins a text, continuation without."""
    beginning = pop.Model(model.module, model.config, Letters(bos_id=254), plan=model.plan)
    assert beginning.score("abc", "de") == model.score([254, *b"abc"], [*b"de"])


def test_bfloat16_stays_close_to_float32(model):
    """bfloat16 keeps 8 bits: logits of a 5-layer model within 5 % of their scale (observed: about 2 %)."""
    half = random_model(model.config, seed=5).to(torch.bfloat16)
    half = pop.Model(half, model.config, plan=model.plan)
    tokens = [PROMPTS[2]]
    exact = model.prefill(tokens, model.new_cache(1, 64))
    rounded = half.prefill(tokens, half.new_cache(1, 64))
    assert rounded.dtype == torch.float32
    assert (rounded - exact).pow(2).mean().sqrt() < 0.05 * exact.std()


# Refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate([]), "the prompt is empty"),
        (lambda m: m.generate([[]]), "the prompt is empty"),
        (lambda m: m.generate([[1], []]), "the prompt is empty"),
        (lambda m: m.generate(torch.zeros(0, dtype=torch.int64)), "the prompt is empty"),
        (lambda m: m.generate([1, 256]), "token id 256 is not in the vocabulary of 256"),
        (lambda m: m.generate([-1]), "token id -1"),
        (lambda m: m.generate([1.5]), "must be integers"),
        (lambda m: m.generate([True]), "must be integers"),
        (lambda m: m.generate(5), "the prompt is a int"),
        (lambda m: m.generate({"a": 1}), "the prompt is a dict"),
        (lambda m: m.generate(None), "the prompt is a NoneType"),
        (lambda m: m.generate([[1, 2], ["a"]]), "must be integers"),
        (lambda m: m.generate([1], max_new_tokens=0), "max_new_tokens is 0"),
        (lambda m: m.generate([1], max_new_tokens=2.5), "max_new_tokens is 2.5"),
        (lambda m: m.generate([1], temperature=-1), "temperature is -1"),
        (lambda m: m.generate([1], temperature=float("nan")), "temperature is nan"),
        (lambda m: m.generate([1], temperature=None), "temperature is None"),
        (lambda m: m.generate([1], top_k=0), "top_k is 0"),
        (lambda m: m.generate([1], top_p=0), "top_p is 0"),
        (lambda m: m.generate([1], top_p=1.1), "top_p is 1.1"),
        (lambda m: m.generate([1], seed=-1), "seed is -1"),
        (lambda m: m.generate([1], seed=0.5), "seed is 0.5"),
        (lambda m: m.generate([1], stop=""), "stop is"),
        (lambda m: m.generate([1], stop=[3]), "stop is"),
        (lambda m: m.generate([1], stop=5), "stop is"),
        (lambda m: m.generate([1], images=[object()]), "the llama family reads text only"),
        (lambda m: m.generate([1], images=np.zeros((4, 4, 3), np.uint8)), "the llama family reads text only"),
        (lambda m: m.logits([[1]], images=torch.zeros(4, 4, 3)), "the llama family reads text only"),
        (lambda m: m.generate([1], videos=[object()]), "the llama family reads text only"),
        (lambda m: m.generate([1], plan="most"), "the plan is 'most'"),
        (lambda m: m.generate([1], plan=pop.PrunePlan((9,))), "prunes layer 9"),
        (lambda m: m.generate([1] * 129), "the prompt has 129 tokens, but the model takes 128"),
        (lambda m: m.generate("text"), "needs a tokenizer"),
        (lambda m: m.generate([1], stop="x"), "needs a tokenizer"),
        (lambda m: m.stream([1]), "needs a tokenizer"),
        (lambda m: m.chat([{"role": "user", "content": "hi"}]), "needs a tokenizer"),
        (lambda m: m.logits([[1] * 129]), "129 tokens, but the model takes 128"),
        (lambda m: m.logits([1]), "shape"),
        (lambda m: m.score([1], []), "the continuation is empty"),
        (lambda m: m.score([], [1]), "the context is empty"),
        (lambda m: m.generate(torch.tensor(5)), "the prompt is a int"),
        (lambda m: m.generate(torch.zeros(0, 3, dtype=torch.int64)), "the prompt is empty"),
        (lambda m: m.new_cache(10**12, 100), "bytes"),
        (lambda m: m.prefill([[1]], None), "the cache is a NoneType"),
        (
            lambda m: m.decode([1], pop.KVCache(tiny_config(num_layers=6), 1, 9, dtype=torch.float32, device=CPU)),
            "another",
        ),
        (
            lambda m: m.decode([1], pop.KVCache(m.config, 1, 9, dtype=torch.bfloat16, device=CPU)),
            "another model, dtype",
        ),
        (lambda m: m.prefill([[1]], m.new_cache(1), lengths=3), "lengths must be integers"),
        (lambda m: m.prefill([[]], m.new_cache(1)), "tokens is empty"),
        (lambda m: m.score([1] * 128, [1, 2]), "129 tokens, but the model takes 128"),
        (lambda m: m.new_cache(0), "batch_size is 0"),
        (lambda m: m.new_cache(1, 0), "max_seq_len is 0"),
        (lambda m: m.new_cache(1, 129), "longer than the model's limit of 128"),
        (lambda m: m.prefill([[1, 2]], m.new_cache(2)), "tokens has 1 rows, but the cache has 2"),
        (lambda m: m.prefill([[1, 2]], m.new_cache(1), lengths=[3]), "lengths is"),
        (lambda m: m.prefill([[1, 2]], m.new_cache(1), lengths=[0]), "lengths is"),
        (lambda m: m.prefill([[1, 2]], m.new_cache(1), lengths=[1, 1]), "lengths is"),
        (lambda m: m.prefill([[1, 2]], m.new_cache(1), lengths=[1.0]), "lengths must be integers"),
        (lambda m: m.prefill([[1, 2]], m.new_cache(1), chunk_size=0), "chunk_size is 0"),
        (lambda m: m.prefill([[1] * 5], m.new_cache(1, 4)), "would hold 5 tokens .* ends at 4"),
        (lambda m: m.decode([[1]], m.new_cache(1)), "shape"),
        (lambda m: m.decode([999], m.new_cache(1)), "token id 999"),
    ],
)
def test_what_cannot_be_done_is_said(model, call, message):
    with pytest.raises(pop.PopError, match=message):
        call(model)


def test_a_full_cache_is_said_and_left_as_it_was(model):
    cache = model.new_cache(1, 4)
    model.prefill([[1, 2, 3, 4]], cache)
    with pytest.raises(pop.ContextOverflow, match="would hold 5 tokens"):
        model.decode([5], cache)
    assert cache.lengths.tolist() == [4]


def test_stream_refuses_before_it_starts(text_model):
    with pytest.raises(pop.InputError):
        text_model.stream("")
    with pytest.raises(pop.InputError, match="one prompt"):
        text_model.stream(["a", "b"])
    with pytest.raises(pop.PlanError):
        text_model.stream("a", plan="most")
    with pytest.raises(TypeError):
        text_model.stream("a", temprature=1)


def test_one_model_serves_two_caches(model):
    """No state but the cache: interleaved sequences do not see each other."""
    caches = [model.new_cache(1, 40) for _ in range(2)]
    logits = [model.prefill([prompt], cache) for prompt, cache in zip(PROMPTS[1:], caches, strict=True)]
    tokens = [[], []]
    for _ in range(5):
        for i in (0, 1):
            tokens[i].append(logits[i].argmax().item())
            logits[i] = engine.decode(model.module, logits[i].argmax(-1), caches[i])
    assert tokens == [model.generate(prompt, max_new_tokens=5).tokens for prompt in PROMPTS[1:]]
