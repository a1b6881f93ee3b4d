"""`pop.calibrate`: the closed form against a naive fit, what must follow from it, and bad input."""

import contextlib
import math
import random
import weakref
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support.cases import models
from support.naive_fit import assert_fit, fitted, naive_fit, whole_projections
from support.plans import contents
from support.texts import MadeUp, random_texts, windows_of
from support.tiny import random_model, tiny_config, tiny_model

import pop
from pop import PrunePlan, calibrate
from pop.calibration import calibrate as calibrate_file
from pop.calibration import refit
from pop.calibration.calibrate import RIDGES
from pop.calibration.held_out import Judge, hold_out
from pop.calibration.texts import text_windows
from pop.pruning.cost import prefill_flops

TEXTS = random_texts(0, 300, 40, 17, 500, 90)


@given(models(), st.data())
def test_the_normal_equations_give_the_naive_fit(module, data):
    """For any groups of pruned layers, padding and first tokens, and where some tokens count as sinks."""
    model = pop.Model(module, module.config)
    layers = data.draw(st.sets(st.integers(0, module.config.num_layers - 1), min_size=1))
    assume(not any(index in layers and index + 1 in layers for index in range(module.deepstack_layers)))
    plan = PrunePlan(tuple(layers), full_depth_first=data.draw(st.integers(1, 3)))
    ridge = data.draw(st.sampled_from([1e-3, 1e-1, 1.0]))
    windows = random_texts(
        data.draw(st.integers(0, 99)), *data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    )
    windows = [[token % 60 for token in window] for window in windows]  # none that stands for an image
    assume(max(map(len, windows)) > plan.full_depth_first)
    with patch.object(refit, "SINK", data.draw(st.sampled_from([refit.SINK, 1.3]))):
        found = fitted(model, windows_of(windows), plan, ridge=ridge)
        assert_fit(model.module, found.corrections, *naive_fit(model, windows, found, ridge))


def test_corrections_are_the_best_of_their_rank(model, notes):
    """By the squared change of what they compute on the texts, and of what lambda adds, in numpy. One updates h."""
    plan = PrunePlan((2, 3), full_depth_first=1)
    rank = 9
    ridge = 1e-2
    windows = windows_of(TEXTS)
    exact, best = (fitted(model, windows, plan, rank, ridge).corrections for rank in (None, rank))

    def rows(found):  # of K and V, and of h
        return torch.cat((found.weight.flatten(0, 2), found.update[0])).double().numpy()

    corrections = rows(exact) @ exact.shared[0].double().numpy()
    solved = notes(refit, "solve", lambda model, sums, rank, ridge: sums)
    fitted(model, windows, PrunePlan((2, 3, 4), full_depth_first=1))
    (sums,) = solved
    metric = (sums.xx / sums.count + ridge * torch.eye(60)).numpy()
    shared = best.shared[0].double().numpy()
    error = corrections - rows(best) @ shared
    values, vectors = np.linalg.eigh(metric)
    singular = np.linalg.svd(corrections @ (vectors * values**0.5 @ vectors.T), compute_uv=False)
    least = (singular[rank:] ** 2).sum()
    assert np.trace(error @ metric @ error.T) == pytest.approx(least, rel=1e-3, abs=1e-6 * (singular**2).sum())
    assert np.trace(shared @ metric @ shared.T) == pytest.approx(rank, rel=1e-3)  # codes have a mean square of 1


def test_windows_cover_the_texts_and_each_begins_like_its_text():
    model = tiny_model(tiny_config(bos_id=3))
    text, bare = [3, *range(4, 44)], list(range(4, 44))
    cut = [[3, *range(4, 20)], [3, *range(20, 36)]]  # 9 tokens are left out
    assert text_windows(model, [text], None, None, 17) == windows_of(cut)
    assert text_windows(model, [bare], None, None, 20) == windows_of([list(range(4, 24)), list(range(24, 44))])
    assert text_windows(model, [text, bare], None, None, 100) == windows_of([text, bare])


