"""`pop.importance`: scores, samples, unfinished runs, and what is refused."""

import math
import os
import sys
from functools import partial

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.gated_loss import assert_close, slopes
from support.importances import assert_same
from support.tiny import random_model, tiny_config
from support.tiny_chat import write_chat_checkpoint

import pop
from pop import InputError
from pop.calibration import scores
from pop.calibration.gates import gate_gradients, sample_responses
from pop.calibration.scores import SCORES, importance


def test_scores_are_mean_squared_slopes_with_their_standard_errors(model, samples):
    samples = samples[1:]
    result = importance(model, samples, batch_size=3, branches=True, progress=False)
    both = np.stack([slopes(model.module, *pair, together=True)[0] for pair in samples])  # [n, 2, L]
    apart = np.stack([slopes(model.module, *pair) for pair in samples])  # [n, 2, 2, L]
    for part, slope in ((result, both), (result.attention, apart[:, 0]), (result.mlp, apart[:, 1])):
        errors = (slope**2).std(axis=0, ddof=1) / np.sqrt(len(samples))
        for stage, (mean, error) in enumerate([("prefill", "prefill_error"), ("decode", "decode_error")]):
            assert_close(getattr(part, mean), (slope**2).mean(0)[stage])
            assert_close(getattr(part, error), errors[stage])
        assert part.num_samples == len(samples)
        assert part.prefill.dtype == part.decode_error.dtype == torch.float64


def test_branches_are_scored_on_request_only(model, samples):
    result = importance(model, samples, progress=False)
    assert result.attention is None and result.mlp is None
    assert_same(result, importance(model, samples, progress=False, branches=False))


# ---- What must be exactly zero ----


def test_a_layer_that_adds_nothing_scores_zero(samples):
    module = random_model(tiny_config())
    for projection in (module.layers[2].self_attn.o_proj, module.layers[2].mlp.down_proj):
        projection.weight.zero_()
    result = importance(pop.Model(module, tiny_config()), samples, branches=True, progress=False)
    for part in (result, result.attention, result.mlp):
        assert part.prefill[2] == part.decode[2] == part.prefill_error[2] == part.decode_error[2] == 0
        assert (part.decode[[0, 1, 3, 4]] > 0).all()


def test_prefill_needs_neither_the_last_layer_nor_any_layer_for_a_prompt_of_one_token(model, samples):
    result = importance(model, samples, progress=False)
    assert result.prefill[-1] == 0
    assert (result.prefill[:-1] > 0).all()
    assert (importance(model, [([3], [1, 2])], progress=False).prefill == 0).all()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_scores_do_not_depend_on_batches_or_order(model, samples, batch_size):
    expected = importance(model, samples, progress=False)
    for order in (samples, samples[::-1]):
        actual = importance(model, order, batch_size=batch_size, progress=False)
        for name in SCORES:
            assert_close(getattr(actual, name), getattr(expected, name), 1e-5)


def test_bfloat16_gives_the_scores_of_its_weights(samples):
    config = tiny_config(dtype=torch.bfloat16)
    module = random_model(config).bfloat16()
    low = importance(pop.Model(module, config), samples, progress=False)
    high = importance(pop.Model(module.float(), config), samples, progress=False)
    assert_close(low.prefill, high.prefill, 0.1)
    assert_close(low.decode, high.decode, 0.1)


# ---- What the call leaves as it was ----


def test_parameters_and_grad_mode_are_left_alone(samples):
    module = random_model(tiny_config())
    module.layers[1].requires_grad_(True)
    before = [parameter.requires_grad for parameter in module.parameters()]
    model = pop.Model(module, tiny_config())
    expected = importance(model, samples, progress=False)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert_same(importance(model, samples, progress=False), expected)
            assert torch.is_grad_enabled() == (mode is torch.enable_grad)
            assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    module.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(InputError, match="not finite"):
        importance(model, samples, progress=False)
    assert [parameter.requires_grad for parameter in module.parameters()] == before
    assert all(parameter.grad is None for parameter in module.parameters())


