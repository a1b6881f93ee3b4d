"""The closed-form refit of K and V: held to a naive fit, to what must follow from it, and to hostile input."""

import copy
import dataclasses
import json
import math
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.cases import assert_close, cases, held, models, plain, prefill
from support.naive_fit import naive_fit, naive_kl
from support.tiny import random_model, tiny_config, tiny_gemma3_config, tiny_qwen3_moe_config

import pop
from pop import PlanError, PrunePlan, calibrate
from pop.calibration.refit import DAMPINGS, RIDGES, Judge, _accumulate, _batches, _Fit, _windows, builtin_texts
from pop.pruning.projections import KVProjections, fingerprint


def random_texts(seed: int, *lengths: int, vocab_size: int = 67) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=random).tolist() for length in lengths]


def make_model(seed: int = 0, **overrides) -> pop.Model:
    config = tiny_config(**overrides)
    return pop.Model(random_model(config, seed), config)


CONFIGS = [tiny_config(), tiny_gemma3_config(), tiny_qwen3_moe_config()]


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module", params=CONFIGS, ids=["llama", "gemma3", "qwen3"])
def either(request):
    """A model of each family, of the same sizes."""
    return pop.Model(random_model(request.param), request.param)


def unseen(texts):
    """Windows without images."""
    return [(text, []) for text in texts]


TEXTS = random_texts(0, 300, 40, 17, 500, 90)


# The fit


@given(models(), st.data())
def test_the_normal_equations_give_the_naive_fit(module, data):
    """For any plan, runs of pruned layers with kept ones between them, padding, taps and first tokens."""
    model = pop.Model(module, module.config)
    layers = data.draw(st.sets(st.integers(0, module.config.num_layers - 1), min_size=1))
    plan = PrunePlan(tuple(layers), full_depth_first=data.draw(st.integers(1, 3)))
    taps, ridge = data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from([1e-3, 1e-1, 1.0]))
    windows = random_texts(data.draw(st.integers(0, 99)), *data.draw(st.lists(st.integers(1, 40), min_size=1)))
    windows = [[token % 60 for token in window] for window in windows]  # none that stands for an image
    if max(map(len, windows)) <= plan.full_depth_first:
        return
    fit = _Fit(model, plan, taps)
    for batch in _batches(unseen(windows)):
        _accumulate(model, batch, [fit])
    own, correction, bias = fit.solve(ridge)
    expected = naive_fit(model, windows, plan, taps, ridge)
    assert_close((own + correction).float(), expected.float())
    for index, layer_bias in zip(plan.layers, bias, strict=True):
        for linear, own_bias in zip(("k_proj", "v_proj"), layer_bias, strict=True):
            linear = module.layers[index].self_attn.get_submodule(linear)
            assert_close(own_bias.float(), torch.zeros(len(own_bias)) if linear.bias is None else linear.bias.detach())


@given(cases())
def test_the_layers_own_projections_are_plain_pruning(case):
    """What lambda = infinity leaves: folded weights, nothing from the previous token."""
    module, plan, tokens, lengths, chunk = case
    if not plan.layers:
        return
    folded = [module.layers[index].folded_projections() for index in plan.layers]
    weight, bias = (torch.stack(parts).detach().float() for parts in zip(*folded, strict=True))
    plan = plain(plan, full_depth_first=max(1, plan.full_depth_first))
    for taps in (1, 2):
        padded = F.pad(weight, (0, (taps - 1) * weight.shape[-1]))
        refit = dataclasses.replace(plan, projections=KVProjections(plan.layers, padded, bias, "", taps))
        expected, expected_cache = prefill(module, tokens, lengths, plan, chunk)
        logits, cache = prefill(module, tokens, lengths, refit, chunk)
        assert_close(logits, expected)
        for row in range(len(tokens)):
            assert_close(held(module, cache, row), held(module, expected_cache, row))


def test_the_last_layer_needs_no_correction(either):
    """Its K and V come from the very state that the full model has there: the residual is zero."""
    model = either
    fit = _Fit(model, PrunePlan((4,), full_depth_first=1), 2)
    for batch in _batches(unseen(TEXTS)):
        _accumulate(model, batch, [fit])
    own, correction, _ = fit.solve(1e-3)
    assert correction.abs().max() < 1e-5 * own.abs().max()


