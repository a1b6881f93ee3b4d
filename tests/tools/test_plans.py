"""tools/plans.py: the plans that ship are those that it makes."""

import sys

import pytest

import pop
from tools import plans
from tools.common import ROOT


@pytest.mark.parametrize("name", ["third", "14"])
def test_the_plans_that_ship_are_these(name):
    plan = pop.PrunePlan.load(ROOT / f"pop/data/plans/smollm2-135m-{name}.plan")
    found = plans.Recipe(
        plan.layers, plan.corrections.rank, plan.about["steps"], plan.full_depth_last, plan.full_depth_selected
    )
    assert found == plans.PLANS[name]
    assert (plan.selecting_layer, plan.about["held_out"]) == (plans.SELECTING, plans.HELD_OUT)
    assert plan.about["texts"] == plans.DOCUMENTS + plans.MODULES + len(plans.builtin_texts())


def test_texts_are_parts_of_python():
    texts = plans.python_texts()
    assert [len(text) for text in texts] == [plans.CHARACTERS] * (plans.DOCUMENTS + plans.MODULES)
    assert texts == plans.python_texts() != plans.python_texts(seed=1)
    assert any("def " in text for text in texts[plans.DOCUMENTS :])


def test_a_plan_is_made_and_saved(monkeypatch, tmp_path, chat_folder):
    """With a tiny model, one step, and one of the texts."""
    monkeypatch.setattr(pop, "load", lambda name, *, load=pop.load, **options: load(chat_folder, **options))
    monkeypatch.setitem(plans.PLANS, "third", plans.Recipe((3, 4), rank=8, steps=1, last=5, share=0.2))
    monkeypatch.setattr(plans, "SELECTING", 2)
    monkeypatch.setattr(plans, "builtin_texts", list)
    texts = plans.python_texts()
    monkeypatch.setattr(plans, "python_texts", lambda: texts[:1])
    out, record = tmp_path / "third.plan", tmp_path / "record"
    monkeypatch.setattr(sys, "argv", ["plans", "third", "--out", str(out), "--resume", str(record)])
    plans.main()
    plan = pop.PrunePlan.load(out)
    assert (plan.layers, plan.full_depth_last, plan.full_depth_selected, plan.selecting_layer) == ((3, 4), 5, 0.2, 2)
    assert (plan.corrections.rank, plan.about["steps"]) == (8, 1) and record.exists()
    assert plan.about["speedup_limit"]["512 tokens"] == round(plan.speedup(pop.load("tiny"), 512), 3)