def test_sampling_depends_on_the_seed_and_the_sample_not_on_the_batch(model, prompts, monkeypatch):
    def responses(batch_size, seed=0, prompts=prompts):
        found = []
        with monkeypatch.context() as patched:
            patched.setattr(scores, "gate_gradients", lambda *args: found.extend(args[2]) or gate_gradients(*args))
            importance(model, prompts, batch_size=batch_size, response_tokens=9, seed=seed, progress=False)
        return found

    expected = responses(8)
    assert [len(response) for response in expected] == [9] * 5
    for batch_size in (1, 2, 3):
        assert responses(batch_size) == expected
    assert responses(8, seed=1) != expected
    same = responses(8, prompts=[[1, 2, 3]] * 3)
    assert same[0] != same[1] != same[2]
    mixed = [prompts[0], (prompts[1], [4, 4]), prompts[2], prompts[3], prompts[4]]
    assert responses(8, prompts=mixed) == [expected[0], [4, 4], *expected[2:]]


def test_sampled_responses_score_as_given_ones(model, prompts):
    sampled = sample_responses(model, prompts, [[]] * 5, [(3, n) for n in range(5)], 6)
    expected = importance(model, list(zip(prompts, sampled, strict=True)), progress=False)
    assert_same(importance(model, iter(prompts), response_tokens=6, seed=3, progress=False), expected)


def test_text_samples_are_tokenized(tmp_path):
    model = pop.load(write_chat_checkpoint(tmp_path))
    model.tokenizer.bos_id = 2  # begins a prompt, and no response
    encode = model.tokenizer.encode
    assert encode("H") == [2, *encode("H", bos=False)]
    expected = importance(model, [(encode("Hello"), encode("you", bos=False)), encode("Hi")], response_tokens=3)
    assert_same(importance(model, [("Hello", "you"), "Hi"], response_tokens=3), expected)
    assert_same(importance(model, [["Hello", "you"], torch.tensor(encode("Hi"))], response_tokens=3), expected)


def test_two_token_ids_are_a_prompt(model):
    for sample in ([4, 5], (4, 5), torch.tensor([4, 5]), np.array([4, 5]), [torch.tensor(4), torch.tensor(5)]):
        expected = importance(model, [([4, 5], None)], response_tokens=2, progress=False)
        assert_same(importance(model, [sample], response_tokens=2, progress=False), expected)


# ---- Interrupted and continued ----


def interrupted(monkeypatch, after):
    """Let gate_gradients be called `after` times, then press Ctrl-C; returns the list of calls."""
    calls = []

    def once_more(*args):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(args)
        return gate_gradients(*args)

    monkeypatch.setattr(scores, "gate_gradients", once_more)
    return calls


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupted_run_continues_where_it_was(model, prompts, tmp_path, monkeypatch, after):
    options = {"batch_size": 2, "branches": True, "response_tokens": 4, "progress": False}
    expected = importance(model, prompts, **options)
    path = tmp_path / "run.scores"
    interrupted(monkeypatch, after)
    with pytest.raises(KeyboardInterrupt):
        importance(model, prompts, resume=path, **options)
    assert len(load_file(path)["scores"]) == 2 * after
    calls = interrupted(monkeypatch, 3 - after)  # no more than what is left
    assert_same(importance(model, prompts, resume=path, **options), expected)
    assert len(calls) == 3 - after
    interrupted(monkeypatch, 0)
    assert_same(importance(model, prompts, resume=path, **options), expected)  # nothing is left to do
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_record_of_before(model, prompts, tmp_path, monkeypatch):
    path = tmp_path / "run.scores"
    options = {"batch_size": 1, "response_tokens": 2, "progress": False}
    expected = importance(model, prompts, **options)
    real, left = os.replace, [3]

    def full_disk(*args):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(InputError, match="run.scores .No space left"):
        importance(model, prompts, resume=path, **options)
    monkeypatch.undo()
    assert len(load_file(path)["scores"]) == 2
    assert list(tmp_path.iterdir()) == [path]
    assert_same(importance(model, prompts, resume=path, **options), expected)


