"""Contenders and baselines compute what their papers say: naive computations with masks and projections."""

from functools import partial

import numpy as np
import pytest
import torch
from support.naive_fit import recorded
from support.tiny import random_model, tiny_config, tiny_gemma3_config

import pop
from pop.models.layers import causal_attention
from pop.pruning import reference
from pop.pruning.corrections import Corrections
from pop.pruning.cost import prefill_flops
from tools.evaluate import attended, baselines, controls
from tools.evaluate.contender import Contender
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


@pytest.fixture(params=[tiny_model, tiny_windows], ids=["no windows", "windows"])
def model(request):
    return request.param()


def assert_predicts(contender, logits: torch.Tensor) -> None:
    """Of logits [T, V] at every position, those that predict the continuation are the contender's."""
    found = contender.logits(PROMPT, CONTINUATION)
    torch.testing.assert_close(found, logits[N - 1 : -1], rtol=1e-4, atol=1e-4)


def block_inputs(module, tokens, bases=None) -> list[torch.Tensor]:
    """The states [T, D] that enter each attention and each MLP, and those that leave the last.

    With bases, h is projected onto one before each of these blocks. The states are those before the projection.
    """
    bases = bases or [torch.eye(module.config.hidden_size)] * 2 * module.config.num_layers
    h = module.embed(tokens[None])
    rope = module.rope(torch.arange(len(tokens))[None])
    entered = []
    for index, layer in enumerate(module.layers):
        entered.append(h[0])
        h = h @ bases[2 * index] @ bases[2 * index].T
        q, k, v = layer.queries_keys_values(h, rope[layer.window])
        h = h + layer.attention_update(causal_attention(q, k, v, layer.scale, layer.window))
        entered.append(h[0])
        h = h @ bases[2 * index + 1] @ bases[2 * index + 1].T
        h = h + layer.mlp_update(h)
    return [*entered, h[0]]


def entered_by_windows(model, bases=None):
    """The states of block_inputs, of all windows together."""
    return [torch.cat(parts) for parts in zip(*(block_inputs(model.module, w, bases) for w in WINDOWS), strict=True)]


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


ITSELF = torch.eye(len(TOKENS), dtype=torch.bool)  # so that the rows of tokens that skip a layer, unused, are finite


def causal(window: int | None) -> torch.Tensor:
    """[T, T] bool: which token attends to which."""
    distance = torch.arange(len(TOKENS))[:, None] - torch.arange(len(TOKENS))
    return (distance >= 0) & (distance < (window or len(TOKENS)))


def test_an_answer_is_the_references():
    model = tiny_model()
    plan = pop.PrunePlan((1, 3, 4), full_depth_last=2, full_depth_first=1)
    expected = reference.generate(model.module, torch.tensor(PROMPT), plan, 7)
    assert Contender("plan", model, plan).generate(PROMPT, 7) == expected


def test_generation_ends_with_an_end_token_and_where_it_is_told_to():
    def generate(**options):
        return Contender("full", tiny_model(eos_ids=eos_ids), pop.PrunePlan.none()).generate(PROMPT, 8, **options)

    eos_ids = ()
    free = generate()
    assert generate(until=lambda tokens: len(tokens) == 2) == free[:2]
    eos_ids = (free[3],)
    assert generate() == free[: free.index(free[3]) + 1]


# ---- Layers removed ----


def test_block_influence_is_one_minus_the_mean_cosine():
    model = tiny_model()
    states = entered_by_windows(model)[::2]
    influence = baselines.block_influence(model, WINDOWS).tolist()
    for value, x, y in zip(influence, states[:-1], states[1:], strict=True):
        assert value == pytest.approx(1 - torch.cosine_similarity(x, y).mean().item(), abs=1e-5)


def test_shortgpt_removes_the_layers_that_do_nothing_first():
    model = tiny_model()
    for index in (1, 3):
        layer = model.module.layers[index]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    contender = baselines.shortgpt(model, 0.4, WINDOWS)
    assert len(contender.model.module.layers) == contender.model.config.num_layers == 3
    assert_predicts(contender, model.logits(TOKENS[None])[0])


