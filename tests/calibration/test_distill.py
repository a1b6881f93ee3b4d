"""Distillation: its loss and gradients against the naive method, its steps, what it keeps, and unfinished work."""

import copy
import dataclasses
import inspect
import os
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support.cases import models, plans, recorded_choices
from support.naive_fit import naive_gradients
from support.plans import contents
from support.texts import MadeUp, windows_of
from support.tiny import random_model, tiny_config, tiny_gemma3_config, tiny_model

import pop
from pop import InputError, PrunePlan, calibrate
from pop.calibration import calibrate as calibrate_file
from pop.calibration import distill as distillation
from pop.calibration import passes
from pop.calibration.distill import RATE, distill, distillation_loss, learning_rate, schedule
from pop.calibration.exercises import Exercise
from pop.calibration.held_out import Judge
from pop.inputs.processors import processor_of
from pop.pruning.reference import full_depth_tokens

pytestmark = pytest.mark.usefixtures("short_averages")


def random_texts(seed: int, *lengths: int) -> list[list[int]]:
    """Texts of 60 tokens, in which each token decides the next one up to chance."""
    rng = random.Random(seed)
    texts = [[rng.randrange(60)] for _ in lengths]
    for text, length in zip(texts, lengths, strict=True):
        while len(text) < length:
            text.append((7 * text[-1] + rng.randrange(3)) % 60)
    return texts


TEXTS = random_texts(0, *[70] * 20)
PLAN = PrunePlan((1, 3, 4), full_depth_last=2, full_depth_selected=0.1)


@pytest.fixture(scope="module")
def closed(model):
    """The closed form."""
    return calibrate(model, TEXTS, PLAN, progress=False, steps=0)


@st.composite
def students(draw):
    """(module, plan with corrections, tokens [B, T], cut)"""
    module = draw(models())
    plan = draw(plans(module.config))
    assume(plan.corrections is not None and plan.layers)
    B, T = draw(st.integers(1, 3)), draw(st.integers(2, 20))
    tokens = torch.randint(60, (B, T), generator=torch.Generator().manual_seed(draw(st.integers(0, 10**6))))
    return module, plan, tokens, draw(st.integers(1, T))


@given(students())
def test_the_loss_and_its_gradients_are_the_references(case):
    """And how many tokens the student selects, for any plan, windows, and kept layers between pruned ones."""
    module, plan, tokens, cut = case
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in plan.corrections.tensors.items()}
    vision = processor_of(tiny_config())  # for text
    exercise = Exercise(tokens, cut, [[]] * len(tokens))
    trained = dataclasses.replace(plan, corrections=plan.corrections.replaced(leaves))
    with recorded_choices(passes) as choices:
        loss = distillation_loss(module, vision, trained, exercise)
    chosen = choices[0] if choices else torch.zeros(len(tokens), cut, dtype=torch.bool)
    others = ~full_depth_tokens(cut, cut, plan)
    assert not chosen[:, ~others].any()
    assert (chosen.sum(1) == plan.num_selected(int(others.sum()))).all()
    expected, gradients = naive_gradients(module, plan, tokens, chosen, cut)
    assert loss.item() == pytest.approx(expected, rel=1e-3, abs=1e-6)
    for found, naive in zip(torch.autograd.grad(loss, [*leaves.values()]), gradients, strict=True):
        assert (found - naive).abs().max() <= 1e-3 * naive.abs().max() + 1e-7


def test_full_depth_tokens_attend_by_the_function_of_the_module(model, closed, notes):
    """On a GPU, a backend has replaced it."""
    calls = notes(model.module, "masked_attention", lambda *args: args)
    Judge(model, windows_of(TEXTS[:1])).losses(closed)
    assert len(calls) == len(closed.layers)


def test_the_rate_rises_and_falls():
    shares = [schedule(number, 50) for number in range(50)]
    assert shares[0] == 1 / 4
    assert shares.index(max(shares)) == 3 and max(shares) > 0.95
    assert shares[3:] == sorted(shares[3:], reverse=True)
    assert 0.02 < shares[-1] < 0.03
    assert 0 < schedule(0, 1) <= 1


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_step_changes_what_is_computed_by_the_rate(scale):
    """At most, for inputs with a mean square of 1: all weights change by the rate, and each in the worst direction."""
    weight = scale * torch.randn(2, 2, 10, 600, generator=torch.Generator().manual_seed(0))
    x = torch.randn(600, generator=torch.Generator().manual_seed(1))
    change = learning_rate(weight) * x.abs().sum()
    assert 0.4 * RATE < change / (weight @ x).square().mean().sqrt() < RATE