def test_windows_cover_the_texts_and_each_begins_like_its_text():
    model = make_model(bos_id=3)
    text, bare = [3, *range(4, 44)], list(range(4, 44))
    assert _windows(model, [text], None, None, 17) == unseen(
        [[3, *range(4, 20)], [3, *range(20, 36)]]
    )  # 9 tokens are left out
    assert _windows(model, [bare], None, None, 20) == unseen([list(range(4, 24)), list(range(24, 44))])
    assert _windows(model, [text, bare], None, None, 100) == unseen([text, bare])


def test_batches_hold_every_window_once_and_no_more_tokens_than_allowed():
    windows = random_texts(1, *[3, 1500, 2000, 9000, 4096, 700, 20, 1500])
    batches = [[window for window, _ in batch] for batch in _batches(unseen(windows))]
    assert sorted(window for batch in batches for window in batch) == sorted(windows)
    assert all(len(batch) == 1 or len(batch) * len(batch[0]) <= 4096 for batch in batches)
    assert all(len(batch[0]) == max(map(len, batch)) for batch in batches)


# The choice


def test_the_judge_is_the_kl_over_the_last_third(either):
    model = either
    windows = random_texts(2, 60, 31)
    plan = PrunePlan((2, 3), full_depth_first=1)
    sums, counts = zip(*[naive_kl(model, plan, window) for window in windows], strict=True)
    assert Judge(model, unseen(windows))(plan) == pytest.approx(sum(sums) / sum(counts), rel=1e-4)
    assert Judge(model, unseen(windows))(PrunePlan.none()) == 0


@pytest.mark.parametrize("winner", [(1e-2, 0.85, 1.0), (1.0, 1.0, 0.85), (1e-2, 1.0, 1.0), (1e-1, 0.0, 0.0)])
def test_the_best_of_what_is_tried_is_taken(model, winner, monkeypatch):
    """The judge's losses are made up: lower near the winner in each setting."""
    plan = PrunePlan((2, 3), full_depth_first=1)
    fits = []
    monkeypatch.setattr(_Fit, "__init__", record_init(fits, _Fit.__init__))
    seen = []

    def judge(self, plan):
        own, correction, _ = fits[0].solve(winner[0])
        damping = torch.tensor(winner[1:], dtype=own.dtype)[:, None, None]
        seen.append(plan)
        if plan.projections.taps == 1:
            return 1e6 * sum(winner[1:])
        return float((plan.projections.weight - (own + damping * correction)).square().sum())

    monkeypatch.setattr(Judge, "__call__", judge)
    result = calibrate(model, TEXTS, plan, progress=False)
    own, correction, _ = fits[0].solve(winner[0])
    expected = own + torch.tensor(winner[1:], dtype=own.dtype)[:, None, None] * correction
    if winner[1:] == (0.0, 0.0):
        assert result.projections.taps == 1
        expected = expected[..., : model.config.hidden_size]
    assert_close(result.projections.weight, expected.float())
    assert len(seen) <= len(RIDGES) + 2 * (len(DAMPINGS) - 1) + 1


def record_init(fits, init):
    def wrapped(self, *args):
        init(self, *args)
        fits.append(self)

    return wrapped


@pytest.mark.parametrize("config", CONFIGS, ids=["llama", "gemma3", "qwen3"])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("taps", [1, 2])
def test_never_worse_than_plain_on_the_held_out_text(config, seed, taps):
    model = pop.Model(random_model(config, seed), config)
    texts = random_texts(seed, *[48] * 10)
    plan = PrunePlan((1, 2, 4))
    judged = []
    original = Judge.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Judge, "__init__", lambda self, m, windows: judged.extend(windows) or original(self, m, windows))
        result = calibrate(model, texts, plan, taps=taps, seed=seed, progress=False)
    assert len(judged) == 2  # a fifth of the windows
    judge = Judge(model, judged)
    assert judge(result) <= judge(PrunePlan((1, 2, 4), full_depth_first=1)) * (1 + 1e-4)


def test_a_model_whose_layers_are_linear_in_the_token_is_mended():
    """Layers without attention and with tiny updates: K and V are then nearly linear in the state below."""
    model = make_model(4)
    for layer in model.module.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data *= 0.3
    texts = random_texts(5, *[64] * 60)
    plan = PrunePlan((2, 3, 4))
    test = random_texts(6, *[60] * 8)
    refit = calibrate(model, texts, plan, taps=1, progress=False)
    _, full = prefill(model.module, torch.tensor(test), torch.tensor([60] * 8), PrunePlan.none())
    errors = []
    for p in (plan, refit):
        _, cache = prefill(model.module, torch.tensor(test), torch.tensor([60] * 8), p)
        errors.append(
            sum(
                float((held(model.module, cache, row) - held(model.module, full, row)).square().sum())
                for row in range(8)
            )
        )
    assert errors[1] < 0.5 * errors[0]