def test_the_deepest_layers_dropped_are_dropped_for_every_token():
    """The others share their weights with the model, which stays as it was."""
    model = tiny_model()
    before = model.logits(TOKENS[None])
    contender = baselines.deepest_dropped(model, 0.4)
    no_one = torch.zeros(len(TOKENS), dtype=torch.bool)
    assert_predicts(contender, reference.forward(model.module, TOKENS, no_one, pop.PrunePlan((3, 4)))[0])
    assert contender.flops(64) < Contender("full", model, pop.PrunePlan.none()).flops(64)
    assert torch.equal(model.logits(TOKENS[None]), before)
    for mine, theirs in zip(contender.model.module.layers, model.module.layers[:3], strict=True):
        assert mine.mlp.up_proj.weight is theirs.mlp.up_proj.weight


# ---- SliceGPT ----


@pytest.mark.parametrize("overrides", [{}, {"tie_embeddings": True, "attention_bias": True, "mlp_bias": True}])
def test_slicegpt_is_the_model_with_every_block_input_projected(overrides):
    model = tiny_model(**overrides)
    full = model.logits(TOKENS[None])[0]
    assert_predicts(slicegpt(model, 0.0, WINDOWS), full)
    contender = slicegpt(model, 0.25, WINDOWS)
    naive = model.module.head(block_inputs(model.module, TOKENS, principal_bases(model, 23, WINDOWS))[-1])
    assert_predicts(contender, naive)
    assert (naive - full)[N - 1 : -1].abs().max() > 0.1
    assert contender.flops(64) is None  # cost.py counts layers, not widths
    first = contender.model.module.layers[0].layer
    assert first.mlp.gate_proj.weight.shape == (44, 23) and first.self_attn.o_proj.weight.shape == (23, 60)


def test_each_basis_is_fitted_to_the_states_that_earlier_cuts_leave():
    """No basis of its width keeps more of the states that enter its block from the cut blocks below it."""
    model = tiny_model()
    bases = principal_bases(model, 23, WINDOWS)
    assert len(bases) == 11
    for basis, states in zip(bases[:-1], entered_by_windows(model, bases)[:-1], strict=True):
        torch.testing.assert_close(basis.T @ basis, torch.eye(23), rtol=0, atol=1e-5)
        x = torch.nn.functional.normalize(states.double())
        kept = (x @ basis.double()).square().sum().item()
        assert kept == pytest.approx(torch.linalg.svdvals(x)[:23].square().sum().item(), rel=1e-5)


def test_slicegpt_refuses_what_it_cannot_cut(monkeypatch):
    model = tiny_model()
    with pytest.raises(pop.InputError, match="slicegpt's fraction is 1.0"):
        slicegpt(model, 1.0, WINDOWS)
    monkeypatch.setattr(type(model.config), "family", "gemma3")
    with pytest.raises(pop.UnsupportedError, match="gemma3"):
        slicegpt(model, 0.25, WINDOWS)


# ---- POP with a part taken out ----


