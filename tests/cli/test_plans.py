"""`pop plans`: what it prints of saved plans, and what it refuses."""

import json

import pytest
from safetensors.torch import save_file
from support.cases import random_corrections
from support.tiny import tiny_config, write_checkpoint

import pop
from pop.checkpoints import registry

REFIT = random_corrections(tiny_config(), (1, 3), seed=0)
RECORD = {
    "model": "mine",
    "tokens": 1234,
    "loss": {"continuation": 0.05, "copied": 0.5},
    "speedup_limit": {"512 tokens": 1.5},
}


def test_each_plan_is_printed_with_its_record(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    pop.PrunePlan((2, 3), full_depth_last=8, full_depth_selected=0.25, full_depth_below=300).save("plain")
    pop.PrunePlan((1, 3), full_depth_first=1, corrections=REFIT, about=RECORD).save("refit")
    (tmp_path / "old").write_text('{"layers": []}')
    assert run("plans", "plain", "refit", "old").out.splitlines() == [
        "plain: without layers 2 to 3, last 8 and 25% whole",
        "  pruned layers: 2, 3",
        "  below 300 tokens: the whole model",
        "  selected by: layer 1",
        f"  version: {pop.__version__}",
        "refit: without 2 layers, calibrated",
        "  pruned layers: 1, 3",
        f"  version: {pop.__version__}",
        "  model: mine",
        "  tokens: 1234",
        "  loss: continuation 0.0500 nats a token, copied 50%",
        "  speedup_limit: 512 tokens 1.50x",
        "old: the whole model",
    ]


VERDICT = {
    "holds": True,
    "sentence": "The plan holds.",
    "loss": {
        "256": {"kl": 0.012, "first": 0.02, "same": 0.93},
        "1024": {"kl": 0.02, "first": 0.03, "same": 0.9},
    },
    "answers": {"codes": {"256": [10, 12, 12], "1024": [9, 9, 12]}},
    "kept": [0.97, 0.93, 1.01],
}


def test_a_verdict_is_a_table_with_the_full_model_beside_the_plan(tmp_path, run):
    pop.PrunePlan((2, 3), about={"verdict": VERDICT}).save(tmp_path / "plan")
    first, layers, _, *lines = run("plans", tmp_path / "plan").out.splitlines()
    assert layers == "  pruned layers: 2, 3"
    assert first.endswith("without layers 2 to 3, keeps 97% [93%, 101%] of pop check's answers")
    cells = [" ".join(line.split()) for line in lines if line.strip()]
    assert cells == [
        "exact answers, plan / full model 256 tokens 1,024 tokens",
        "codes 10 / 12 of 12 9 / 9 of 12",
        "KL, nats a token 0.0120 0.0200",
        "KL of the first token 0.0200 0.0300",
        "same likeliest token 93.0% 90.0%",
        "The plan holds.",
    ]


def test_without_a_file_the_plans_that_are_here_are_listed(tmp_path, monkeypatch, run):
    """Those of the package, and those beside weights. A broken one does not hide the others."""
    monkeypatch.setattr(registry, "places", lambda: [tmp_path])
    folder = write_checkpoint(tmp_path / "llama3.2-1b")
    pop.PrunePlan((2,), about={"verdict": {"holds": False, "kept": [0.97, 0.9, 1.0]}}).save(folder / "default.plan")
    (folder / "broken.plan").write_text("{")
    (tmp_path / "owner" / "model").mkdir(parents=True)
    pop.PrunePlan((2, 3)).save(tmp_path / "owner" / "model" / "mine.plan")  # of `pop download OWNER/MODEL`
    lines = run("plans").out.splitlines()
    third = "without layers 20 to 29, last 192 and 5% whole, calibrated, keeps 95% [85%, 105%] of pop check's answers"
    assert f"smollm2-135m-third: {third}" in lines
    assert lines[-1] == f"{tmp_path / 'owner' / 'model' / 'mine.plan'}: without layers 2 to 3"
    kept = "keeps 97% [90%, 100%] of pop check's answers, but does not hold"
    assert lines[-2] == f"{folder / 'default.plan'}: without layers 2 to 2, {kept}"
    assert lines[-3].startswith(f"{folder / 'broken.plan'} is not a pruning plan")
    unjudged = pop.PrunePlan((2,), about={"verdict": {"holds": False, "kept": None}})  # by its KL alone
    assert unjudged.judgement == ", does not hold"


@pytest.mark.parametrize(
    "content", [None, b"", b"{}", b'{"layers": [1], "about": []}', b'{"layers":[1],"\\u001b[2J":1}']
)
def test_a_file_that_is_no_plan_is_refused_in_a_sentence(content, tmp_path, run):
    path = tmp_path / "plan"
    if content is not None:
        path.write_bytes(content)
    out, err = run("plans", path, status=2)
    assert (out, len(err.splitlines())) == ("", 1)
    assert str(path) in err and err.strip().isprintable()


HOSTILE = "\x1b]0;x\a\n\x9b2J\u202e\ud800" + "x" * 4000
WRONG = {"answers": {HOSTILE: {"256": [1, 2]}}, "loss": {HOSTILE: 3}, "kept": [HOSTILE], "sentence": None}


@pytest.mark.parametrize(
    "about",
    [{HOSTILE: HOSTILE}, {"a": {HOSTILE: [HOSTILE]}}, {"": None}, {"verdict": HOSTILE}, {"verdict": None}]
    + [{"verdict": VERDICT | {name: value}} for name, value in (*WRONG.items(), ("kept", [1, 10**400, 1]))],
)
def test_a_record_cannot_drive_a_terminal(about, tmp_path, run):
    fields = {"layers": [1, 3], "full_depth_last": 1, "full_depth_first": 1}
    metadata = {"pop_plan": json.dumps(fields | {"about": about})}
    save_file(REFIT.tensors | {"sketch": REFIT.sketch}, tmp_path / "plan", metadata=metadata)
    lines = run("plans", tmp_path / "plan").out.splitlines()
    assert len(lines) == 3 or "verdict" in about
    assert all(line.isprintable() and line.isascii() and len(line) < 500 for line in lines)