# The plan that comes out


def test_the_defaults(model):
    result = calibrate(model, TEXTS, PrunePlan((2, 3), full_depth_last=4), progress=False)
    assert (result.layers, result.full_depth_last, result.full_depth_first) == ((2, 3), 4, 1)
    assert result.projections.taps == 2
    assert result.projections.weight.dtype == torch.float32
    assert result.projections.fingerprint == fingerprint(model.module)
    assert calibrate(model, TEXTS, PrunePlan((2,), full_depth_first=3), progress=False).full_depth_first == 3


def test_several_plans_share_the_pass_and_come_out_as_alone(model):
    plans = [PrunePlan((3, 4)), PrunePlan((0, 2), full_depth_first=2), PrunePlan((1, 2, 3, 4))]
    together = calibrate(model, TEXTS, plans, progress=False)
    for plan, result in zip(plans, together, strict=True):
        assert result == calibrate(model, TEXTS, plan, progress=False)


def test_a_calibrated_plan_can_be_calibrated_again_and_the_seed_decides(model):
    plan = calibrate(model, TEXTS, PrunePlan((2, 3)), window=20, seed=1, progress=False)
    assert calibrate(model, TEXTS, plan, window=20, seed=1, progress=False) == plan
    assert calibrate(model, TEXTS, plan, window=20, seed=2, progress=False) != plan


def test_a_saved_plan_comes_back_and_generates_the_same(either, tmp_path):
    model = either
    plan = calibrate(model, TEXTS, PrunePlan((2, 3)), progress=False)
    plan.save(tmp_path / "plan")
    loaded = PrunePlan.load(tmp_path / "plan")
    assert loaded == plan
    assert hash(loaded) == hash(plan)
    prompt = TEXTS[0][:50]
    assert model.score(prompt, [1, 2, 3], plan=loaded) == model.score(prompt, [1, 2, 3], plan=plan)
    assert (
        model.generate(prompt, max_new_tokens=5, plan=loaded).tokens
        == model.generate(prompt, max_new_tokens=5, plan=plan).tokens
    )
    assert [file.name for file in tmp_path.iterdir()] == ["plan"]


def test_another_dtype_is_the_same_model(tmp_path):
    module = random_model(tiny_config()).to(torch.bfloat16)
    prints = {dtype: fingerprint(module.to(dtype)) for dtype in (torch.bfloat16, torch.float32, torch.float16)}
    assert len(set(prints.values())) == 1
    fresh = random_model(tiny_config())
    assert (
        fingerprint(fresh)
        == fingerprint(random_model(tiny_config()).to(torch.bfloat16))
        != fingerprint(random_model(tiny_config(), seed=1))
    )


