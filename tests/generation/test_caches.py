"""Caches that are used again: the same answers, no tokens of an earlier one, and one captured step for many answers."""

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.replay import Replay
from support.tiny import tiny_gemma3_config, tiny_model
from support.tiny_chat import write_chat_checkpoint

import pop
from pop import engine
from pop.engine.cache import KVCache
from pop.engine.layer_pass import ReplayedPasses
from pop.engine.spare_caches import SpareCaches, size_of_cache
from pop.runner import KEPT_CACHES

PROMPTS = [[5, 9, 20], list(range(40, 60)), [17]]


@pytest.fixture
def steps(monkeypatch):
    """Models that replay steps and prompts, and keep caches, as on a GPU. The list gets what each decode step is."""
    made = []

    def replay(module, what, other=None):
        made.extend([what] if what.startswith("decode") else [])
        return Replay(module, what, other)

    monkeypatch.setattr("pop.runner.replay_of", lambda *_: replay)
    monkeypatch.setattr("pop.runner.replayed_tokens_of", lambda *_: 100)
    monkeypatch.setattr("pop.runner.SpareCaches", lambda most: SpareCaches(KEPT_CACHES))
    return made


def new_model(**options):
    return tiny_model(tiny_gemma3_config(max_positions=512), seed=3, **options)


def test_sizes_go_up_in_steps():
    """Of 256 tokens. tests/engine/test_layer_pass.py has the steps."""
    sizes = [(1, 256), (256, 256), (257, 512), (2048, 2048), (2049, 2560), (2560, 2560), (2**15 - 1, 2**15)]
    assert [(tokens, size_of_cache(tokens)) for tokens, _ in sizes] == sizes


def test_answers_in_a_kept_cache_are_those_in_a_new_one(steps):
    model, other = (new_model(plan=pop.PrunePlan((1, 2)), chunk_size=4) for _ in range(2))
    for one in (model, other):
        one.module.model.norm.weight.data += 1  # larger logits, so that answers differ
    other.caches = SpareCaches(0)
    for prompts in (PROMPTS[:1], PROMPTS, PROMPTS[:2], PROMPTS[1:2]):
        for options in ({}, {"temperature": 1.0, "seed": 4}):
            found, expected = (m.generate(prompts, max_new_tokens=4, **options) for m in (model, other))
            assert [one.tokens for one in found] == [one.tokens for one in expected]


def test_many_answers_need_one_step(steps, tmp_path):
    model = pop.load(write_chat_checkpoint(tmp_path), progress=False)
    for prompt in PROMPTS:
        model.generate(prompt, max_new_tokens=5)
    assert len(steps) == 1
    assert len(model.caches._spare[0].passes[ReplayedPasses].kept) == len(PROMPTS)
    next(model.stream([5, 9, 20], max_new_tokens=5))  # an abandoned stream gives its cache back
    model.generate([7], max_new_tokens=5)
    assert len(steps) == 1
    steps.clear()
    chat = model.start_chat("Be brief.")
    for _ in range(4):
        chat.send("Hello", max_new_tokens=3)
    assert len(steps) <= 2  # a turn works on a copy


@pytest.fixture
def ended(steps):
    """A model, and options with which the first of PROMPTS ends early and the others do not."""
    model = new_model()
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 4}
    first, *others = (set(one.tokens) for one in model.generate(PROMPTS, **options))
    stop = min(first - others[0] - others[1])
    model.config = dataclasses.replace(model.config, eos_ids=(stop,))
    expected = [model.generate(prompt, **options).tokens for prompt in PROMPTS]
    assert len(expected[0]) < 11 and len(expected[1]) == len(expected[2]) == 12
    return model, options, expected


