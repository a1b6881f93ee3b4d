"""Virtual gates: their gradients against finite differences of a gated model written in numpy, and all around them."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import random_model, tiny_config, tiny_gemma3_config, tiny_qwen3_config
from support.tiny_chat import write_chat_checkpoint

import pop
from pop import InputError, PlanError, PrunePlan
from pop.calibration.gates import gate_gradients, sample_responses
from pop.calibration.scores import Importance, importance
from pop.models import layers

gates = sys.modules["pop.calibration.gates"]
code = sys.modules["pop.calibration.scores"]  # `pop.importance` is the function
SCORES = ("prefill", "decode", "prefill_error", "decode_error")


@pytest.fixture(scope="module")
def model():
    return pop.Model(random_model(tiny_config()), tiny_config(), plan=0.6)


@pytest.fixture(scope="module")
def samples():
    """Pairs of different lengths."""
    random = np.random.RandomState(1)
    return [(random.randint(0, 67, p).tolist(), random.randint(0, 67, r).tolist())
            for p, r in [(7, 3), (1, 4), (12, 1), (5, 6), (3, 2)]]  # fmt: skip


@pytest.fixture(scope="module")
def prompts(samples):
    return [prompt for prompt, _ in samples]


def split(samples):
    return [prompt for prompt, _ in samples], [response for _, response in samples]


def assert_close(actual, expected, tolerance=1e-4):
    actual, expected = (torch.as_tensor(numbers, dtype=torch.float64) for numbers in (actual, expected))
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def assert_same(actual, expected):
    """Two Importances, bit for bit."""
    assert actual.num_samples == expected.num_samples
    for name in SCORES:
        assert torch.equal(getattr(actual, name).nan_to_num(-1), getattr(expected, name).nan_to_num(-1)), name
    for name in ("attention", "mlp"):
        assert (getattr(actual, name) is None) == (getattr(expected, name) is None)
        if getattr(actual, name) is not None:
            assert_same(getattr(actual, name), getattr(expected, name))


# ---- The gated loss, in numpy and float64, token by token ----


def gated_loss(config, weights, prompt, response, gate):
    """Negative log-likelihood of the response, with gate [2 (attention, MLP), 2 (prefill, decode), L] float64."""
    E, G = config.head_dim, config.num_heads // config.num_kv_heads
    gemma = config.family == "gemma3"
    scale = config.query_pre_attn_scalar**-0.5 if gemma else E**-0.5

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * (gemma + weights[f"{name}.weight"])

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def rotated(x, position, rope):  # [heads, E]
        angle = position / rope.factor / rope.base ** (np.arange(0, E, 2) / E)
        a, b = x[:, : E // 2], x[:, E // 2 :]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], 1)

    tokens = [*prompt, *response]
    memory = [([], []) for _ in config.windows]
    loss = 0.0
    for position, token in enumerate(tokens[:-1]):
        stage = int(position >= len(prompt) - 1)
        h = weights["model.embed_tokens.weight"][token] * (config.hidden_size**0.5 if gemma else 1)
        for index, window in enumerate(config.windows):
            name = f"model.layers.{index}"
            rope = config.rope if window is None else config.local_rope
            x = norm(h, f"{name}.input_layernorm")
            q, k, v = (linear(x, f"{name}.self_attn.{kind}_proj").reshape(-1, E) for kind in "qkv")
            if f"{name}.self_attn.q_norm.weight" in weights:
                q, k = norm(q, f"{name}.self_attn.q_norm"), norm(k, f"{name}.self_attn.k_norm")
            keys, values = memory[index]
            keys.append(rotated(k, position, rope))
            values.append(v)
            seen = slice(max(0, position + 1 - window) if window else 0, None)
            heads = []
            for head, query in enumerate(rotated(q, position, rope)):
                scores = np.array([key[head // G] for key in keys[seen]]) @ query * scale
                weight = np.exp(scores - scores.max())
                heads.append(weight / weight.sum() @ np.array([value[head // G] for value in values[seen]]))
            update = linear(np.concatenate(heads), f"{name}.self_attn.o_proj")
            h = h + gate[0, stage, index] * (norm(update, f"{name}.post_attention_layernorm") if gemma else update)
            x = norm(h, f"{name}.{'pre_feedforward' if gemma else 'post_attention'}_layernorm")
            inner, up = linear(x, f"{name}.mlp.gate_proj"), linear(x, f"{name}.mlp.up_proj")
            if gemma:
                inner = inner / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
            else:
                inner = inner / (1 + np.exp(-inner))
            update = linear(inner * up, f"{name}.mlp.down_proj")
            h = h + gate[1, stage, index] * (norm(update, f"{name}.post_feedforward_layernorm") if gemma else update)
        if stage:
            head = "model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
            logits = norm(h, "model.norm") @ weights[head].T
            loss += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[tokens[position + 1]]
    return loss


def slopes(module, prompt, response, together=False, step=1e-4):
    """Central differences of the gated loss [2, 2, L] by each gate; together: [1, 2, L] by both branches' at once."""
    weights = {name: value.double().numpy() for name, value in module.state_dict().items()}
    shape = (1 if together else 2, 2, module.config.num_layers)
    result = np.zeros(shape)
    for index in np.ndindex(shape):
        change = np.zeros((2, *shape[1:]))
        change[(slice(None), *index[1:]) if together else index] = step
        high, low = (gated_loss(module.config, weights, prompt, response, 1 + sign * change) for sign in (1, -1))
        result[index] = (high - low) / (2 * step)
    return result