def test_distillation_lowers_the_loss_on_held_out_text(monkeypatch):
    """Random text teaches little. With longer exercises or fewer texts, the closed form often stays the best."""
    monkeypatch.setattr("pop.calibration.exercises.CONTINUATION", 96)
    layers = (3, 4)
    model = tiny_model(tiny_gemma3_config(), 1)
    texts = random_texts(1, *[384] * 24)
    plan = dataclasses.replace(PLAN, layers=layers)
    closed, distilled = (calibrate(model, texts, plan, steps=steps, progress=False) for steps in (0, 16))
    judge = Judge(model, windows_of(random_texts(2, *[384] * 3)))
    assert judge.losses(distilled).mean < 0.95 * judge.losses(closed).mean
    assert (distilled.layers, distilled.full_depth_last, distilled.full_depth_first) == (layers, 2, 1)
    assert distilled.corrections.weight.dtype == torch.float32
    assert torch.equal(distilled.corrections.sketch, model.sketch[list(distilled.layers)])


def test_the_best_of_five_checks_is_taken(model, closed):
    """The losses fall up to the third check and rise after it."""
    judge = MadeUp(9, 8, 7, 5, 6, 7)
    checked = []
    found = distill(model, closed, windows_of(TEXTS), judge, 12, keep=lambda best, done: checked.append(done))
    assert checked == [2, 4, 7, 9, 12]
    first, _, _, third, fourth, *_ = map(contents, judge.seen)
    assert first == contents(closed)
    assert contents(found) == third != fourth


@pytest.mark.parametrize(("steps", "inference", "tolerance"), [(0, False, 0), (0, True, 0), (2, True, 1e-6)])
def test_a_trainable_model_stays_as_it_is_whatever_the_callers_modes_are(model, steps, inference, tolerance):
    """Distillation of a trainable model rounds in another order."""
    module = random_model(tiny_config()).requires_grad_(True)
    before = copy.deepcopy(module.state_dict())
    with torch.inference_mode(inference), torch.autocast("cpu", dtype=torch.bfloat16):
        plan = calibrate(pop.Model(module, tiny_config()), TEXTS, PLAN, steps=steps, progress=False)
    assert not plan.corrections.weight.requires_grad and not plan.corrections.weight.is_inference()
    expected = calibrate(model, TEXTS, PLAN, steps=steps, progress=False)
    torch.testing.assert_close(
        plan.corrections.tensors, expected.corrections.tensors, rtol=tolerance, atol=tolerance / 10
    )
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name])
        assert (parameter.grad, parameter.requires_grad, parameter.dtype) == (None, True, torch.float32)


def test_bfloat16_models_keep_float32_corrections_only_while_distilling(notes):
    """The rates are those of the schedule, and passes run in bfloat16 where the processor is fast at it."""
    half = pop.Model(random_model(tiny_config()).to(torch.bfloat16), tiny_config(dtype=torch.bfloat16))
    start = calibrate(half, TEXTS, PLAN, progress=False, steps=0).corrections.weight.float()
    groups = notes(torch.optim.Adam, "step", lambda adam: [dict(group) for group in adam.param_groups])
    plan = calibrate(half, TEXTS, PLAN, steps=3, progress=False)
    assert plan.corrections.weight.dtype == torch.bfloat16
    assert {tensor.dtype for step in groups for group in step for tensor in group["params"]} == {torch.float32}
    rates = [step[0]["lr"] for step in groups]
    assert rates == pytest.approx([learning_rate(start) * schedule(number, 3) for number in range(3)])


@pytest.mark.parametrize(("slow", "dtype"), [(set(), torch.bfloat16), ({torch.bfloat16}, torch.float32)])
def test_the_passes_run_in_the_dtype_that_the_processor_is_fast_at(model, slow, dtype, monkeypatch):
    monkeypatch.setattr(passes, "WIDENED", slow)
    assert {parameter.dtype for parameter in passes.working_copy(model).parameters()} == {dtype}


def test_the_seed_decides(model, closed):
    plans = [distill(model, closed, windows_of(TEXTS), MadeUp(3, 2, 1), 2, seed=seed) for seed in (1, 1, 2)]
    first, again, other = map(contents, plans)
    assert first == again != other
    assert first != contents(closed)


