"""The verdict on a plan: figures as of the naive reference, and limits on them."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from support.harness import naive_logits
from support.naive_fit import kl
from support.tiny import tiny_config, tiny_model
from support.tiny_chat import write_chat_checkpoint

import pop
from pop.calibration.questions import KINDS, Writer, make_questions
from pop.calibration.texts import default_texts, parted
from pop.calibration.verdict import CONTINUATION, Verdict, compared, table

PLAN = pop.PrunePlan((2, 3, 4), full_depth_last=2)
TEXT = " ".join(f"word{n} of line{n * n}" for n in range(80))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pop.load(write_chat_checkpoint(tmp_path_factory.mktemp("models") / "chat"), prune=None)


@pytest.fixture(scope="module")
def verdict(model):
    return pop.check(model, PLAN, [TEXT], lengths=(700, 5000), questions=2, progress=False)


def test_the_loss_is_that_of_the_reference(model, verdict):
    """The text has one window of each length. The longer one is cut to the context."""
    tokens = model.encode(TEXT)
    assert [*verdict.loss] == [700, 1024 - CONTINUATION]
    for length, found in verdict.loss.items():
        window = (tokens * 2)[: length + CONTINUATION]
        plans = (pop.PrunePlan.none(), PLAN)
        full, pruned = (naive_logits(model, plan, window[:length], window[length:]) for plan in plans)
        losses = kl(full, pruned)
        same = full.argmax(-1) == pruned.argmax(-1)
        expected = {"kl": losses.mean(), "first": losses[0], "same": same.double().mean()}
        assert found == pytest.approx({name: value.item() for name, value in expected.items()}, abs=1e-5)


def test_every_kind_is_asked(model, verdict):
    kinds = [make.__name__.replace("_", " ") for make in KINDS]
    assert {*verdict.exact} == {(kind, length) for kind in kinds for length in verdict.loss}
    assert all(exact.shape == (2, 2) for exact in verdict.exact.values())


def test_an_answer_is_exact_if_each_token_is_the_likeliest(model, monkeypatch):
    """Only the full model finds a greedy answer by the full model. Both find none with a wrong last token."""
    writer = Writer(model, model.encode(TEXT), [], 0)
    asked = make_questions(writer, [KINDS[0]], 500, 6)
    full = []
    for number, question in enumerate(asked):
        answer = pop.reference.generate(model.module, torch.tensor(question.prompt), pop.PrunePlan.none(), 4)
        if number >= 4:
            answer[-1] = (answer[-1] + 1) % 259
        full.append(question._replace(answer=answer))
    monkeypatch.setattr("pop.calibration.verdict.make_questions", lambda *args: full)
    exact = pop.check(model, PLAN, [TEXT], lengths=[500], questions=6, progress=False).exact["codes", 500]
    expected = [
        [
            naive_logits(model, plan, question.prompt, question.answer).argmax(-1).tolist() == question.answer
            for plan in (PLAN, pop.PrunePlan.none())
        ]
        for question in full
    ]
    assert exact.tolist() == expected
    assert exact[:, 1].tolist() == [True] * 4 + [False] * 2
    assert not exact[:, 0].all()


def test_built_in_texts_follow_a_text_that_is_shorter_than_a_prompt(model):
    """A short text that is repeated would have its own continuation in the prompt."""
    short = TEXT[:700]
    _, builtin = parted(default_texts(model))
    tokens = model.encode(short) + model.encode(builtin[0])
    assert len(model.encode(short)) < 900 + CONTINUATION
    for length, windows, _ in compared(model, [short], [500, 900], 1):
        assert windows[0] == tokens[: length + CONTINUATION]
        assert len({*map(tuple, windows)}) == len(windows) == (1 if length == 500 else 8)


def test_each_list_of_ids_may_begin_with_bos_or_not(model):
    """BOS stands before each window or nowhere, and no other token is lost."""
    bos = pop.Model(model.module, dataclasses.replace(model.config, bos_id=0), model.tokenizer)
    texts = [[9] * 200, [0, *[8] * 200], [7] * 200]
    for first in (texts[0], texts[1]):
        rows = [first, *(text for text in texts if text is not first)]
        ((_, (window, *_), _),) = compared(bos, rows, [500], 1)
        head = first[:1] if first[0] == 0 else []
        assert window[: len(head)] == head and 0 not in window[len(head) :]
        assert [token for row in rows for token in row if token][:500] == window[len(head) :][:500]


def test_without_texts_the_part_that_calibrate_leaves_is_compared(model):
    _, left = parted(default_texts(model))
    assert len(left) > 6
    assert compared(model, None, [500], 1) == compared(model, left, [500], 1)


def test_a_length_that_the_plan_does_not_prune_is_left_out(model):
    """It would show no loss and no lost answer, whatever the plan is."""
    short = dataclasses.replace(PLAN, full_depth_below=650)
    assert [*pop.check(model, short, [TEXT], lengths=(640, 700), questions=1, progress=False).loss] == [700]
    with pytest.raises(pop.InputError, match="none of at least 650 tokens.*928 at most"):
        pop.check(model, short, [TEXT], lengths=(600, 640), questions=1, progress=False)


def test_without_a_tokenizer_quotations_are_left():
    model = tiny_model(tiny_config(max_positions=200))
    text = np.random.default_rng(0).integers(0, 67, size=300).tolist()
    found = pop.check(model, 0.5, [text], lengths=[60], questions=2, progress=False)
    assert [*found.exact] == [("quotations", 60)]
    assert found.loss[60]["kl"] > 0


def made_up(kl=0.01, plan=12, full=12) -> Verdict:
    """A verdict on one kind with 12 questions, of which plan and full model answer the first ones."""
    number = np.arange(12)
    exact = np.stack((number < plan, number < full), axis=1)
    return Verdict({256: {"kl": kl, "first": 0.5, "same": 0.9}}, {("codes", 256): exact})


@pytest.mark.parametrize(
    ("figures", "holds"),
    [
        ({}, True),
        ({"kl": 0.03}, True),
        ({"kl": 0.031}, False),
        ({"plan": 11}, True),  # within the interval
        ({"plan": 7}, False),
        ({"plan": 0, "full": 2}, True),  # too few to count
        ({"plan": 0, "full": 3}, False),
        ({"plan": 3, "full": 3}, True),
        ({"plan": 0, "full": 0}, True),
    ],
)
def test_the_limits(figures, holds):
    verdict = made_up(**figures)
    assert verdict.holds == verdict.record()["holds"] == holds
    assert ("not hold" in verdict.sentence) != holds
    if not holds:
        assert ("KL at 256" if "kl" in figures else "codes at 256") in verdict.sentence
    is_judged = figures.get("full", 12) >= 3
    assert ("too few exact answers to judge codes at 256" in verdict.sentence) != is_judged
    assert ("no exact answer" in verdict.sentence) == (figures.get("full") == 0)
    assert verdict.sentence.count("of all exact answers") == (figures.get("full") != 0)
    assert verdict.sentence in str(verdict)


def test_small_losses_of_all_kinds_add_up():
    """Each keeps 9 of 12 answers, which 12 questions alone do not prove to be fewer than 95 %."""
    number = np.arange(12)
    kinds = {(str(kind), 256): np.stack((number < 9, number < 12), axis=1) for kind in range(7)}
    loss = {256: {"kl": 0.01, "first": 0.01, "same": 0.9}}
    assert not Verdict(loss, kinds).holds
    assert Verdict(loss, kinds).sentence.startswith("The plan does not hold: of all exact answers it keeps 75% [")
    assert Verdict(loss, {("0", 256): kinds["0", 256]}).holds


def test_the_interval_is_that_of_a_ratio_of_means():
    """By the delta method, for 1,000 questions."""
    rng = np.random.default_rng(1)
    full = rng.random(1000) < 0.8
    plan = np.where(full, rng.random(1000) < 0.9, rng.random(1000) < 0.1)
    value, low, high = Verdict({}, {("codes", 256): np.stack((plan, full), axis=1)}).record()["kept"]
    assert value == pytest.approx(plan.sum() / full.sum(), abs=1e-4)
    error = np.std(plan - value * full.astype(float)) / full.mean() / 1000**0.5
    assert (low, high) == pytest.approx((value - 1.96 * error, value + 1.96 * error), abs=0.1 * error)


def test_a_record_fits_into_a_plan(verdict):
    record = verdict.record()
    plan = pop.PrunePlan((1,), about={"verdict": record})
    assert plan.about["verdict"] == json.loads(json.dumps(record))
    assert table(plan.about["verdict"]) == str(verdict)
    assert len(json.dumps(record)) < 5000
    assert [*record["loss"]] == [700, 928]
    assert record["answers"]["codes"][700] == [*map(int, verdict.exact["codes", 700].sum(0)), 2]
    assert record["kept"] is None  # random weights answer nothing


@pytest.mark.parametrize(
    ("texts", "options", "named"),
    [
        ([], {}, "texts"),
        ("text", {}, "texts"),
        ([""], {}, "empty"),
        (["few"], {}, "3 tokens"),
        ([TEXT], {"lengths": [3]}, "length"),
        ([TEXT], {"lengths": []}, "lengths"),
        ([TEXT], {"lengths": [64]}, "too short"),
        ([TEXT], {"questions": 0}, "questions"),
        ([TEXT], {"seed": -1}, "seed"),
    ],
)
def test_what_cannot_be_checked_is_refused(model, texts, options, named):
    with pytest.raises(pop.InputError, match=named):
        pop.check(model, PLAN, texts, progress=False, **options)


def test_weights_that_are_not_numbers_are_refused():
    broken = tiny_model(tiny_config())
    broken.module.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(pop.InputError, match="logits"):
        pop.check(broken, 0.5, [[*range(60)]], lengths=[50], questions=1, progress=False)