@pytest.mark.parametrize("name", ["model.layers.4.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_single_changed_weight_is_another_model(name):
    module = random_model(tiny_config())
    before = fingerprint(module)
    module.get_parameter(name).view(-1)[-1] += 0.1
    assert fingerprint(module) != before


def test_a_plan_of_another_model_is_refused(model):
    plan = calibrate(model, TEXTS, PrunePlan((2, 3)), progress=False)
    other = make_model(seed=1)
    for call in (
        lambda: other.generate([1, 2, 3], plan=plan),
        lambda: other.score([1, 2], [3], plan=plan),
        lambda: other.prefill([[1, 2]], other.new_cache(), plan=plan),
        lambda: pop.Model(other.module, other.config, plan=plan),
    ):
        with pytest.raises(PlanError, match="fitted to another model's weights"):
            call()
    reshaped = KVProjections((2, 3), torch.zeros(2, 2, 20, 14), torch.zeros(2, 2, 20), model.fingerprint, 2)
    with pytest.raises(PlanError, match="this model needs"):
        model.generate([1, 2, 3], plan=PrunePlan((2, 3), full_depth_first=1, projections=reshaped))


def test_bfloat16_is_close_to_float32(model, tmp_path):
    """The same plan in a bfloat16 model: what it does to the logits is what bfloat16 does to them anyway."""
    plan = calibrate(model, TEXTS, PrunePlan((2, 3)), progress=False)
    half = pop.Model(random_model(tiny_config()).to(torch.bfloat16), tiny_config(dtype=torch.bfloat16))
    prompt = TEXTS[0][:50]
    exact, rounded = (m.prefill([prompt], m.new_cache(1, 50), plan=plan) for m in (model, half))
    full, rounded_full = (m.prefill([prompt], m.new_cache(1, 50), plan=PrunePlan.none()) for m in (model, half))
    assert (rounded - exact).std() < 2 * (rounded_full - full).std()
    own = calibrate(half, TEXTS, PrunePlan((2, 3)), progress=False)
    assert own.projections.weight.dtype == torch.bfloat16
    own.save(tmp_path / "plan")
    assert PrunePlan.load(tmp_path / "plan") == own


def test_the_cost_of_the_second_tap_is_counted(model):
    from pop.pruning.cost import prefill_flops

    one, two = (calibrate(model, TEXTS, PrunePlan((2, 3)), taps=taps, progress=False) for taps in (1, 2))
    config, tokens = model.config, 100
    product = 2 * 2 * config.hidden_size * config.num_kv_heads * config.head_dim  # K and V of a token
    difference = prefill_flops(config, tokens, two) - prefill_flops(config, tokens, one)
    assert difference == 2 * (tokens - 2) * product  # two layers; the first and the last token are at full depth
    assert prefill_flops(config, tokens, one) == prefill_flops(config, tokens, PrunePlan((2, 3), full_depth_first=1))


def test_a_trainable_model_is_calibrated_without_a_trace():
    model = make_model()
    model.module.requires_grad_(True)
    plan = calibrate(model, TEXTS, PrunePlan((2, 3)), progress=False)
    assert not plan.projections.weight.requires_grad
    assert copy.deepcopy(plan) == plan == calibrate(make_model(), TEXTS, PrunePlan((2, 3)), progress=False)


def test_the_pass_runs_no_layer_twice_or_for_nothing(model, monkeypatch):
    runs = []
    original = type(model.module.layers[0]).update
    monkeypatch.setattr(
        type(model.module.layers[0]),
        "update",
        lambda self, *args: runs.append([*model.module.layers].index(self)) or original(self, *args),
    )
    for layers, expected in (((4,), [0, 1, 2, 3]), ((1,), [0]), ((3, 4), [0, 1, 2, 3]), ((1, 4), [0, 1, 2, 2, 3, 3])):
        runs.clear()
        _accumulate(model, unseen(TEXTS[:1]), [_Fit(model, PrunePlan(layers, full_depth_first=1), 2)])
        assert runs == expected


def test_held_out_windows_are_not_fitted_to_and_judged_by_their_beginning(monkeypatch):
    model = make_model(max_positions=512)
    fitted, judged = [], []
    monkeypatch.setattr(sys.modules["pop.calibration.refit"], "_accumulate", record(fitted, _accumulate))
    monkeypatch.setattr(Judge, "__init__", record(judged, Judge.__init__))
    texts = random_texts(3, *[500] * 5, 2000)
    calibrate(model, texts, PrunePlan((2, 3)), window=4096, progress=False)
    seen = [tuple(window) for _, batch, _ in fitted for window, _ in batch]
    held = [tuple(window) for _, _, windows in judged for window, _ in windows]
    assert len(held) == 1
    assert not set(held) & set(seen)
    assert max(map(len, seen)) == 512  # the model's limit
    judge = Judge(model, unseen([list(held[0])]))
    plan = PrunePlan((2, 3), full_depth_first=1)
    total, count = naive_kl(model, plan, list(held[0])[:384])
    assert judge(plan) == pytest.approx(total / count, rel=1e-4)


def record(calls, function):
    def wrapped(*args):
        calls.append(args)
        return function(*args)

    return wrapped


def test_equality_looks_at_everything():
    one = zeros_projections()
    assert one == zeros_projections()
    assert one != KVProjections((2, 3), one.weight + 1, one.bias, "", 2)
    assert one != KVProjections((2, 3), one.weight, one.bias + 1, "", 2)
    assert one != KVProjections((2, 3), one.weight, one.bias, "other", 2)
    assert one != KVProjections((2, 3), one.weight, one.bias, "", 1)
    assert one != KVProjections((2, 4), one.weight, one.bias, "", 2)
    assert one != KVProjections((2, 3), one.weight.bfloat16(), one.bias.bfloat16(), "", 2)


def test_a_copy_in_another_dtype_is_kept_once_and_not_pickled():
    one = zeros_projections()
    before = len(pickle.dumps(one))
    half = one.to(torch.device("cpu"), torch.bfloat16)
    assert one.to(torch.device("cpu"), torch.bfloat16) is half
    assert one.to(torch.device("cpu"), torch.float32) is one
    assert one.to(torch.device("cpu"), torch.float16).weight.dtype == torch.float16
    assert len(pickle.dumps(one)) == before
    assert pickle.loads(pickle.dumps(one)) == one


def test_the_model_keeps_its_plan_as_given(tmp_path):
    model = make_model()
    plan = calibrate(model, TEXTS, PrunePlan((2, 3)), progress=False)
    half = pop.Model(random_model(tiny_config()).to(torch.bfloat16), tiny_config(dtype=torch.bfloat16), plan=plan)
    assert half.plan == plan
    assert half.resolve(None).projections.weight.dtype == torch.bfloat16


def test_the_fingerprint_sees_order_names_and_config():
    first = random_model(tiny_config())
    before = fingerprint(first)
    down = first.layers[1].mlp.down_proj.weight
    down.data = down.data.flip(0)
    assert fingerprint(first) != before
    second = random_model(tiny_config())
    a, b = second.layers[0].mlp.up_proj, second.layers[0].mlp.gate_proj
    a.weight.data, b.weight.data = b.weight.data, a.weight.data
    assert fingerprint(second) != before
    assert fingerprint(random_model(tiny_config(norm_eps=1e-6))) != before
    assert fingerprint(random_model(tiny_config(max_positions=99, dtype=torch.bfloat16))) == before


def test_the_sums_are_float64():
    """An ill-conditioned text: float32 sums would miss the naive fit by far."""
    model = make_model(3)
    model.module.model.embed_tokens.weight.data *= torch.logspace(0, -4, 30)
    plan = PrunePlan((1,), full_depth_first=1)
    windows = random_texts(8, *[200] * 40)
    fit = _Fit(model, plan, 2)
    for batch in _batches(unseen(windows)):
        _accumulate(model, batch, [fit])
    own, correction, _ = fit.solve(1e-9)
    expected = naive_fit(model, windows, plan, 2, 1e-9)
    assert_close((own + correction).float(), expected.float())


def test_the_fingerprint_of_large_parameters_looks_at_all_parts_of_them(monkeypatch):
    monkeypatch.setattr(sys.modules["pop.pruning.projections"], "SAMPLES", 100)
    module = random_model(tiny_config())
    before = fingerprint(module)
    for row in (0, 20, 40, 64):
        module.model.embed_tokens.weight.data[row : row + 3] *= -1  # 90 of 2,010 values, of which one in 21 is read
        after = fingerprint(module)
        assert after != before
        before = after


@pytest.mark.parametrize(("held_out", "expected"), [(1, 1), (3, 3), (8, 4)])
def test_as_many_windows_are_held_out_as_asked_but_a_fifth_at_most(model, held_out, expected, monkeypatch):
    judged = []
    monkeypatch.setattr(Judge, "__init__", record(judged, Judge.__init__))
    calibrate(model, random_texts(4, *[30] * 20), PrunePlan((3,)), held_out=held_out, progress=False)
    assert [len(windows) for _, _, windows in judged] == [expected]


# What is refused


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("one string", {}, "texts is a str"),
        (5, {}, "texts is a int"),
        ([1, 2, 3], {}, "texts holds 1;"),
        ([], {}, "less than two windows"),
        ([[1, 2, 3]], {}, "less than two windows"),
        ([[1] * 100], {}, "less than two windows"),
        ([[1] * 100, []], {}, "the text is empty"),
        ([[1] * 100, [67] * 50], {}, "not in the vocabulary"),
        (TEXTS, {"taps": 3}, "taps is 3"),
        (TEXTS, {"taps": 1.0}, "taps is 1.0"),
        (TEXTS, {"taps": True}, "taps is True"),
        (TEXTS, {"seed": [1]}, r"seed is \[1\]"),
        (TEXTS, {"window": 0}, "window is 0"),
        (TEXTS, {"window": 10}, "window is 10"),
        (TEXTS, {"held_out": 0}, "held_out is 0"),
        (["text"], {}, "needs a tokenizer"),
    ],
)
def test_bad_input_is_refused(model, texts, options, message):
    with pytest.raises(pop.PopError, match=message):
        calibrate(model, texts, PrunePlan((2, 3)), progress=False, **options)


