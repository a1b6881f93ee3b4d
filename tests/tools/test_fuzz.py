"""tools/fuzz: each loop passes, and a failure names its seed. The nightly profile runs the loops for long."""

import argparse
import os
import re
from random import Random

import pytest
import torch

from tools.fuzz import files, harness, plans
from tools.fuzz.__main__ import LOOPS, main
from tools.fuzz.cases import Wrong

MANY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


@pytest.mark.skipif(not MANY, reason="takes ten minutes for each loop; run with HYPOTHESIS_PROFILE=nightly")
@pytest.mark.parametrize("name", LOOPS)
def test_nothing_fails_for_ten_minutes(name):
    assert main([name, "--minutes", "10", "--seed", str(Random().randrange(10**6))]) == 0


@pytest.mark.parametrize("module", [plans, files])
def test_some_cases_pass(module):
    loop = module.Loop()
    for seed in range(12):
        loop.try_one(Random(seed))
    assert re.search(r"\d", loop.summary())


def test_a_wrong_answer_is_found(monkeypatch):
    right = plans.by_reference
    monkeypatch.setattr(plans, "by_reference", lambda *args: right(*args) + torch.tensor([0.01] + [0.0] * 66))
    with pytest.raises(Wrong, match="logits"):
        plans.Loop().try_one(Random(1))


def test_a_failure_names_its_seed(capfd):
    args = argparse.Namespace(seed=41, minutes=1, cases=None, model=None)
    assert not harness.watch("a_loop_that_does_not_exist", args)
    assert "--seed 41 --cases 1" in capfd.readouterr().err
    assert main(["plans", "--seed", "41", "--cases", "1"]) == 0
