"""tools/vllm/trial.py, with a program in vLLM's place that says what it was asked."""

import json
import re
import shutil
from pathlib import Path

import pytest
from support.tiny_chat import write_chat_checkpoint

import pop
from tools.common import ROOT
from tools.vllm import trial

# It takes 2 ms at full depth, and 1 ms if it prunes.
PROGRAM = """
import json, os, sys, pop
words = sys.argv[1:]
plan = pop.PrunePlan.load(os.environ["POP_PLAN"])
with open("asked", "a") as file:
    print(json.dumps([words[:-2], plan.layers, plan.full_depth_last, plan.full_depth_selected]), file=file)
if "--fail" in words:
    print("early", "pop.errors.UnsupportedError: no", *["late"] * 99, sep="\\n")
    sys.exit(1)
if "--killed" in words:
    for line in range(99):
        print(line, flush=True)
    os.kill(os.getpid(), 9)
if "--silent" in words:
    sys.exit()
if plan.layers and "--idle" not in words:
    print("pop: now pruning")
with open(words[-1], "w") as file:
    json.dump({"percentiles": {"50": 0.001 if plan.layers else 0.002}}, file)
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*words, status=0) measures a model of six layers. It returns what was printed, and what vLLM was asked."""
    folder = write_chat_checkpoint(tmp_path / "tiny", num_layers=6)
    monkeypatch.setattr(trial, "PROGRAM", PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(*words, status=0):
        assert trial.main([str(folder), *words]) == status
        asked = tmp_path / "asked"
        lines = [json.loads(line) for line in asked.read_text().splitlines()] if asked.exists() else []
        return capsys.readouterr(), lines

    return run


def test_two_plans_are_measured_beside_full_depth(run, tmp_path):
    """Quantised weights have the limits of the original ones."""
    options = ["--input-len", "300", "--tensor-parallel-size", "2", "--enable-prefix-caching"]
    (out, _), asked = run(*options)
    words = ["--model", str(tmp_path / "tiny"), "--input-len", "300", "--batch-size", "1", "--output-len", "1"]
    words += [*options[2:], "--no-enable-prefix-caching"]
    assert asked == [[words, [], 1, 0.0], [words, [4, 5], 192, 0.0], [words, [4, 5], 192, 0.0512]]
    rows = [line.split() for line in out.splitlines()[1:]]
    assert [row[:3] for row in rows] == [["none", "2", "1.00x"], ["plain", "1", "2.00x"], ["selects", "1", "2.00x"]]
    model = pop.load(tmp_path / "tiny", prune=None)
    plans = [pop.PrunePlan((4, 5), 192, 1, full_depth_selected=share) for share in (0.0, 0.0512)]
    assert [row[3] for row in rows[1:]] == [f"{plan.speedup(model, 300):.2f}x" for plan in plans]
    path = tmp_path / "tiny" / "config.json"
    fields = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "compressed-tensors"}}
    path.write_text(json.dumps(fields))
    assert run(*options)[0].out == out


def test_a_saved_plan_is_measured_in_their_place(run, tmp_path):
    pop.PrunePlan((3, 5)).save(tmp_path / "my.plan")
    (out, _), asked = run("--plan", "my.plan")
    assert [layers for _, layers, *_ in asked] == [[], [3, 5]]
    assert re.search(r"^my\.plan +1 +2\.00x", out, re.M)


@pytest.mark.parametrize(
    ("words", "says", "tried"),
    [
        (["--fail"], "pop.errors.UnsupportedError: no\ntrial: vLLM has ended with status 1 for the plan none", 1),
        (["--killed"], "97\n98\ntrial: vLLM has ended with status -9", 1),
        (["--silent"], "vLLM has measured nothing with the plan none", 1),
        (["--idle"], "with the plan plain, vLLM has pruned nothing", 2),
        (["--plan", "missing.plan"], "missing.plan", 0),
        (["--plan", "5-6"], "the model's layers are 0 to 5", 0),
        (["--input-len", "90"], "the plan plain prunes no prompt of 90 tokens", 0),
        (["--input-len", "0"], "--input-len", 0),
    ],
)
def test_a_run_that_measures_nothing_is_an_error(words, says, tried, run):
    (_, err), asked = run(*words, status=2)
    for kept in re.findall(r"the lines above are from (\S+)", err):
        assert says.partition("\n")[0] in Path(kept).read_text()
        shutil.rmtree(Path(kept).parent)
    assert says in err and "late" not in err and "\n83\n" not in err and len(asked) == tried
