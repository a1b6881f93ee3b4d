"""Files that an earlier version has saved still load, with the same content: plans and importance scores.

tools/goldens/saved.py says what is in them; tests/goldens/saved/facts.json says which version has made them.
"""

import json

import pytest
import torch

import pop
from pop.system.files import read_tensors
from tools.goldens import saved

FACTS = json.loads((saved.FOLDER / "facts.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved.chat_model(tmp_path_factory.mktemp("models") / "chat")


@pytest.fixture
def calibrated(model):
    return pop.PrunePlan.load(saved.FOLDER / "calibrated.plan")


@pytest.mark.parametrize("family", saved.CONFIGS)
def test_fingerprints_stay(family):
    """The fingerprint in a saved plan is compared with the model's."""
    assert saved.fingerprint(family) == FACTS["fingerprints"][family]


def test_a_plan_loads(tmp_path):
    plan = pop.PrunePlan.load(saved.FOLDER / "plan.json")
    assert plan == pop.PrunePlan((1, 3, 4), full_depth_last=8, full_depth_first=2)
    plan.save(tmp_path / "plan.json")  # today's record says which version has written it
    old = json.loads((saved.FOLDER / "plan.json").read_text(encoding="utf-8"))
    new = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert new == old | {"about": {"version": pop.__version__}}


def test_a_calibrated_plan_loads(model, calibrated, tmp_path):
    corrections = calibrated.corrections
    assert (calibrated.layers, calibrated.full_depth_last, calibrated.full_depth_first) == ((1,), 4, 1)
    assert corrections.weight.dtype == torch.float32 and list(corrections.weight.shape[:3]) == [1, 2, 20]
    assert saved.sums(corrections) == FACTS["calibrated_sums"]
    assert corrections.fingerprint == model.fingerprint
    assert model.resolve(calibrated).layers == (1,)
    calibrated.save(tmp_path / "calibrated.plan")
    old, old_facts = read_tensors(saved.FOLDER / "calibrated.plan")
    new, new_facts = read_tensors(tmp_path / "calibrated.plan")
    fields = json.loads(old_facts["pop_plan"])
    fields["about"]["version"] = pop.__version__
    assert json.loads(new_facts["pop_plan"]) == fields
    assert new.keys() == old.keys() and all(torch.equal(new[name], old[name]) for name in old)


def test_importance_scores_load(tmp_path):
    scores = pop.Importance.load(saved.FOLDER / "importance.json")
    fields = json.loads((saved.FOLDER / "importance.json").read_text())
    assert scores.num_samples == fields["num_samples"] == 4
    for name in ("prefill", "decode", "prefill_error", "decode_error"):
        assert getattr(scores, name).tolist() == fields[name]
    scores.save(tmp_path / "importance.json")
    assert (tmp_path / "importance.json").read_bytes() == (saved.FOLDER / "importance.json").read_bytes()


@pytest.mark.parametrize("number", range(len(saved.SETTINGS)))
def test_a_seed_samples_the_same_tokens(number):
    assert saved.picks(saved.SETTINGS[number]) == FACTS["picks"][number]