@pytest.mark.parametrize(
    ("layers", "candidates", "winner"), [((3, 4), RIDGES, 1), ((3, 4), RIDGES, 4), ((2, 3), (1e-2,), 0)]
)
def test_the_best_lambda_is_found(model, layers, candidates, winner, notes, monkeypatch):
    """With an update of h, lambda is fixed."""
    ridges = notes(refit, "solve", lambda *args: args[-1])
    losses = [float(number != winner) for number in range(len(candidates))]
    judge = MadeUp(*losses, 0.0)  # the last one is for the plan's record
    monkeypatch.setattr(calibrate_file, "Judge", lambda *_: judge)
    result = calibrate(model, TEXTS, PrunePlan(layers), progress=False, steps=0)
    assert ridges == [*candidates]
    assert result.corrections is judge.seen[winner].corrections


def test_sums_are_freed_before_those_of_the_next_group(model, monkeypatch):
    """They are large: float64, of all inputs."""
    alive, numbers = weakref.WeakSet(), []

    class Counted(refit.Sums):
        def __init__(self, *args):
            numbers.append(len(alive))
            alive.add(self)
            super().__init__(*args)

    monkeypatch.setattr(refit, "Sums", Counted)
    fitted(model, windows_of(TEXTS), PrunePlan((0, 2, 4), full_depth_first=1))
    assert numbers == [0, 0, 0]


def test_one_bar_shows_all_of_the_work(model, monkeypatch):
    """Its unit is the tokens that are run. Choosing lambda at the end is left out."""
    bars = []

    @contextlib.contextmanager
    def bar(label, total, unit, wanted):
        bars.append((total, []))
        yield bars[-1][1].append

    monkeypatch.setattr(calibrate_file, "progress_bar", bar)
    calibrate(model, random_texts(0, *[500] * 5), PrunePlan((1, 3, 4)), steps=0)
    ((total, steps),) = bars
    assert total == sum(steps) == 2 * 4 * 500  # two passes for two groups


def test_a_calibrated_plan_can_be_calibrated_again_and_the_seed_decides(model):
    plan = calibrate(model, TEXTS, PrunePlan((2, 3)), longest=20, seed=1, progress=False, steps=0)
    assert contents(calibrate(model, TEXTS, plan, longest=20, seed=1, progress=False, steps=0)) == contents(plan)
    assert contents(calibrate(model, TEXTS, plan, longest=20, seed=2, progress=False, steps=0)) != contents(plan)


def test_a_plan_records_how_it_was_made_and_what_it_costs(model, tmp_path):
    plan = calibrate(model, TEXTS, PrunePlan((2, 3), full_depth_last=4), longest=100, seed=5, progress=False, steps=0)
    windows = text_windows(model, TEXTS, None, None, 100)  # 3 of 300 tokens, 40, 17, 5 of 500, 90
    assert len(windows) == 11
    random.Random(5).shuffle(windows)
    windows, judged = hold_out(windows, 100, None)
    loss = Judge(model, judged).losses(plan)._asdict()
    flops = [prefill_flops(model.config, 512, one) for one in (PrunePlan.none(), plan)]
    plan.save(tmp_path / "plan")
    assert (plan.layers, plan.full_depth_last, plan.full_depth_first, plan.corrections.rank) == ((2, 3), 4, 1, 15)
    for about in (plan.about, PrunePlan.load(tmp_path / "plan").about):
        assert about.pop("loss") == {name: pytest.approx(value, abs=1e-6) for name, value in loss.items()}
        assert about.pop("speedup_limit") == {"512 tokens": pytest.approx(flops[0] / flops[1], abs=1e-3)}
        fitted = sum(len(tokens) for tokens, _ in windows)
        assert about == {
            "model": model.name, "version": pop.__version__, "texts": 5, "windows": 10, "held_out": 1, "longest": 100,
            "tokens": fitted, "rank": 15, "steps": 0, "seed": 5,
        }  # fmt: skip


