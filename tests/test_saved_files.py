"""Files that an earlier version has saved still load, with the same content: plans, conversations, importance scores.

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
    """The fingerprint in a saved plan or conversation is compared with the model's."""
    assert saved.fingerprint(family) == FACTS["fingerprints"][family]


def test_a_plan_loads(tmp_path):
    plan = pop.PrunePlan.load(saved.FOLDER / "plan.json")
    assert plan == pop.PrunePlan((1, 3, 4), full_depth_last=8, full_depth_first=2)
    plan.save(tmp_path / "plan.json")  # today's record says which version has written it
    old = json.loads((saved.FOLDER / "plan.json").read_text(encoding="utf-8"))
    new = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert new == old | {"about": {"version": pop.__version__}}


def test_a_calibrated_plan_loads(model, calibrated, tmp_path):
    refit = calibrated.projections
    assert (calibrated.layers, calibrated.full_depth_last, calibrated.full_depth_first) == ((1,), 4, 1)
    assert (refit.taps, refit.weight.dtype, list(refit.weight.shape)) == (2, torch.float32, [1, 2, 20, 60])
    assert saved.sums(refit) == FACTS["calibrated_sums"]
    assert refit.fingerprint == model.fingerprint
    assert model.resolve(calibrated).layers == (1,)
    calibrated.save(tmp_path / "calibrated.plan")
    (old, old_facts), (new, new_facts) = map(
        read_tensors, (saved.FOLDER / "calibrated.plan", tmp_path / "calibrated.plan")
    )
    assert json.loads(new_facts["pop_plan"]) == json.loads(old_facts["pop_plan"]) | {
        "about": {"version": pop.__version__}
    }
    assert new.keys() == old.keys() and all(torch.equal(new[name], old[name]) for name in old)


def test_importance_scores_load(tmp_path):
    scores = pop.Importance.load(saved.FOLDER / "importance.json")
    fields = json.loads((saved.FOLDER / "importance.json").read_text())
    assert scores.num_samples == fields["num_samples"] == 4
    for name in ("prefill", "decode", "prefill_error", "decode_error"):
        assert getattr(scores, name).tolist() == fields[name]
    scores.save(tmp_path / "importance.json")
    assert (tmp_path / "importance.json").read_bytes() == (saved.FOLDER / "importance.json").read_bytes()


@pytest.mark.parametrize("name", ["chat.json", "chat-calibrated.json", "chat-cut.json"])
def test_a_conversation_loads_and_continues(name, model, calibrated, tmp_path):
    plan = calibrated if "calibrated" in name else saved.PLAN
    chat = model.load_chat(saved.FOLDER / name, plan=plan)
    turns = json.loads((saved.FOLDER / name).read_text(encoding="utf-8"))["turns"]
    assert [(turn.user, turn.assistant, turn.answer) for turn in chat.turns] == [
        (turn["user"], turn["assistant"], turn["answer"]) for turn in turns
    ]
    chat.save(tmp_path / name)  # in today's format, which has more fields
    content = json.loads((saved.FOLDER / name).read_text(encoding="utf-8"))
    content |= {"pop_conversation": 4, "enable_thinking": True}
    content["turns"] = [{"cut": ""} | turn for turn in turns]
    today = json.loads((tmp_path / name).read_text(encoding="utf-8"))
    if hashes := today["plan"]["projections"]:  # earlier, the weight's was the only one
        assert {*hashes} == {"weight", "bias"}
        today["plan"]["projections"] = hashes["weight"]
    assert today == content
    held_today = model.start_chat(chat.system, plan=plan)  # the same messages give the same answers
    message, max_new_tokens, _ = saved.MESSAGES[0]  # greedy; the next one is sampled, from other random numbers today
    held_today.send(message, max_new_tokens=max_new_tokens)
    assert held_today.turns == chat.turns[:1]
    assert chat.send("Go on", max_new_tokens=5).tokens


@pytest.mark.parametrize("number", range(len(saved.SETTINGS)))
def test_a_seed_samples_the_same_tokens(number):
    assert saved.picks(saved.SETTINGS[number]) == FACTS["picks"][number]