def exact(seed=0, dtype=torch.float32, **sizes):
    """A model whose weights are the same in float32 and bfloat16."""
    config = tiny_config(**sizes)
    return pop.Model(random_model(config, seed).bfloat16().to(dtype), config)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "another seed;"),
        ({"response_tokens": 3}, "another response_tokens;"),
        ({"branches": True}, "another branches;"),
        ({"samples": [[1, 2], [3, 5]]}, "another samples;"),
        ({"samples": [[1, 2], ([3, 4], [1])]}, "another samples;"),
        ({"model": lambda: exact(seed=1)}, "another model;"),
        ({"model": lambda: exact(norm_eps=1e-4)}, "another model;"),
        ({"model": lambda: exact(dtype=torch.bfloat16)}, "another model;"),
        ({"seed": 1, "branches": True}, "another seed and another branches;"),
    ],
)
def test_the_record_of_another_run_is_refused(tmp_path, change, said):
    model = exact()
    path = tmp_path / "run.scores"
    arguments = {"samples": [[1, 2], [3, 4]], "response_tokens": 2, "resume": path, "progress": False}
    importance(model, **arguments)
    before = path.read_bytes()
    if "model" in change:
        model, change = change["model"](), {}
    with pytest.raises(InputError, match=said):
        importance(model, **{**arguments, **change})
    assert path.read_bytes() == before


def test_a_run_continues_with_another_batch_size(model, prompts, tmp_path, monkeypatch):
    options = {"response_tokens": 3, "progress": False, "resume": tmp_path / "run.scores"}
    interrupted(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        importance(model, prompts, batch_size=3, **options)
    monkeypatch.undo()
    actual = importance(model, prompts, batch_size=1, **options)
    assert actual.num_samples == 5
    assert_close(actual.prefill, importance(model, prompts, response_tokens=3, progress=False).prefill, 1e-5)


def bad_scores(good):
    """Not finite, negative, of more samples, of other layers, and integers."""
    first = torch.zeros_like(good).index_put((torch.tensor(0),), torch.tensor(1.0, dtype=good.dtype)) > 0
    yield from (good.masked_fill(first, value) for value in (math.nan, math.inf, -1.0))
    yield from (torch.cat((good, good)), good[..., 1:], good.long())


@pytest.mark.parametrize("broken", range(13))
def test_a_broken_record_is_refused(model, tmp_path, broken):
    path = tmp_path / "run.scores"
    arguments = {"samples": [[1, 2], [3, 4]], "response_tokens": 2, "resume": path, "progress": False}
    importance(model, **arguments)
    content, good = path.read_bytes(), load_file(path)["scores"]
    with safe_open(path, framework="pt") as file:
        run = file.metadata()
    [
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(content[:-30]),
        lambda: path.write_text("[" * 10**5),
        lambda: path.write_text('{"run": {}, "count": 2, "mean": [], "squares": []}'),  # as earlier versions did
        lambda: save_file({"other": good}, path, metadata=run),
        lambda: save_file({"scores": good}, path),
        lambda: save_file({"scores": good}, path, metadata={"model": run["model"]}),
        *(partial(save_file, {"scores": bad.contiguous()}, path, metadata=run) for bad in bad_scores(good)),
    ][broken]()
    with pytest.raises(InputError, match="run.scores is not the record"):
        importance(model, **arguments)


def test_a_record_in_the_home_folder_is_continued(model, prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = {"response_tokens": 2, "batch_size": 1, "progress": False, "resume": "~/run.scores"}
    expected = importance(model, prompts, **options)
    interrupted(monkeypatch, 0)
    assert_same(importance(model, prompts, **options), expected)


def test_a_record_that_cannot_be_written_is_refused_before_the_work(model, tmp_path, monkeypatch):
    calls = interrupted(monkeypatch, 0)
    with pytest.raises(InputError, match="cannot be written"):
        importance(model, [[1]], resume=tmp_path / "missing" / "run.scores")
    with pytest.raises(InputError, match="is not the record"):
        importance(model, [[1]], resume=tmp_path)
    assert not calls


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([], "samples is empty"),
        ("a text", "samples is a str"),
        (b"bytes", "samples is a bytes"),
        ({"a": 1}, "samples is a dict"),
        (None, "samples is a NoneType"),
        (7, "samples is a int"),
        ([1, 2, 3], "sample 0 cannot be used: tokens must be integers"),
        ([[1], []], "sample 1 cannot be used: the prompt is empty"),
        ([[1], ([], [1])], "sample 1 cannot be used: the prompt is empty"),
        ([[1], ([1], [])], "sample 1 cannot be used: the response is empty"),
        ([[1], ([1], 3)], "sample 1 cannot be used: tokens must be integers"),
        ([[1], ([1], [2], [3])], "sample 1 cannot be used: tokens must be"),
        ([[1.5]], "sample 0 cannot be used: tokens must be integers"),
        ([[67]], "sample 0 cannot be used: token id 67 is not in the vocabulary"),
        ([([1], [-1])], "sample 0 cannot be used: token id -1"),
        ([None], "sample 0 cannot be used"),
        ([[1], "text"], "sample 1 cannot be used: text needs a tokenizer"),
        ([([1] * 500, [1] * 14)], "sample 0 cannot be used: prompt plus response has 513 tokens"),
        ([[1] * 509], "sample 0 cannot be used: prompt plus response has 513 tokens"),
    ],
)
def test_samples_that_cannot_be_used_are_refused(model, samples, said):
    with pytest.raises(pop.PopError, match=said):
        importance(model, samples, response_tokens=5, progress=False)