def test_a_row_that_has_ended_and_stays_cannot_fail_the_batch(ended, monkeypatch):
    model, options, expected = ended
    decode, calls = engine.decode, []

    def overflowing(module, tokens, cache, stages):
        logits = decode(module, tokens, cache, stages)
        calls.append(len(tokens))
        return logits.index_fill(0, torch.tensor(0), torch.nan) if len(calls) > len(expected[0]) else logits

    monkeypatch.setattr("pop.engine.decode", overflowing)
    assert [one.tokens for one in model.generate(PROMPTS, **options)] == expected
    assert calls == [3] * 11  # no row has left


def test_a_function_of_the_caller_gets_no_finished_answer(ended):
    model, options, expected = ended
    asked = []

    def processor(tokens, logits):
        asked.append(len(tokens))
        return logits

    found = model.generate(PROMPTS, logits_processor=processor, **options)
    assert [one.tokens for one in found] == expected
    assert len(asked) == len(expected[0]) + 1 + 12 + 12  # and the first row's end token


def test_threads_never_share_a_cache(steps):
    model = new_model()
    expected = [[model.generate(prompt, max_new_tokens=8).tokens] * 2 for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        found = pool.map(lambda prompt: [model.generate(prompt, max_new_tokens=8).tokens for _ in range(2)], PROMPTS)
        assert list(found) == expected


def test_kept_caches_give_way_if_memory_is_short(steps, monkeypatch):
    model = new_model()
    size = {tokens: model.new_cache(1, tokens).nbytes for tokens in (256, 400, 512)}
    room = size[512]  # of a device that holds nothing but the kept caches
    monkeypatch.setattr("pop.engine.spare_caches.free_bytes", lambda device: 2**30)
    monkeypatch.setattr(
        "pop.engine.cache.free_bytes", lambda device: room - sum(cache.nbytes for cache in model.caches._spare)
    )
    for use in (
        lambda: model.new_cache(1, 500),
        lambda: model.caches.take(model, 1, 500),
        lambda: model.score([1], [2] * 500),
    ):
        model.generate([1], max_new_tokens=2)
        assert [cache.max_seq_len for cache in model.caches._spare] == [256]
        use()
        assert model.caches._spare == []
    room = size[400]
    assert model.caches.take(model, 1, 400).max_seq_len == 400  # for a step further there is too little
    with pytest.raises(pop.CacheMemoryError):
        model.new_cache(1, 500)


def test_kept_caches_take_a_quarter_of_the_memory_at_most(monkeypatch):
    model = new_model()
    kept = SpareCaches(2)
    free = [0]
    monkeypatch.setattr("pop.engine.spare_caches.free_bytes", lambda device: free[0])
    small, large = kept.take(model, 1, 256), kept.take(model, 1, 400)
    for free[0], expected in (
        (4 * (small.nbytes + large.nbytes), [large, small]),
        (3 * large.nbytes, [large]),
        (0, []),
    ):
        kept.clear()
        kept.give(small)
        kept.give(large)
        assert kept._spare == expected


def test_a_cache_is_kept_for_answers_that_it_fits_and_not_for_a_copy_of_the_model(steps):
    model = new_model()
    model.generate([1], max_new_tokens=2)
    model.module.double()
    assert len(model.generate([1], max_new_tokens=2).tokens) == 2
    model.chunk_size = 16
    model.generate([1], max_new_tokens=2)
    kept = [(cache.previous_hidden.dtype, cache.chunk_size) for cache in model.caches._spare]
    assert kept == [(torch.float64, 16), (torch.float64, 2048)]
    assert copy.deepcopy(model).caches._spare == []


def test_the_cache_of_an_answer_that_failed_is_not_kept(steps, monkeypatch):
    """An error in the middle of keep_rows leaves fewer rows in some of the layers."""
    model = new_model()

    def keep_rows(cache, rows):
        cache.keys[0] = cache.keys[0][rows]
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(KVCache, "keep_rows", keep_rows)
        model.generate([[1, 2] * 250, [2]], max_new_tokens=20)  # the context ends the first row's answer
    assert model.caches._spare == []
    assert len(model.generate([[1, 2] * 250, [2]], max_new_tokens=20)) == 2
