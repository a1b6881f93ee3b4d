"""Contenders and baselines compute what their papers say: naive computations with masks and projections."""

import numpy as np
import pytest
import torch
from support.naive_fit import recorded
from support.tiny import random_model, tiny_config, tiny_gemma3_config

import pop
from pop.models.layers import causal_attention
from pop.pruning import reference
from pop.pruning.corrections import Corrections
from tools.evaluate import baselines, controls
from tools.evaluate.contender import Contender
from tools.evaluate.selection import BASELINES
from tools.evaluate.slicegpt import principal_bases, slicegpt

PROMPT = np.random.default_rng(1).integers(67, size=19).tolist()
CONTINUATION = np.random.default_rng(2).integers(67, size=6).tolist()
N = len(PROMPT)
TOKENS = torch.tensor(PROMPT + CONTINUATION)
WINDOWS = [torch.from_numpy(np.random.default_rng(n).integers(67, size=40)) for n in range(3)]


def tiny_model(**overrides) -> pop.Model:
    config = tiny_config(**overrides)
    return pop.Model(random_model(config, seed=3), config)


def tiny_windows() -> pop.Model:
    """A model whose prompts exceed its windows of 5 tokens, and the rings in which its caches keep them."""
    config = tiny_gemma3_config()
    return pop.Model(random_model(config, seed=3), config, chunk_size=8)


def predicted(logits: torch.Tensor) -> torch.Tensor:
    """Of logits [T, V] at every position those that predict the continuation."""
    return logits[N - 1 : -1]


def naive_forward(module, tokens, skips, visible) -> torch.Tensor:
    """Logits [T, V]. skips(layer) [T]: the tokens that skip it. visible(layer) [T, T]: which token attends which."""
    h = module.embed(tokens[None])[0]
    rope = module.rope(torch.arange(len(tokens))[None])
    for index, layer in enumerate(module.layers):
        q, k, v = (x[0] for x in layer.queries_keys_values(h[None], rope[layer.window]))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("the,she->hts", q, k) * layer.scale
        weights = scores.masked_fill(~visible(index), -torch.inf).softmax(-1)
        attended = torch.einsum("hts,she->the", weights, v).flatten(1)
        updated = layer(h[None], rope[layer.window], lambda *_: attended[None])[0]  # noqa: B023
        h = torch.where(skips(index)[:, None], h, updated)
    return module.head(h)


