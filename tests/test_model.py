"""`pop.Model`: tensors in, tensors out, and what it refuses."""

import copy
import dataclasses
import os
from functools import partial
from unittest.mock import patch

import pytest
import torch
from support.cases import FAMILIES
from support.meta_device import META
from support.tiny import tiny_config, tiny_model, write_checkpoint

import pop
from pop.runner import token_ids


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config(vocab_size=256, max_positions=128), seed=5, plan=pop.PrunePlan((1, 3, 4)))


def test_chunks_do_not_change_the_result(model):
    tokens = torch.arange(100, 131)[None]
    expected = model.prefill(tokens, model.new_cache(1, 40))
    widths = []
    hook = model.module.model.embed_tokens.register_forward_hook(lambda _, args, out: widths.append(out.shape[1]))
    for size, chunks in ((1, [1] * 31), (7, [7, 7, 7, 7, 3]), (31, [31])):
        widths.clear()
        with patch.object(model, "chunk_size", size):
            torch.testing.assert_close(model.prefill(tokens, model.new_cache(1, 40)), expected)
        assert widths == chunks
    hook.remove()


@pytest.mark.parametrize("mode", [partial(torch.autocast, "cpu", dtype=torch.bfloat16), torch.inference_mode])
@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl"])
def test_modes_of_the_caller_change_no_bit(family, mode):
    """Prefill, decode, extend, the plain pass, scores, and an answer after a prefix, of a model in float32."""
    model = tiny_model(FAMILIES[family](), 5, plan=pop.PrunePlan((1, 3), full_depth_selected=0.5, selecting_layer=0))

    def results():
        answer = model.prefix([*range(30)]).generate([4, 5], max_new_tokens=3)
        cache = model.new_cache(1, 64)
        found = [model.prefill([range(30)], cache), model.decode([3], cache), model.extend([[4, 5]], cache)]
        numbers = [*answer.tokens, model.score([1, 2, 3], [4, 5])]
        return [*found, model.logits([range(9)]), torch.tensor(numbers)]

    expected = results()
    with mode():
        assert all(map(torch.equal, results(), expected))


def test_a_cache_that_does_not_fit_is_refused_with_its_size(model):
    huge = tiny_config(vocab_size=256, max_positions=10**12)
    size = pop.KVCache.size_in_bytes(huge, 1, 10**12, torch.float32)
    with pytest.raises(pop.CacheMemoryError, match=f"{size:,} bytes"):
        pop.Model(model.module, huge).new_cache()


def test_a_model_says_what_it_is(model, tmp_path, monkeypatch):
    limit = pop.cost.speedup_limit(model.config, 128, model.plan)
    said = f"torch.float32 on cpu, prefill skips 3 of 5 layers, at most {limit:.2f}x as fast at 128 tokens, without"
    assert repr(model).startswith("<pop.Model: 0 M parameters, ") and said in repr(model)
    loaded = pop.load(write_checkpoint(tmp_path / "tiny"), dtype=torch.bfloat16, prune=None)
    assert repr(loaded).startswith("<tiny: ")
    assert "torch.bfloat16 on cpu, prefill skips 0 of 5 layers, at most 1.00x" in repr(loaded)
    assert "without corrections" not in repr(loaded)
    loaded.plan = dataclasses.replace(model.plan, full_depth_below=90)
    assert "prefill of 90 tokens or more skips 3 of 5 layers, at most" in repr(loaded)
    monkeypatch.setattr(pop.Model, "device", torch.device("cuda"))
    assert "at 128 tokens by arithmetic (launches bound short prompts), without corrections" in repr(model)


def generate(prompt, model):
    model.generate(prompt)


def with_plan(plan, model):
    model.generate([1], plan=plan)


def prefill(lengths, model):
    model.prefill([[1, 2]], model.new_cache(1), lengths=lengths)