@pytest.mark.parametrize("layers", [(1, 2, 4), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("kind", [baselines.NoKV, baselines.FirstKV])
def test_without_kv_pruned_layers_attend_nothing_before_the_boundary_but_the_first_token(layers, kind, model):
    contender = kind("no-kv", model, pop.PrunePlan(layers))
    position = torch.arange(len(TOKENS))
    without = (position < N - 1) & (position >= kind.first)

    def visible(layer):
        return causal(model.module.layers[layer].window) & ~(without & (layer in layers)) | ITSELF

    naive = naive_forward(model.module, TOKENS, lambda layer: without & (layer in layers), visible)
    assert_predicts(contender, naive)


# ---- Tokens that the prompt's end attends to ----


def received(module, layer: int) -> torch.Tensor:
    """What each token but the last eight gets from these in a layer of the full model, by K/V heads: [K, N - 8]."""
    h = block_inputs(module, TOKENS[:N])[2 * layer][None]
    rope = module.rope(torch.arange(N)[None])
    q, k, _ = module.layers[layer].queries_keys_values(h, rope[module.layers[layer].window])
    rows = []
    for head in range(k.shape[2]):
        row = torch.zeros(N - 8)
        for query_head in range(q.shape[2] * head // k.shape[2], q.shape[2] * (head + 1) // k.shape[2]):
            for query in range(N - 8, N):
                products = k[0, : query + 1, head] @ q[0, query, query_head] * module.layers[layer].scale
                row += products.softmax(0)[: N - 8]
        padded = torch.cat((torch.zeros(3), row, torch.zeros(3)))
        rows.append(torch.stack([padded[token : token + 7].mean() for token in range(N - 8)]))
    scores = torch.stack(rows)
    torch.testing.assert_close(attended.scores(q, k, module.layers[layer].scale), scores, rtol=1e-4, atol=1e-6)
    return scores


def with_most(received: torch.Tensor, count: int) -> torch.Tensor:
    """[N] bool: the prompt's last eight tokens, and the others that got most, `count` together."""
    is_kept = torch.arange(N) >= N - 8
    is_kept[received.argsort(descending=True)[: count - 8]] = True
    return is_kept


@pytest.mark.parametrize(("make", "first"), [(tiny_model, 3), (tiny_windows, 4)])
def test_fastkv_runs_its_deepest_layers_for_the_tokens_that_a_layer_selects(make, first):
    """Of 5 layers, those from `first` on. Layer 2 selects. With windows, layer 3 has one."""
    model = make()
    layers = model.module.layers
    selecting = 2
    assert layers[selecting].window is None and all(layer.window for layer in layers[selecting + 1 : first])
    contender = attended.fastkv(model, (5 - first) / 5, share=0.6)
    selected = with_most(received(model.module, selecting).sum(0), int(0.6 * N))
    assert 8 < selected.sum() < N
    absent = torch.cat((~selected, torch.zeros(len(CONTINUATION), dtype=torch.bool)))

    def visible(layer):
        return causal(layers[layer].window) & ~(absent & (layer >= first)) | ITSELF

    assert_predicts(contender, naive_forward(model.module, TOKENS, lambda layer: absent & (layer >= first), visible))


def test_snapkv_drops_what_the_prompts_end_does_not_attend_to_for_each_head(model):
    """Each K/V head hides its own tokens from the tokens after the prompt. Layers with a window hide none."""
    module = model.module
    contender = attended.snapkv(model, 0.3)
    kept = [torch.stack([with_most(row, int(0.7 * N)) for row in received(module, layer)]) for layer in range(5)]
    kept = [heads | bool(layer.window) for heads, layer in zip(kept, module.layers, strict=True)]
    assert any((heads[0] != heads[1]).any() for heads in kept)

    def visible(layer):  # [H, T, T]
        hidden = torch.nn.functional.pad(~kept[layer], (0, len(CONTINUATION)))  # [K, T]
        hidden = hidden.repeat_interleave(model.config.num_heads // hidden.shape[0], dim=0)  # [H, T]
        after = torch.arange(len(TOKENS)) >= N
        return causal(module.layers[layer].window) & ~(hidden[:, None] & after[:, None])

    assert_predicts(contender, naive_forward(module, TOKENS, lambda layer: torch.zeros(len(TOKENS)).bool(), visible))


def test_the_flops_of_fastkv_are_those_of_two_models():
    """One of the first layers, which runs all tokens, and one of the others, without logits, which runs some."""
    model = tiny_model()
    full, first = (tiny_model(num_layers=count) for count in (5, 3))
    flops = [prefill_flops(one.config, 100, pop.PrunePlan.none()) for one in (full, first)]
    some = [prefill_flops(one.config, 20, pop.PrunePlan.none()) for one in (full, first)]
    scores = 2 * attended.WINDOW * 100 * model.config.num_heads * model.config.head_dim
    assert attended.fastkv(model, 0.4).flops(100) == flops[1] + some[0] - some[1] + scores
    assert attended.snapkv(model, 0.4).flops(100) == flops[0]


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        *((attended.fastkv, {"fraction": value}, f"fraction is {value}") for value in (0.0, 1.0)),
        *((attended.fastkv, {"fraction": 0.4, "share": value}, f"share is {value}") for value in (0, -0.1, 1.1)),
        *((attended.snapkv, {"fraction": value}, f"fraction is {value}") for value in (-0.5, 1.0, 1.5, float("nan"))),
        *((method, {"fraction": 0.4}, "more than 8 tokens") for method in (attended.fastkv, attended.snapkv)),
    ],
)
def test_methods_that_keep_tokens_refuse_what_they_cannot_cut(method, options, said):
    with pytest.raises(pop.InputError, match=said):
        method(tiny_model(), **options).logits(PROMPT[:8], [1])


def test_fastkv_selects_in_a_layer_without_a_window():
    with pytest.raises(pop.InputError, match="without a window"):
        attended.fastkv(tiny_windows(), 0.7)


def test_without_boundary_handling_the_whole_prompt_is_pruned(model):
    plan = pop.PrunePlan((1, 2, 4))
    naive, _ = reference.forward(model.module, TOKENS, torch.arange(len(TOKENS)) >= N, plan)
    assert_predicts(baselines.NoBoundary("no-boundary", model, plan), naive)


def with_constants(projected, constants, h):
    return tuple(x + constant for x, constant in zip(projected(h), constants, strict=True))


@pytest.mark.parametrize("make", [controls.constant_kv, controls.embedding_kv])
def test_controls_are_plans_whose_codes_are_the_embedding(make, model):
    """With all layers pruned, the embedding is the state that enters the group. So the engine can run the same plan.

    Its corrections lack a constant, which is added to the projections of pruned tokens.
    """
    layers = tuple(range(5))
    contender = make(model, 1.0, WINDOWS)
    D = model.config.hidden_size
    weight = []
    for index, layer in enumerate(model.module.layers):
        W, b = contender.weights[index]  # [D, 2 * K * E] and [2 * K * E]
        assert bool(W.any()) == (make is controls.embedding_kv)
        # A projection is linear in the normalised state, which is e_i sqrt(D) for a multiple of a unit vector e_i.
        own = torch.cat(layer.projected(1e4 * torch.eye(D)[None]), dim=-1)[0].T / D**0.5
        weight.append((W.T - own).unflatten(0, (2, -1)))
        layer.projected = partial(with_constants, layer.projected, b.chunk(2))
    corrections = Corrections(
        layers,
        weight=torch.stack(weight),
        shared=torch.eye(D, 2 * D)[None],  # the code of a token is its own state
        sketch=model.sketch[list(layers)],
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


# ---- Calibration text ----


def test_calibration_windows_hold_the_texts_in_order_or_an_even_share_of_them():
    """Where a text begins with BOS, so do its windows. As in calibration, a rest of less than 16 tokens is left out."""
    model = tiny_model(bos_id=66)

    def windows(texts, **options):
        return [window.tolist() for window in baselines.calibration_windows(model, texts, **options)]

    first = [list(range(begin, begin + 20)) for begin in (0, 20)]
    second = [[66, *range(begin, begin + 19)] for begin in (0, 19, 38)]
    assert windows([list(range(50)), list(range(15)), [66, *range(60)]], length=20) == first + second
    assert [window[0] for window in windows([list(range(66)) * 3], length=33, most=3)] == [0, 0, 0]
    assert [window[0] for window in windows([list(range(60))], length=20, most=2)] == [0, 40]
    with pytest.raises(pop.InputError, match="calibration text"):
        windows([list(range(15))])
    model = pop.Model(model.module, model.config, max_seq_len=16)
    assert [len(window) for window in windows([list(range(40))])] == [16, 16]