def test_a_plan_reads_the_prompt_as_the_reference_does():
    model = tiny_model()
    plan = pop.PrunePlan((1, 3, 4), full_depth_last=2, full_depth_first=1)
    contender = Contender("plan", model, plan)
    full_depth = reference.full_depth_tokens(N, len(TOKENS), plan)
    logits, _ = reference.forward(model.module, TOKENS, full_depth, plan)
    torch.testing.assert_close(contender.logits(PROMPT, CONTINUATION), predicted(logits), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(contender.logits(PROMPT, CONTINUATION[:1]), predicted(logits)[:1], rtol=1e-4, atol=1e-4)
    assert contender.generate(PROMPT, 7) == reference.generate(model.module, torch.tensor(PROMPT), plan, 7)


def test_generation_ends_with_an_end_token_and_where_it_is_told_to():
    free = Contender("full", tiny_model(), pop.PrunePlan.none()).generate(PROMPT, 8)
    end = free[3]
    first = free.index(end) + 1
    ending = Contender("full", tiny_model(eos_ids=(end,)), pop.PrunePlan.none())
    assert ending.generate(PROMPT, 8) == free[:first]
    free_running = Contender("full", tiny_model(), pop.PrunePlan.none())
    assert free_running.generate(PROMPT, 8, until=lambda tokens: len(tokens) == 2) == free[:2]


# ---- Layers removed ----


def test_block_influence_is_one_minus_the_mean_cosine():
    model = tiny_model()
    inputs, outputs = [[] for _ in range(5)], [[] for _ in range(5)]
    for window in WINDOWS:
        h = model.module.embed(window[None])
        rope = model.module.rope(torch.arange(len(window))[None])
        for index, layer in enumerate(model.module.layers):
            inputs[index].append(h[0].numpy())
            q, k, v = layer.queries_keys_values(h, rope[layer.window])
            attended = causal_attention(q, k, v, layer.scale, layer.window)
            h = layer(h, rope[layer.window], lambda *_: attended)  # noqa: B023
            outputs[index].append(h[0].numpy())
    for index, value in enumerate(baselines.block_influence(model, WINDOWS).tolist()):
        x, y = np.concatenate(inputs[index]), np.concatenate(outputs[index])
        cosines = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
        assert value == pytest.approx(1 - cosines.mean(), abs=1e-5)


def test_shortgpt_removes_the_layers_that_do_nothing_first():
    model = tiny_model()
    for index in (1, 3):
        layer = model.module.layers[index]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    contender = baselines.shortgpt(model, 0.4, WINDOWS)
    assert len(contender.model.module.layers) == contender.model.config.num_layers == 3
    torch.testing.assert_close(
        contender.logits(PROMPT, CONTINUATION), predicted(model.logits(TOKENS[None])[0]), rtol=1e-4, atol=1e-4
    )


def test_the_deepest_layers_dropped_are_dropped_for_every_token():
    model = tiny_model()
    contender = baselines.deepest_dropped(model, 0.4)
    no_one = torch.zeros(len(TOKENS), dtype=torch.bool)
    logits, _ = reference.forward(model.module, TOKENS, no_one, pop.PrunePlan((3, 4)))
    torch.testing.assert_close(contender.logits(PROMPT, CONTINUATION), predicted(logits), rtol=1e-4, atol=1e-4)
    assert contender.flops(64) < Contender("full", model, pop.PrunePlan.none()).flops(64)


def test_removing_layers_shares_the_weights_and_leaves_the_model_as_it_was():
    model = tiny_model()
    before = model.logits(TOKENS[None])
    smaller = baselines.without_layers(model, (0, 2))
    assert len(model.module.layers) == 5 and torch.equal(model.logits(TOKENS[None]), before)
    kept = [model.module.layers[index] for index in (1, 3, 4)]
    for mine, theirs in zip(smaller.module.layers, kept, strict=True):
        assert mine.mlp.up_proj.weight is theirs.mlp.up_proj.weight


# ---- SliceGPT ----

VARIANTS = [{}, {"tie_embeddings": True, "attention_bias": True, "mlp_bias": True}]


@pytest.mark.parametrize("overrides", VARIANTS)
def test_slicegpt_that_cuts_nothing_is_the_model(overrides):
    model = tiny_model(**overrides)
    contender = slicegpt(model, 0.0, WINDOWS)
    full = model.logits(TOKENS[None])[0]
    torch.testing.assert_close(contender.logits(PROMPT, CONTINUATION), predicted(full), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("overrides", VARIANTS)
def test_slicegpt_is_the_model_with_every_block_input_projected(overrides):
    """At full width: h, read by the model's own norms and weights, is projected onto the basis before each block."""
    model = tiny_model(**overrides)
    contender = slicegpt(model, 0.25, WINDOWS)
    bases = principal_bases(model, 23, WINDOWS)
    h = model.module.embed(TOKENS[None])
    rope = model.module.rope(torch.arange(len(TOKENS))[None])
    for index, layer in enumerate(model.module.layers):
        h = h @ bases[2 * index] @ bases[2 * index].T
        q, k, v = layer.queries_keys_values(h, rope[layer.window])
        h = h + layer.attention_update(causal_attention(q, k, v, layer.scale, layer.window))
        h = h @ bases[2 * index + 1] @ bases[2 * index + 1].T
        h = h + layer.mlp_update(h)
    naive = predicted(model.module.head(h[0]))
    torch.testing.assert_close(contender.logits(PROMPT, CONTINUATION), naive, rtol=1e-4, atol=1e-4)
    assert (naive - predicted(model.logits(TOKENS[None])[0])).abs().max() > 0.1
    assert contender.flops(64) is None  # cost.py counts layers, not widths
    first = contender.model.module.layers[0].layer
    assert first.mlp.gate_proj.weight.shape == (44, 23) and first.self_attn.o_proj.weight.shape == (23, 60)


def test_the_bases_are_orthonormal_and_the_first_is_optimal():
    model = tiny_model()
    bases = principal_bases(model, 23, WINDOWS)
    assert len(bases) == 11
    for basis in bases[:-1]:
        torch.testing.assert_close(basis.T @ basis, torch.eye(23), rtol=0, atol=1e-5)
    x = torch.cat([model.module.embed(window) for window in WINDOWS]).double().numpy()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    kept = np.square(x @ bases[0].double().numpy()).sum()
    assert kept == pytest.approx(np.square(np.linalg.svd(x, compute_uv=False)[:23]).sum(), rel=1e-6)


def test_each_basis_is_fitted_to_the_states_that_earlier_cuts_leave():
    """No basis of its width keeps more of the states that enter its block from the cut blocks below it."""
    model = tiny_model()
    bases = principal_bases(model, 23, WINDOWS)
    entered = [[] for _ in bases[:-1]]
    for window in WINDOWS:
        h, rope = model.module.embed(window[None]), model.module.rope(torch.arange(len(window))[None])
        for index, layer in enumerate(model.module.layers):
            entered[2 * index].append(h[0])
            h = h @ bases[2 * index] @ bases[2 * index].T
            q, k, v = layer.queries_keys_values(h, rope[layer.window])
            h = h + layer.attention_update(causal_attention(q, k, v, layer.scale, layer.window))
            entered[2 * index + 1].append(h[0])
            h = h @ bases[2 * index + 1] @ bases[2 * index + 1].T
            h = h + layer.mlp_update(h)
    for basis, states in zip(bases, entered, strict=False):
        x = torch.cat(states).double().numpy()
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        kept = np.square(x @ basis.double().numpy()).sum()
        assert kept == pytest.approx(np.square(np.linalg.svd(x, compute_uv=False)[:23]).sum(), rel=1e-5)


def test_slicegpt_refuses_what_it_cannot_cut(monkeypatch):
    model = tiny_model()
    with pytest.raises(pop.InputError, match="slicegpt's fraction is 1.0"):
        slicegpt(model, 1.0, WINDOWS)
    monkeypatch.setattr(type(model.config), "family", "gemma3")
    with pytest.raises(pop.UnsupportedError, match="gemma3"):
        slicegpt(model, 0.25, WINDOWS)


# ---- POP with a part taken out ----


@pytest.mark.parametrize("layers", [(3, 4), (1, 2, 4), (0, 1, 2, 3, 4), ()])
@pytest.mark.parametrize("kind", [baselines.NoKV, baselines.FirstKV])
@pytest.mark.parametrize("windows", [False, True])
def test_without_kv_pruned_layers_attend_nothing_before_the_boundary_but_the_first_token(layers, kind, windows):
    model = tiny_windows() if windows else tiny_model()
    contender = kind("no-kv", model, pop.PrunePlan(layers))
    position = torch.arange(len(TOKENS))
    without = (position < N - 1) & (position >= kind.first)

    def visible(layer):  # a token always attends itself: the row of one that skips the layer is not used
        window = model.module.layers[layer].window or len(TOKENS)
        causal = (position[:, None] >= position) & (position[:, None] - position < window)
        hidden = without if layer in layers else torch.zeros(len(TOKENS), dtype=torch.bool)
        return causal & ~hidden | torch.eye(len(TOKENS), dtype=torch.bool)

    naive = naive_forward(model.module, TOKENS, lambda layer: without & (layer in layers), visible)
    torch.testing.assert_close(contender.logits(PROMPT, CONTINUATION), predicted(naive), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", [(3, 4), (1, 2, 4), ()])
@pytest.mark.parametrize("windows", [False, True])
def test_without_boundary_handling_the_whole_prompt_is_pruned(layers, windows):
    model = tiny_windows() if windows else tiny_model()
    contender = baselines.NoBoundary("no-boundary", model, pop.PrunePlan(layers))
    naive, _ = reference.forward(model.module, TOKENS, torch.arange(len(TOKENS)) >= N, pop.PrunePlan(layers))
    torch.testing.assert_close(contender.logits(PROMPT, CONTINUATION), predicted(naive), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [controls.constant_kv, controls.embedding_kv])
@pytest.mark.parametrize("windows", [False, True])
def test_controls_are_plans_whose_codes_are_the_embedding(make, windows):
    """With all layers pruned, the embedding is the state that enters the group. So the engine can run the same plan."""
    model = tiny_windows() if windows else tiny_model()
    layers = tuple(range(5))
    contender = make(model, 1.0, WINDOWS)
    D = model.config.hidden_size
    weight = []
    for index in layers:
        W = contender.weights[index][0].T  # [2 * K * E, D]
        assert bool(W.any()) == (make is controls.embedding_kv)
        # A projection is linear in the normalised state, which is e_i sqrt(D) for a multiple of a unit vector e_i.
        own = torch.cat(model.module.layers[index].projected(1e4 * torch.eye(D)[None]), dim=-1)[0].T / D**0.5
        weight.append((W - own).unflatten(0, (2, -1)))
    corrections = Corrections(
        layers,
        weight=torch.stack(weight),
        bias=torch.stack([contender.weights[index][1].unflatten(0, (2, -1)) for index in layers]),
        shared=torch.eye(D, 2 * D)[None],  # the code of a token is its own state
        fingerprint=model.fingerprint,
    )
    refit = pop.PrunePlan(layers, full_depth_first=1, corrections=corrections)
    expected = Contender("plan", model, refit).logits(PROMPT, CONTINUATION)
    torch.testing.assert_close(contender.logits(PROMPT, CONTINUATION), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(pop.InputError, match="at least 2 tokens"):
        contender.logits(PROMPT[:1], [1])


def test_controls_are_fitted_to_the_full_models_keys_and_values():
    """By lstsq with an intercept that is not pulled. Constant K and V are the means."""
    model = tiny_model()
    constant, embedding = (make(model, 0.4, WINDOWS) for make in (controls.constant_kv, controls.embedding_kv))
    found = [recorded(model.module, (0, 3, 4), model.module, window[None]) for window in WINDOWS]
    h = torch.cat([f[0, "input_layernorm"][0][1:] for f in found]).double()
    X = (h / (h.square().mean(-1, keepdim=True) + model.config.norm_eps).sqrt()).numpy()
    n, D = X.shape
    pull = np.concatenate([np.sqrt(controls.RIDGE * n) * np.eye(D), np.zeros((D, 1))], axis=1)
    rows = np.concatenate([np.concatenate([X, np.ones((n, 1))], axis=1), pull])
    assert list(constant.weights) == list(embedding.weights) == [3, 4]
    for index in (3, 4):
        names = ("self_attn.k_proj", "self_attn.v_proj")
        Y = np.concatenate([np.concatenate([f[index, name][1][1:] for f in found]) for name in names], axis=1)
        solution = np.linalg.lstsq(rows, np.concatenate([Y, np.zeros((D, Y.shape[1]))]), rcond=None)[0]
        W, b = embedding.weights[index]
        np.testing.assert_allclose(W, solution[:-1], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(b, solution[-1], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(constant.weights[index][1], Y.mean(0), rtol=1e-3, atol=1e-5)


def test_every_baseline_can_be_made_by_its_name_and_generates():
    model = tiny_model()
    for name, make in BASELINES.items():
        contender = make(model, 0.25, WINDOWS)
        assert contender.name == name
        token = contender.logits(PROMPT, [0])[0].argmax()
        assert contender.generate(PROMPT, 3)[0] == token


# ---- Calibration text ----


def test_calibration_windows_hold_the_texts_in_order_or_an_even_share_of_them():
    """Where a text begins with BOS, so do its windows. As in calibration, a rest of less than 16 tokens is left out."""
    model = tiny_model(bos_id=66)
    windows = baselines.calibration_windows(model, [list(range(50)), list(range(15)), [66, *range(60)]], length=20)
    assert [window.tolist() for window in windows] == [
        list(range(20)),
        list(range(20, 40)),
        [66, *range(19)],
        [66, *range(19, 38)],
        [66, *range(38, 57)],
    ]
    few = baselines.calibration_windows(model, [list(range(66)) * 3], length=33, most=3)
    assert [int(window[0]) for window in few] == [0, 0, 0]
    few = baselines.calibration_windows(model, [list(range(60))], length=20, most=2)
    assert [int(window[0]) for window in few] == [0, 40]
    short = pop.Model(model.module, model.config, max_seq_len=16)
    assert [len(window) for window in baselines.calibration_windows(short, [list(range(40))])] == [16, 16]
    with pytest.raises(pop.InputError, match="calibration text"):
        baselines.calibration_windows(model, [list(range(15))])