@st.composite
def cases(draw):
    """(module, [(prompt, response), ...]) of random sizes."""
    kv_heads = draw(st.integers(1, 2))
    sizes = {
        "vocab_size": 23,
        "hidden_size": draw(st.sampled_from([6, 13])),
        "num_heads": kv_heads * draw(st.integers(1, 2)),
        "num_kv_heads": kv_heads,
        "head_dim": draw(st.sampled_from([2, 6])),
    }
    family = draw(st.sampled_from(["llama", "gemma3", "qwen3"]))
    if family == "gemma3":
        windows = st.lists(st.sampled_from([2, None]), min_size=1, max_size=3)
        config = tiny_gemma3_config(**sizes, windows=tuple(draw(windows)))
    elif family == "qwen3":
        config = tiny_qwen3_config(**sizes, num_layers=draw(st.integers(1, 3)), tie_embeddings=draw(st.booleans()))
    else:
        config = tiny_config(
            **sizes,
            num_layers=draw(st.integers(1, 3)),
            tie_embeddings=draw(st.booleans()),
            attention_bias=draw(st.booleans()),
            mlp_bias=draw(st.booleans()),
        )
    tokens = st.lists(st.integers(0, 22), min_size=1, max_size=6)
    pairs = draw(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=3))
    return random_model(config, seed=draw(st.integers(0, 9))), pairs