def test_bfloat16_is_close_to_float32(model, tmp_path):
    """A plan changes the logits of a bfloat16 model no more than bfloat16 itself does. The model keeps it as given."""
    config = tiny_config(dtype=torch.bfloat16)
    plan = PrunePlan((2, 3), full_depth_last=4)
    calibrated = calibrate(model, TEXTS, plan, progress=False, steps=0)
    half = pop.Model(random_model(config).to(torch.bfloat16), config, plan=calibrated)
    assert half.plan == calibrated
    assert half.resolve(None).corrections.weight.dtype == torch.bfloat16
    prompt = TEXTS[0][:50]
    exact, rounded = (m.prefill([prompt], m.new_cache(1, 50), plan=calibrated) for m in (model, half))
    full, rounded_full = (m.prefill([prompt], m.new_cache(1, 50), plan=PrunePlan.none()) for m in (model, half))
    assert (rounded - exact).std() < 2 * (rounded_full - full).std()
    own = calibrate(half, TEXTS, plan, progress=False, steps=0)
    assert own.corrections.weight.dtype == torch.bfloat16
    own.save(tmp_path / "plan")
    assert contents(PrunePlan.load(tmp_path / "plan")) == contents(own)


def test_the_pass_runs_no_layer_twice_or_in_vain(model, notes):
    all_layers = [*model.module.layers]
    runs = notes(type(all_layers[0]), "forward", lambda self, *args: all_layers.index(self))
    for layers, expected in (
        ((4,), [0, 1, 2, 3]),
        ((1,), [0, 1]),
        ((3, 4), [0, 1, 2, 3]),
        ((1, 4), [0, 1, 0, 1, 2, 3, 1, 2, 3]),  # the second pass runs the plan's stream before the full layers
    ):
        runs.clear()
        fitted(model, windows_of(TEXTS[:1]), PrunePlan(layers, full_depth_first=1))
        assert runs == expected


def test_a_large_float32_model_is_fitted_in_bfloat16(model, monkeypatch, notes):
    """Where the processor has fast products for it, see working_copy. The sums and the plan are as exact as before."""
    expected = calibrate(model, TEXTS, PrunePlan((2, 3)), rank=60, progress=False, steps=0).corrections
    monkeypatch.setattr(refit, "SMALLEST_COMPILED", 1)
    monkeypatch.setattr("pop.calibration.passes.WIDENED", set())
    passes = notes(refit, "accumulate", lambda *args: args)
    found = calibrate(model, TEXTS, PrunePlan((2, 3)), rank=60, progress=False, steps=0).corrections
    assert {parameter.dtype for *_, module in passes for parameter in module.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float32}
    assert found.weight.dtype == torch.float32
    found, expected = (whole_projections(model.module, corrections) for corrections in (found, expected))
    assert 0 < (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("one string", {}, "texts is a str"),
        ([1, 2, 3], {}, "tokens must be integers"),
        ([], {}, "two windows of at least 16 tokens"),
        ([[1] * 31], {}, "two windows of at least 16 tokens, but the texts have 1"),
        ([[1] * 100, []], {}, "the text is empty"),
        ([[1] * 100, [67] * 50], {}, "not in the vocabulary"),
        (TEXTS, {"rank": 61}, "rank is 61"),
        (TEXTS, {"steps": -1}, "steps is -1"),
        (TEXTS, {"seed": [1]}, r"seed is \[1\]"),
        (TEXTS, {"longest": 15}, "longest is 15"),
        (["text"], {}, "needs a tokenizer"),
        (TEXTS, {"plan": PrunePlan((2, 3), full_depth_first=20), "longest": 20}, "full_depth_first"),
    ],
)
def test_bad_input_is_refused(model, texts, options, message):
    with pytest.raises(pop.PopError, match=message):
        calibrate(model, texts, **{"plan": PrunePlan((2, 3)), "progress": False} | options)


def test_a_model_of_nan_is_refused():
    broken = tiny_model(tiny_config())
    broken.module.layers[0].self_attn.k_proj.weight[0, 0] = math.nan
    with pytest.raises(pop.PopError, match="hidden states"):
        calibrate(broken, TEXTS, PrunePlan((2, 3)), progress=False, steps=0)
    broken = tiny_model(tiny_config())
    broken.module.layers[4].mlp.up_proj.weight[0, 0] = math.nan  # after all that is fitted
    with pytest.raises(pop.PopError, match="predictions"):
        calibrate(broken, TEXTS, PrunePlan((2,)), progress=False, steps=0)