EMPTY = ([], [[]], [[1], []], torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.int64))
NO_IDS = ([1.5], [True], [[1, 2], ["a"]])
NO_PROMPTS = ((5, "int"), (torch.tensor(5), "int"), ({"a": 1}, "dict"), (None, "NoneType"), ([{"a": 1}], "model.chat"))
NEAR_NAMES = (("smollm2-135m-thrid", "smollm2-135m-third"), ("thrid", "third"), ("defualt", "default"))
WRONG_LENGTHS = (3, [3], [0], [1, 1], [1.0])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        *((partial(generate, prompt), pop.InputError, ["prompt", "empty"]) for prompt in EMPTY),
        (lambda m: m.generate([1, 256]), pop.InputError, ["token id 256", "256 tokens"]),
        *((partial(generate, prompt), pop.InputError, ["tokens", "integers"]) for prompt in NO_IDS),
        *((partial(generate, prompt), pop.InputError, ["prompt", kind]) for prompt, kind in NO_PROMPTS),
        (lambda m: m.generate([1], images=[object()]), pop.InputError, ["llama", "text only", "images"]),
        *((partial(with_plan, wrong), pop.PlanError, [f"a near name is {near!r})"]) for wrong, near in NEAR_NAMES),
        (lambda m: m.generate([1], plan=pop.PrunePlan((9,))), pop.PlanError, ["layer 9"]),
        (lambda m: m.generate([1] * 129), pop.ContextOverflow, ["prompt", "129", "128"]),
        (lambda m: m.generate([[1] * 5, [1] * 129]), pop.ContextOverflow, ["prompt 1 ", "129", "128"]),
        (lambda m: m.logits([[1] * 129]), pop.ContextOverflow, ["129", "128"]),
        (lambda m: m.generate("text"), pop.TokenizerError, ["text", "tokenizer"]),
        (lambda m: m.generate([1], stop="x"), pop.TokenizerError, ["stop", "tokenizer"]),
        (lambda m: m.stream([1]), pop.TokenizerError, ["stream", "tokenizer"]),
        (lambda m: m.chat([{"role": "user", "content": "hi"}]), pop.TokenizerError, ["chat", "tokenizer"]),
        (lambda m: m.score([1], []), pop.InputError, ["continuation", "empty"]),
        (lambda m: m.score([], [1]), pop.InputError, ["context", "empty"]),
        (lambda m: m.logits([1]), pop.InputError, ["tokens", "[batch, tokens]"]),
        (lambda m: m.decode([[1]], m.new_cache(1)), pop.InputError, ["tokens", "[batch]"]),
        (lambda m: m.prefill([[]], m.new_cache(1)), pop.InputError, ["tokens", "empty"]),
        *((partial(prefill, lengths), pop.InputError, ["lengths", str(lengths)]) for lengths in WRONG_LENGTHS),
        (lambda m: pop.Model(m.module, m.config, chunk_size=0), pop.InputError, ["chunk_size", "0"]),
        (lambda m: m.warmup(1, m.plan), pop.InputError, ["plans is PrunePlan"]),
        (lambda m: m.prefill([[1, 2]], m.new_cache(2)), pop.InputError, ["1 rows", "2"]),
        (lambda m: m.prefill([[1] * 5], m.new_cache(1, 4)), pop.ContextOverflow, ["row 0", "5 tokens", "4"]),
        (lambda m: m.extend([[1] * 5], m.new_cache(1, 4)), pop.ContextOverflow, ["row 0", "5", "4"]),
        (lambda m: m.decode([1], cache_of(tiny_config(num_layers=6))), pop.InputError, ["cache", "another model"]),
        (lambda m: m.decode([1], cache_of(m.config, torch.bfloat16)), pop.InputError, ["cache", "dtype"]),
        (lambda m: m.new_cache(0), pop.InputError, ["batch_size", "0"]),
        (lambda m: m.new_cache(1, 0), pop.InputError, ["max_seq_len", "0"]),
        (lambda m: m.new_cache(1, 129), pop.ContextOverflow, ["129", "128"]),
    ],
)
def test_what_cannot_be_done_is_said(model, call, error, words):
    with pytest.raises(error) as raised:
        call(model)
    assert type(raised.value) is error
    assert [word for word in words if word not in str(raised.value)] == []


def cache_of(config, dtype=torch.float32):
    return pop.KVCache(config, 1, 9, dtype=dtype, device=torch.device("cpu"))


def test_a_full_cache_is_said_and_left_as_it_was(model):
    cache = model.new_cache(1, 4)
    model.prefill([[1, 2, 3, 4]], cache)
    with pytest.raises(pop.ContextOverflow, match="5 tokens"):
        model.decode([5], cache)
    assert cache.lengths.tolist() == [4]


def test_ids_on_another_device_are_read_only_if_the_caller_can_wait():
    ids = torch.zeros(3, dtype=torch.int32, device=META)
    there = token_ids(ids, 1, 10, wait=False)
    assert (there.device, there.dtype) == (META, torch.int64)
    with pytest.raises(NotImplementedError, match="copy out of meta"):  # it has nothing to read
        token_ids(ids, 1, 10)
    for wait in (False, True):
        assert token_ids(torch.tensor([3, 9]), 1, 10, wait).tolist() == [3, 9]
        for id in (-1, 10):
            with pytest.raises(pop.InputError, match=f"token id {id} "):
                token_ids([3, id], 1, 10, wait)


def test_a_plans_file_is_read_again_only_after_a_change(model, tmp_path):
    """Corrections compare by identity, so a recorded pass is found only with those of the call before."""
    file = tmp_path / "my.plan"
    pop.PrunePlan((1,)).save(file)
    with patch.object(pop.PrunePlan, "load", wraps=pop.PrunePlan.load) as load:
        first = model.resolve(file)
        assert model.resolve(str(file)) is first
        pop.PrunePlan((1, 2)).save(file)
        os.utime(file, ns=(0, 0))
        assert [model.resolve(file).layers for _ in range(2)] == [(1, 2), (1, 2)]
        other = tmp_path / "other.plan"
        pop.PrunePlan((3,)).save(other)
        os.utime(other, ns=(0, 0))
        other.replace(file)
        assert model.resolve(file).layers == (3,)
    assert load.call_count == 3
    file.unlink()
    with pytest.raises(pop.PlanError, match="names no file"):
        model.resolve(file)


def test_a_copy_runs_alike_and_eagerly(model):
    for duplicate in (copy.copy, copy.deepcopy):
        twin = duplicate(model)
        assert not twin.compiled
        assert twin.generate([5, 9], max_new_tokens=3).tokens == model.generate([5, 9], max_new_tokens=3).tokens