@pytest.mark.parametrize("plan", [PrunePlan.none(), PrunePlan((7,)), None, 0.5, [], [PrunePlan((2,)), PrunePlan()]])
def test_a_plan_that_cannot_be_calibrated_is_refused(model, plan):
    with pytest.raises(PlanError):
        calibrate(model, TEXTS, plan, progress=False)


def test_texts_within_the_first_tokens_are_refused(model):
    with pytest.raises(pop.InputError, match="no token of the texts is left"):
        calibrate(model, TEXTS, PrunePlan((2, 3), full_depth_first=20), window=20, progress=False)


def test_a_model_of_nan_is_said():
    broken = make_model()
    broken.module.layers[0].self_attn.k_proj.weight[0, 0] = math.nan
    with pytest.raises(pop.PopError, match="states of the texts are not finite"):
        calibrate(broken, TEXTS, PrunePlan((2, 3)), progress=False)
    broken = make_model()
    broken.module.layers[4].mlp.up_proj.weight[0, 0] = math.nan  # above all that is fitted
    with pytest.raises(pop.PopError, match="predictions on the texts are not finite"):
        calibrate(broken, TEXTS, PrunePlan((2,)), progress=False)
    with pytest.raises(pop.InputError, match="the model is a Llama"):
        calibrate(broken.module, TEXTS, PrunePlan((2,)))


