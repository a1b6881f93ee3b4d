"""`pop.importance` and `pop.Importance`: scores, samples, plans made from scores, files, and figures."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.gated_loss import assert_close, slopes
from support.tiny import random_model, tiny_config, write_checkpoint
from support.tiny_chat import write_chat_checkpoint

import pop
from pop import InputError, PlanError
from pop.calibration import importance as importance_file
from pop.calibration.importance import SCORES, Importance, importance


def assert_same(actual, expected):
    """Two Importances, bit for bit."""
    assert actual.num_samples == expected.num_samples
    for name in SCORES:
        assert torch.equal(getattr(actual, name).nan_to_num(-1), getattr(expected, name).nan_to_num(-1)), name


def test_scores_are_mean_squared_slopes_with_their_standard_errors(model, samples):
    samples = samples[1:]
    result = importance(model, samples, batch_size=3, progress=False)
    squares = torch.stack([slopes(model, *pair) for pair in samples]).square()  # [n, 2, L]
    errors = squares.std(0) / len(samples) ** 0.5
    for stage, name in enumerate(("prefill", "decode")):
        assert_close(getattr(result, name), squares.mean(0)[stage])
        assert_close(getattr(result, f"{name}_error"), errors[stage])
    assert result.num_samples == len(samples)
    assert result.prefill.dtype == result.decode_error.dtype == torch.float64


def test_bfloat16_gives_the_scores_of_its_weights(samples):
    config = tiny_config(dtype=torch.bfloat16)
    module = random_model(config).bfloat16()
    low = importance(pop.Model(module, config), samples, progress=False)
    high = importance(pop.Model(module.float(), config), samples, progress=False)
    assert_close(low.prefill, high.prefill, 0.1)
    assert_close(low.decode, high.decode, 0.1)


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
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(importance(model, samples, progress=False), expected)
    module.model.norm.weight.data.fill_(math.nan)
    for wrong, numbers in ((samples, "gradients of the gates"), ([[1, 2]], "logits")):
        with pytest.raises(InputError, match=f"the {numbers} are not finite"):
            importance(model, wrong, progress=False)
    assert [parameter.requires_grad for parameter in module.parameters()] == before
    assert all(parameter.grad is None for parameter in module.parameters())


def test_sampling_depends_on_the_seed_and_the_sample_not_on_the_batch(model, prompts, notes):
    batches = notes(importance_file, "gate_gradients", lambda model, samples: [one.response for one in samples])

    def responses(batch_size, seed=0, prompts=prompts):
        batches.clear()
        importance(model, prompts, batch_size=batch_size, response_tokens=9, seed=seed, progress=False)
        return [response for batch in batches for response in batch]

    expected = responses(8)
    assert [len(response) for response in expected] == [9] * 5
    for batch_size in (1, 2, 3):
        assert responses(batch_size) == expected
    assert responses(8, seed=1) != expected
    same = responses(8, prompts=[[1, 2, 3]] * 3)
    assert same[0] != same[1] != same[2]
    mixed = [prompts[0], (prompts[1], [4, 4]), prompts[2], prompts[3], prompts[4]]
    assert responses(8, prompts=mixed) == [expected[0], [4, 4], *expected[2:]]
    given = importance(model, list(zip(prompts, expected, strict=True)), progress=False)
    assert_same(importance(model, iter(prompts), response_tokens=9, progress=False), given)


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


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([], "samples is empty"),
        ("a text", "samples is a str"),
        ([1, 2, 3], "sample 0 cannot be used: tokens must be integers"),
        ([[1], ([], [1])], "sample 1 cannot be used: the prompt is empty"),
        ([[1], ([1], [])], "sample 1 cannot be used: the response is empty"),
        ([[1], ([1], [2], [3])], "sample 1 cannot be used: tokens must be"),
        ([[67]], "sample 0 cannot be used: token id 67 is not in the vocabulary"),
        ([None], "sample 0 cannot be used"),
        ([[1], "text"], "sample 1 cannot be used: text needs a tokenizer"),
        ([([1] * 500, [1] * 14)], "sample 0 cannot be used: prompt plus response has 513 tokens"),
        ([[1] * 509], "sample 0 cannot be used: prompt plus response has 513 tokens"),
    ],
)
def test_samples_that_cannot_be_used_are_refused(model, samples, said):
    with pytest.raises(pop.PopError, match=said):
        importance(model, samples, response_tokens=5, progress=False)


@pytest.mark.parametrize("options", [{"response_tokens": 0}, {"batch_size": True}, {"seed": -1}, {"seed": 2**63}])
def test_options_out_of_range_are_refused(model, options):
    with pytest.raises(InputError, match=f"{next(iter(options))} is"):
        importance(model, [[1, 2]], **options)


def test_a_model_that_was_loaded_in_inference_mode_has_gradients(tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    with torch.inference_mode():
        model = pop.load(folder, compile=False)
    options = {"response_tokens": 3, "progress": False}
    assert_same(importance(model, [[1, 2]], **options), importance(pop.load(folder), [[1, 2]], **options))


def test_progress_is_shown_where_tqdm_is(model, capsys):
    pytest.importorskip("tqdm")
    importance(model, [[1], [2], [3]], batch_size=2, response_tokens=1)
    assert "3/3" in capsys.readouterr().err
    importance(model, [[1]], response_tokens=1, progress=False)
    assert capsys.readouterr() == ("", "")


def scores(prefill, decode=None, n=4):
    decode = prefill if decode is None else decode
    return Importance(prefill, decode, [0.1] * len(prefill), [0.2] * len(decode), n)


@given(st.lists(st.sampled_from([0.0, 1e-300, 0.5, 1.0, 2.0]) | st.floats(0, 1e10), min_size=1, max_size=9), st.data())
def test_a_plan_takes_what_prefill_needs_least(prefill, data):
    count = data.draw(st.integers(0, len(prefill)))
    plan = scores(prefill, prefill[::-1]).plan(count, full_depth_last=8)
    assert (len(plan.layers), plan.full_depth_last) == (count, 8)
    kept = set(range(len(prefill))) - set(plan.layers)
    for layer in plan.layers:
        for other in kept:
            assert prefill[layer] < prefill[other] or (prefill[layer] == prefill[other] and layer > other)


@pytest.mark.parametrize("count", [-1, 4, 1.0, True, None, "all"])
def test_a_plan_of_a_count_out_of_range_is_refused(count):
    with pytest.raises(PlanError, match="count is"):
        scores([3.0, 1.0, 2.0]).plan(count)


def test_saved_scores_come_back(model, samples, tmp_path):
    path = tmp_path / "scores.json"
    for chosen in (samples, samples[:1]):
        result = importance(model, chosen, progress=False)
        result.save(path)
        assert_same(Importance.load(path), result)
    assert result.prefill_error.isnan().all()  # of one sample
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("wrong", [{"more": 1}, {"prefill": 2.0}, {"prefill": ["1.5", 2.5]}])
def test_a_file_that_holds_no_scores_is_refused(tmp_path, wrong):
    """tests/system/test_files.py has files that are no JSON object."""
    path = tmp_path / "scores.json"
    scores([1.5, 2.5]).save(path)
    assert Importance.load(path).prefill.tolist() == [1.5, 2.5]
    fields = json.loads(path.read_text())
    for content in (fields | wrong, {"prefill": [1.5, 2.5]}):
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match="scores.json"):
            Importance.load(path)
    with pytest.raises(InputError, match="No such file"):
        Importance.load(tmp_path / "missing.json")