@settings(max_examples=settings().max_examples // 2)
@given(cases())
def test_gradients_are_the_slopes_of_the_gated_loss(case):
    module, pairs = case
    expected = np.stack([slopes(module, *pair) for pair in pairs])
    assert_close(gate_gradients(module, *split(pairs)), expected)


def test_scores_are_mean_squared_slopes_with_their_standard_errors(model, samples):
    samples = samples[1:]
    result = importance(model, samples, batch_size=3, branches=True, progress=False)
    both = np.stack([slopes(model.module, *pair, together=True)[0] for pair in samples])  # [n, 2, L]
    apart = np.stack([slopes(model.module, *pair) for pair in samples])  # [n, 2, 2, L]
    for scores, slope in ((result, both), (result.attention, apart[:, 0]), (result.mlp, apart[:, 1])):
        errors = (slope**2).std(axis=0, ddof=1) / np.sqrt(len(samples))
        for stage, (mean, error) in enumerate([("prefill", "prefill_error"), ("decode", "decode_error")]):
            assert_close(getattr(scores, mean), (slope**2).mean(0)[stage])
            assert_close(getattr(scores, error), errors[stage])
        assert scores.num_samples == len(samples)
        assert scores.prefill.dtype == scores.decode_error.dtype == torch.float64


def test_branches_are_scored_on_request_alone(model, samples):
    result = importance(model, samples, progress=False)
    assert result.attention is None and result.mlp is None
    assert_same(result, importance(model, samples, progress=False, branches=False))


# ---- What must be exactly zero ----


def test_a_layer_that_adds_nothing_scores_zero(samples):
    module = random_model(tiny_config())
    for projection in (module.layers[2].self_attn.o_proj, module.layers[2].mlp.down_proj):
        projection.weight.zero_()
    result = importance(pop.Model(module, tiny_config()), samples, branches=True, progress=False)
    for scores in (result, result.attention, result.mlp):
        assert scores.prefill[2] == scores.decode[2] == scores.prefill_error[2] == scores.decode_error[2] == 0
        assert (scores.decode[[0, 1, 3, 4]] > 0).all()


def test_prefill_does_not_need_the_last_layer_nor_where_the_boundary_token_is_alone(model, samples):
    result = importance(model, samples, progress=False)
    assert result.prefill[-1] == 0
    assert (result.prefill[:-1] > 0).all()
    assert (importance(model, [([3], [1, 2])], progress=False).prefill == 0).all()


# ---- Batches, padding, memory ----


@pytest.fixture(scope="module")
def alone(model, samples):
    """Each sample's gradients, run on its own."""
    return [gate_gradients(model.module, *split([sample]))[0] for sample in samples]


@given(chosen=st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_a_sample_does_not_feel_the_others(model, samples, alone, chosen):
    together = gate_gradients(model.module, *split([samples[index] for index in chosen]))
    for row, index in enumerate(chosen):
        assert_close(together[row], alone[index], 1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_scores_do_not_depend_on_batches_or_order(model, samples, batch_size):
    expected = importance(model, samples, progress=False)
    for order in (samples, samples[::-1]):
        actual = importance(model, order, batch_size=batch_size, progress=False)
        for name in SCORES:
            assert_close(getattr(actual, name), getattr(expected, name), 1e-5)


def test_computing_activations_again_changes_no_gradient(model, samples, monkeypatch):
    expected = gate_gradients(model.module, *split(samples))
    monkeypatch.setattr(gates, "_checkpoint", lambda function, *args: function(*args))
    assert torch.equal(gate_gradients(model.module, *split(samples)), expected)


def test_activations_inside_a_layer_are_not_kept(model, samples, monkeypatch):
    def kept():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            gate_gradients(model.module, *split(samples))
        return sum(sizes)

    between = 5 * 12 * 30  # rows, tokens a row, width: what one layer hands to the next
    assert kept() < (5 + 1) * between
    monkeypatch.setattr(gates, "_checkpoint", lambda function, *args: function(*args))
    assert kept() > 5 * (5 + 1) * between


@pytest.mark.parametrize("at_once", [1, 3, 256])
def test_logits_are_made_for_the_response_alone_and_in_pieces(samples, monkeypatch, at_once):
    module = random_model(tiny_config())
    rows, head = [], module.head
    monkeypatch.setattr(module, "head", lambda h: rows.append(h.shape[0]) or head(h))
    monkeypatch.setattr(gates, "LOGITS_AT_ONCE", at_once)
    gradients = gate_gradients(module, *split(samples))
    assert sum(rows) == 2 * sum(len(response) for _, response in samples)  # forward, and again for the backward
    assert max(rows) <= at_once
    monkeypatch.undo()
    assert_close(gradients, gate_gradients(module, *split(samples)), 1e-5)


@pytest.mark.parametrize(
    "config", [tiny_config(), tiny_gemma3_config(), tiny_qwen3_config()], ids=["llama", "gemma3", "qwen3"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_of_one_change_no_bit(config, dtype):
    module = random_model(config).to(dtype)
    h = torch.randn(2, 9, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    ropes = module.rope(torch.arange(9)[None])
    stage = torch.arange(9).expand(2, 9) > 4

    def attend(layer, q, k, v):
        return layers.causal_attention(q, k, v, layer.scale, layer.window)

    for layer in module.layers:
        rope = ropes[layer.window]
        assert torch.equal(gates._gated_layer(layer, h, rope, attend, torch.ones(2, 2, 2), stage), layer(h, rope, attend))


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


def test_parameters_want_no_gradient_meanwhile(samples, monkeypatch):
    module = random_model(tiny_config()).requires_grad_(True)
    seen, head = [], module.head

    def watched(h):
        seen.extend(parameter.requires_grad for parameter in module.parameters())
        return head(h)

    monkeypatch.setattr(module, "head", watched)
    gate_gradients(module, *split(samples))
    assert seen and not any(seen)


# ---- Sampled responses ----


def test_responses_follow_the_full_model_at_temperature_one(model):
    prompt, count = [5, 60, 2, 33], 3000
    first = sample_responses(model, [prompt] * count, [(0, n) for n in range(count)], 1)
    shares = np.bincount([token for (token,) in first], minlength=67) / count
    probs = model.logits([prompt])[0, -1].double().softmax(-1).numpy()
    deviations = (shares - probs) / np.sqrt(probs * (1 - probs) / count)
    assert 0.6 < (deviations**2).mean() < 1.5  # one of 67 expected; standard deviation sqrt(2 / 67)
    pruned = model.prefill([prompt], model.new_cache(1, 9))[0].double().softmax(-1).numpy()  # with the model's plan
    assert ((shares - pruned) ** 2 / (pruned * (1 - pruned) / count)).mean() > 3


def test_a_later_token_follows_the_full_model(model):
    prompt, count = [5, 60, 2, 33], 2000
    pairs = sample_responses(model, [prompt] * count, [(1, n) for n in range(count)], 2)
    second = np.bincount([pair[1] for pair in pairs], minlength=67) / count
    logits = model.logits([[*prompt, first] for first, _ in pairs])[:, -1]
    probs = logits.double().softmax(-1).mean(0).numpy()
    deviations = (second - probs) / np.sqrt(probs / count)
    assert (deviations**2).mean() < 1.5


def test_sampling_depends_on_the_seed_and_the_sample_not_on_the_batch(model, prompts, monkeypatch):
    def responses(batch_size, seed=0, prompts=prompts):
        seen = []
        real = gate_gradients
        with monkeypatch.context() as patched:
            patched.setattr(code, "gate_gradients", lambda *args: seen.extend(args[2]) or real(*args))
            importance(model, prompts, batch_size=batch_size, response_tokens=9, seed=seed, progress=False)
        return seen

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
    sampled = sample_responses(model, prompts, [(3, n) for n in range(5)], 6)
    expected = importance(model, list(zip(prompts, sampled, strict=True)), progress=False)
    assert_same(importance(model, iter(prompts), response_tokens=6, seed=3, progress=False), expected)


def test_an_end_token_ends_a_response_and_is_part_of_it():
    config = tiny_config(eos_ids=tuple(range(0, 67, 4)))
    model = pop.Model(random_model(config), config)
    responses = sample_responses(model, [[5, 6]] * 40, [(0, n) for n in range(40)], 12)
    assert len({len(response) for response in responses}) > 3
    for response in responses:
        assert all(token % 4 for token in response[:-1])
        assert response[-1] % 4 == 0 or len(response) == 12


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

    monkeypatch.setattr(code, "gate_gradients", once_more)
    return calls


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupted_run_goes_on_where_it_was(model, prompts, tmp_path, monkeypatch, after):
    options = {"batch_size": 2, "branches": True, "response_tokens": 4, "progress": False}
    expected = importance(model, prompts, **options)
    path = tmp_path / "run.json"
    interrupted(monkeypatch, after)
    with pytest.raises(KeyboardInterrupt):
        importance(model, prompts, resume=path, **options)
    assert json.loads(path.read_text())["count"] == 2 * after
    calls = interrupted(monkeypatch, 3 - after)  # no more than what is left
    assert_same(importance(model, prompts, resume=path, **options), expected)
    assert len(calls) == 3 - after
    interrupted(monkeypatch, 0)
    assert_same(importance(model, prompts, resume=path, **options), expected)  # nothing is left to do
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_record_of_before(model, prompts, tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    options = {"batch_size": 1, "response_tokens": 2, "progress": False}
    expected = importance(model, prompts, **options)
    real, left = code.os.replace, [3]

    def full_disk(*args):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr(code.os, "replace", full_disk)
    with pytest.raises(InputError, match="run.json cannot be written .No space left"):
        importance(model, prompts, resume=path, **options)
    monkeypatch.undo()
    assert json.loads(path.read_text())["count"] == 2
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
    path = tmp_path / "run.json"
    arguments = {"samples": [[1, 2], [3, 4]], "response_tokens": 2, "resume": path, "progress": False}
    importance(model, **arguments)
    before = path.read_bytes()
    if "model" in change:
        model, change = change["model"](), {}
    with pytest.raises(InputError, match=said):
        importance(model, **{**arguments, **change})
    assert path.read_bytes() == before


def test_a_record_goes_on_with_another_batch_size(model, prompts, tmp_path, monkeypatch):
    options = {"response_tokens": 3, "progress": False, "resume": tmp_path / "run.json"}
    interrupted(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        importance(model, prompts, batch_size=3, **options)
    monkeypatch.undo()
    actual = importance(model, prompts, batch_size=1, **options)
    assert actual.num_samples == 5
    assert_close(actual.prefill, importance(model, prompts, response_tokens=3, progress=False).prefill, 1e-5)


def corrupted(change):
    def apply(text):
        fields = json.loads(text)
        change(fields)
        return json.dumps(fields)

    return apply


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda text: "",
        lambda text: text[:-30],
        lambda text: "[]",
        lambda text: "[" * 10**5,
        corrupted(lambda fields: fields["mean"][0][0].__setitem__(0, math.nan)),
        corrupted(lambda fields: fields["mean"][0][1].__setitem__(2, math.inf)),
        corrupted(lambda fields: fields.pop("mean")),
        corrupted(lambda fields: fields.update(count=3)),
        corrupted(lambda fields: fields.update(count=-1)),
        corrupted(lambda fields: fields.update(count=1.0)),
        corrupted(lambda fields: fields.update(more=1)),
        corrupted(lambda fields: fields.update(run=[])),
        corrupted(lambda fields: fields["run"].pop("seed")),
        corrupted(lambda fields: fields["mean"][0].pop()),
        corrupted(lambda fields: fields["squares"][0][0].__setitem__(0, -1.0)),
        corrupted(lambda fields: fields["squares"][0][0].__setitem__(0, "1")),
    ],
)
def test_a_broken_record_is_refused(model, tmp_path, corrupt):
    path = tmp_path / "run.json"
    arguments = {"samples": [[1, 2], [3, 4]], "response_tokens": 2, "resume": path, "progress": False}
    importance(model, **arguments)
    path.write_text(corrupt(path.read_text()))
    with pytest.raises(InputError, match="is not the record of an importance run"):
        importance(model, **arguments)


def test_a_record_that_cannot_be_written_is_said_before_the_work(model, tmp_path, monkeypatch):
    calls = interrupted(monkeypatch, 0)
    with pytest.raises(InputError, match="cannot be written"):
        importance(model, [[1]], resume=tmp_path / "missing" / "run.json")
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


def test_what_is_no_model_for_gradients_is_refused(model):
    for other in ("smollm2-135m", model.module, None):
        with pytest.raises(InputError, match=f"the model is a {type(other).__name__}; load one"):
            importance(other, [[1]])
    with torch.inference_mode():
        module = random_model(tiny_config())
    with pytest.raises(InputError, match="loaded under torch.inference_mode"):
        importance(pop.Model(module, tiny_config()), [[1]])


def test_numbers_that_overflow_are_said(samples, prompts):
    module = random_model(tiny_config())
    module.layers[3].mlp.down_proj.weight[0, 0] = math.inf
    model = pop.Model(module, tiny_config())
    with pytest.raises(InputError, match="gradients of the gates are not finite"):
        importance(model, samples, progress=False)
    with pytest.raises(InputError, match="logits are not finite"):
        importance(model, prompts, progress=False)


# ---- The result ----


def scores(prefill, decode=None, n=4, **branches):
    decode = prefill if decode is None else decode
    return Importance(prefill, decode, [0.1] * len(prefill), [0.2] * len(decode), n, **branches)


@given(st.lists(st.sampled_from([0.0, 1e-300, 0.5, 1.0, 2.0]) | st.floats(0, 1e10), min_size=1, max_size=9), st.data())
def test_a_plan_takes_what_prefill_needs_least(prefill, data):
    count = data.draw(st.integers(0, len(prefill)))
    plan = scores(prefill, prefill[::-1]).plan(count)
    assert len(plan.layers) == count
    kept = set(range(len(prefill))) - set(plan.layers)
    for layer in plan.layers:
        for other in kept:
            assert prefill[layer] < prefill[other] or (prefill[layer] == prefill[other] and layer > other)


def test_a_plan_takes_the_other_fields_of_a_plan():
    assert scores([3.0, 1.0, 2.0]).plan(2, full_depth_last=8) == PrunePlan((1, 2), full_depth_last=8)


@pytest.mark.parametrize("count", [-1, 4, 1.0, True, None, "all"])
def test_a_plan_of_a_count_out_of_range_is_refused(count):
    with pytest.raises(PlanError, match="count is"):
        scores([3.0, 1.0, 2.0]).plan(count)


def test_saved_scores_come_back(model, samples, tmp_path):
    path = tmp_path / "scores.json"
    for chosen, branches in ((samples, False), (samples, True), (samples[:1], True)):
        result = importance(model, chosen, branches=branches, progress=False)
        result.save(path)
        assert_same(Importance.load(path), result)
    assert result.prefill_error.isnan().all()  # of one sample
    scores([3.0, 1.0], n=np.int64(4)).save(path)
    assert Importance.load(path).num_samples == 4
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda text: "",
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: "{}",
        lambda text: "[" * 10**5,
        lambda text: text.replace("1.5", "NaN"),
        lambda text: text.replace("1.5", "Infinity"),
        lambda text: text.replace("1.5", "1e999"),
        lambda text: text.replace("1.5", "-1.5"),
        lambda text: text.replace("1.5", "null"),
        lambda text: text.replace("1.5", '"1.5"'),
        lambda text: text.replace("1.5", "true"),
        lambda text: text.replace("1.5", "[1.5]"),
        corrupted(lambda fields: fields.pop("decode")),
        corrupted(lambda fields: fields.update(more=1)),
        corrupted(lambda fields: fields.update(prefill=2.0)),
        corrupted(lambda fields: fields.update(prefill=[])),
        corrupted(lambda fields: fields["decode_error"].append(1.0)),
        corrupted(lambda fields: fields.update(num_samples=0)),
        corrupted(lambda fields: fields.update(num_samples=2.5)),
        corrupted(lambda fields: fields.update(num_samples=1)),
        corrupted(lambda fields: fields.update(mlp={})),
        corrupted(lambda fields: fields.update(mlp=[1])),
        corrupted(lambda fields: fields["attention"].update(num_samples=3)),
        corrupted(lambda fields: fields["attention"]["prefill"].append(1.0)),
        corrupted(lambda fields: fields.update(attention={name: [1.0] for name in SCORES} | {"num_samples": 4})),
    ],
)
def test_a_file_that_holds_no_scores_is_refused(tmp_path, corrupt):
    path = tmp_path / "scores.json"
    scores([1.5, 2.5], attention=scores([1.0, 2.0])).save(path)
    assert Importance.load(path).attention.prefill.tolist() == [1.0, 2.0]
    path.write_text(corrupt(path.read_text()))
    with pytest.raises(InputError, match="scores.json does not hold importance scores"):
        Importance.load(path)
    with pytest.raises(InputError, match="No such file"):
        Importance.load(tmp_path / "missing.json")


def test_scores_that_cannot_be_written_are_said(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        scores([1.0]).save(tmp_path / "missing" / "scores.json")


# ---- The figure, the bar ----


@pytest.mark.parametrize("prefill", [[1.0, 1e-5, 0.0], [0.0, 0.0, 0.0]])
def test_the_figure_is_small_and_the_same_every_time(tmp_path, prefill):
    matplotlib = pytest.importorskip("matplotlib")
    settings, result = dict(matplotlib.rcParams), scores(prefill, [0.0, 0.1, 0.2])
    result.plot(tmp_path / "one.svg")
    with matplotlib.rc_context({"lines.linewidth": 7, "svg.fonttype": "none"}):
        result.plot(tmp_path / "two.svg")
    result.plot(tmp_path / "three.PNG")
    drawn = (tmp_path / "one.svg").read_bytes()
    assert drawn == (tmp_path / "two.svg").read_bytes()
    assert drawn.startswith(b"<?xml") and len(drawn) < 100_000
    assert (tmp_path / "three.PNG").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 3
    assert dict(matplotlib.rcParams) == settings


def test_a_figure_of_one_sample_has_no_error_bars(tmp_path):
    pytest.importorskip("matplotlib")
    Importance([1.0, 2.0], [2.0, 1.0], [None, None], [math.nan] * 2, 1).plot(tmp_path / "one.svg")


def test_a_figure_that_cannot_be_drawn_is_said(tmp_path, monkeypatch):
    for name in ("plot", "plot.pdf", ".svg"):
        with pytest.raises(InputError, match="ends in .svg or .png"):
            scores([1.0]).plot(tmp_path / name)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(pop.MissingExtra, match="needs the package matplotlib"):
            scores([1.0]).plot(tmp_path / "plot.svg")
    pytest.importorskip("matplotlib")
    with pytest.raises(InputError, match="cannot be written"):
        scores([1.0]).plot(tmp_path / "missing" / "plot.svg")


def test_progress_is_shown_where_tqdm_is(model, capsys, monkeypatch):
    pytest.importorskip("tqdm")
    importance(model, [[1], [2], [3]], batch_size=2, response_tokens=1)
    assert "3/3" in capsys.readouterr().err
    importance(model, [[1]], response_tokens=1, progress=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    importance(model, [[1]], response_tokens=1)
    assert capsys.readouterr() == ("", "")