def test_a_full_context_can_be_used(model):
    result = importance(model, [([1] * 500, [1] * 13), [1] * 508], response_tokens=5, progress=False)
    assert result.num_samples == 2


@pytest.mark.parametrize(
    "options",
    [{"response_tokens": 0}, {"response_tokens": 1.5}, {"batch_size": 0}, {"batch_size": True}, {"seed": -1},
     {"seed": 2**63}, {"seed": None}, {"seed": True}, {"branches": 1}, {"branches": "mlp"}],
)  # fmt: skip
def test_options_out_of_range_are_refused(model, options):
    with pytest.raises(InputError, match=f"{next(iter(options))} is"):
        importance(model, [[1, 2]], **options)


def test_a_model_without_gradients_is_refused(model):
    for other in ("smollm2-135m", model.module, None):
        with pytest.raises(InputError, match=f"the model is a {type(other).__name__}; load one"):
            importance(other, [[1]])
    with torch.inference_mode():
        module = random_model(tiny_config())
    with pytest.raises(InputError, match="torch.inference_mode"):
        importance(pop.Model(module, tiny_config()), [[1]])


def test_numbers_that_overflow_are_refused(samples, prompts):
    module = random_model(tiny_config())
    module.layers[3].mlp.down_proj.weight[0, 0] = math.inf
    model = pop.Model(module, tiny_config())
    with pytest.raises(InputError, match="gradients of the gates"):
        importance(model, samples, progress=False)
    with pytest.raises(InputError, match="logits"):
        importance(model, prompts, progress=False)


def test_progress_is_shown_where_tqdm_is(model, capsys, monkeypatch):
    pytest.importorskip("tqdm")
    importance(model, [[1], [2], [3]], batch_size=2, response_tokens=1)
    assert "3/3" in capsys.readouterr().err
    importance(model, [[1]], response_tokens=1, progress=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    importance(model, [[1]], response_tokens=1)
    assert capsys.readouterr() == ("", "")