def test_a_run_continues_from_the_best_plan_so_far(model, closed, notes):
    """The other steps follow. The plan stays the best if no check is better."""
    windows, kept, counted = windows_of(TEXTS), [], []

    def interrupt(*now):
        kept.append(now)
        if len(kept) == 2:
            raise KeyboardInterrupt

    def progress(count, note=""):
        counted.append(count)

    def continued(begin, *losses):
        return contents(distill(model, best, windows, MadeUp(*losses), 10, begin=begin, progress=progress))

    with pytest.raises(KeyboardInterrupt):
        distill(model, closed, windows, MadeUp(9, 7, 8), 10, keep=interrupt)
    (best, first), (again, second) = kept
    assert (first, second) == (2, 4)
    assert contents(closed) != contents(best) == contents(again)
    numbers = notes(distillation, "exercise", lambda model, windows, number, rng: number)
    assert continued(4, 7, *[6] * 3) != contents(best)
    assert numbers == [*range(4, 10)] and counted == [4] + [1] * 6
    assert continued(4, 7, *[8] * 3) == contents(best)
    assert continued(10, 7) == contents(best)  # nothing is left to do


def test_all_that_decides_a_run_tells_it_from_others(model):
    options = inspect.signature(calibrate).parameters.keys() - {"model", "resume", "progress"}
    known = {"plan", "texts", "images", "videos", "speedup", "rank", "longest", "steps", "seed"}
    assert options == known, "let `_identity` hash a new option, vary it here, and name it in this list"

    def run(model=model, plan=PLAN, texts=TEXTS, judged=TEXTS[:1], media=None, rank=15):
        windows = [(text, [SimpleNamespace(sha256=media)] * bool(media)) for text in texts]
        about = {"rank": rank, "steps": 8, "seed": 0}
        return calibrate_file._identity(model, plan, windows + windows_of(judged), about)

    config = tiny_config()
    half = pop.Model(random_model(config).to(torch.bfloat16), tiny_config(dtype=torch.bfloat16))
    other = tiny_model(config, 1)
    short = tiny_model(config, max_seq_len=75)
    merged = pop.Model(random_model(config), config)  # as after a merge of an adapter of q only
    with torch.no_grad():
        merged.module.layers[2].self_attn.q_proj.weight.mul_(1.01)
    runs = [run(), run(half), run(other), run(short), run(merged), run(plan=PrunePlan((1, 3, 4))), run(texts=TEXTS[1:])]
    runs += [run(judged=TEXTS[1:2]), run(media="a"), run(media="b"), run(rank=9)]
    assert run() == run() and len(set(runs)) == len(runs)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b"no plan"),
        lambda path: PLAN.save(path),
        lambda path: dataclasses.replace(PLAN, about={"run": "a hash", "steps": 1}).save(path),
    ],
    ids=["no plan", "a plan that no run has kept", "a plan of another run"],
)
def test_a_file_that_is_no_progress_of_the_run_is_refused(model, tmp_path, write, monkeypatch):
    monkeypatch.setattr(calibrate_file, "fitted", None)  # before the work
    path = tmp_path / "progress"
    write(path)
    content = path.read_bytes()
    with pytest.raises(InputError, match="progress does not hold the progress of a run"):
        calibrate(model, TEXTS, PLAN, steps=2, resume=path, progress=False)
    assert path.read_bytes() == content


def test_progress_that_cannot_be_written_is_refused_before_the_work(model, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate_file, "fitted", None)
    for wrong in (tmp_path / "missing" / "record", tmp_path, 5, []):
        with pytest.raises(InputError, match="cannot be written"):
            calibrate(model, TEXTS, PLAN, steps=2, resume=wrong, progress=False)


def test_a_failed_write_does_not_end_the_run(model, tmp_path, monkeypatch, caplog):
    def full_disk(*args):
        raise OSError(28, "No space left on device")

    expected = calibrate(model, TEXTS, PLAN, steps=2, progress=False)
    monkeypatch.setattr(os, "replace", full_disk)
    found = calibrate(model, TEXTS, PLAN, steps=2, resume=tmp_path / "progress", progress=False)
    assert contents(found) == contents(expected)
    assert "No space left" in caplog.text and not list(tmp_path.iterdir())


def test_a_model_in_several_processes_is_refused(model, monkeypatch):
    monkeypatch.setattr(model, "part", object())
    with pytest.raises(pop.UnsupportedError, match="one process"):
        calibrate(model, TEXTS, PLAN, steps=2, progress=False)


def test_gradients_that_are_not_finite_are_refused(model, closed):
    broken = copy.copy(model)
    broken.module = copy.deepcopy(model.module)
    broken.module.layers[4].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="gradients of the corrections"):
        distill(broken, closed, windows_of(TEXTS), MadeUp(1), 2)