@pytest.mark.parametrize(
    "fields",
    [
        {"full_depth_first": 0},
        {"layers": (2,)},
        {"layers": (2, 4)},  # those of other layers
        {"projections": "refit"},
    ],
)
def test_projections_that_do_not_fit_their_plan_are_refused(fields):
    good = {"layers": (2, 3), "full_depth_first": 1, "projections": zeros_projections()}
    PrunePlan(**good)
    with pytest.raises(PlanError):
        PrunePlan(**good | fields)


def zeros_projections(weight=(2, 2, 20, 60), bias=(2, 2, 20), taps=2):
    return KVProjections((2, 3), torch.zeros(weight), torch.zeros(bias), "", taps)


@pytest.mark.parametrize(
    "shapes",
    [
        {"weight": (2, 20, 60)},
        {"weight": (2, 3, 20, 60)},
        {"weight": (3, 2, 20, 60), "bias": (3, 2, 20)},
        {"weight": (2, 2, 20, 61)},
        {"bias": (2, 2)},
        {"taps": 3},
        {"taps": True},
    ],
)
def test_projections_of_wrong_shapes_are_refused(shapes):
    with pytest.raises(PlanError):
        zeros_projections(**shapes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bias", torch.zeros(2, 2, 20, dtype=torch.bfloat16)),  # the weight is float32
        ("bias", torch.full((2, 2, 20), math.inf)),
        ("weight", torch.full((2, 2, 20, 60), math.nan)),
        ("weight", torch.zeros(2, 2, 20, 60, dtype=torch.int64)),
        ("bias", [0.0]),
    ],
)
def test_projections_of_wrong_numbers_are_refused(name, value):
    good = zeros_projections()
    with pytest.raises(PlanError, match="again"):
        KVProjections((2, 3), **{"weight": good.weight, "bias": good.bias, name: value}, fingerprint="", taps=2)


@pytest.mark.parametrize("broken", range(9))
def test_a_broken_plan_file_is_refused(model, tmp_path, broken):
    path = tmp_path / "plan"
    calibrate(model, TEXTS, PrunePlan((2, 3)), progress=False).save(path)
    PrunePlan.load(path)
    tensors, content = load_file(path), path.read_bytes()
    fields = {"layers": [2, 3], "full_depth_last": 1, "full_depth_first": 1, "taps": 2, "fingerprint": "0"}

    def rewrite(tensors=tensors, **changes):
        save_file(tensors, path, metadata={"pop_plan": json.dumps(fields | changes)})

    [
        lambda: path.write_bytes(content[:-1]),
        lambda: path.write_bytes(content[:7]),
        lambda: save_file(tensors, path),
        lambda: rewrite({"weight": tensors["weight"]}),
        lambda: rewrite(tensors | {"weight": tensors["weight"].long()}),
        lambda: rewrite(tensors | {"weight": tensors["weight"] * math.inf}),
        lambda: rewrite(taps=0),
        lambda: rewrite(layers=[2]),
        lambda: rewrite(gates=3),
    ][broken]()
    with pytest.raises(PlanError, match="is not a pruning plan"):
        PrunePlan.load(path)


def test_the_builtin_texts_are_there():
    texts = builtin_texts()
    assert len(texts) == 6
    assert all(len(text) > 20_000 for text in texts)
