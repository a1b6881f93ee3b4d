"""tools/fuzz: a failure names its seed. The nightly profile runs the loops for long.

test_readme_tools.py runs a round of those that take no minutes.
"""

import re
from random import Random

import pytest
from hypothesis import Phase, settings
from support.nightly import NIGHTLY

from pop import reference
from tools.fuzz import __main__ as fuzz
from tools.fuzz.__main__ import LOOPS, main


@pytest.mark.skipif(not NIGHTLY, reason="takes ten minutes for each loop; run with HYPOTHESIS_PROFILE=nightly")
@pytest.mark.parametrize("name", LOOPS)
def test_nothing_fails_for_ten_minutes(name):
    assert main([name, "--minutes", "10", "--seed", str(Random().randrange(10**6))]) == 0


def test_a_wrong_answer_is_reported_with_its_seed(monkeypatch, capsys):
    """As if the reference took two more of a prompt's first tokens for full-depth ones."""
    right = reference.full_depth_tokens

    def wrong(prompt_length, num_tokens, plan):
        full_depth = right(prompt_length, num_tokens, plan)
        full_depth[:2] = True
        return full_depth

    monkeypatch.setattr(reference, "full_depth_tokens", wrong)
    monkeypatch.setattr(fuzz, "SETTINGS", settings(fuzz.SETTINGS, phases=[Phase.generate]))  # to reduce it takes long
    assert main(["plans", "--seed", "7"]) == 1
    (seed,) = re.findall(r"with `python -m tools.fuzz plans --seed (\d+) --minutes 0`", capsys.readouterr().out)
    assert main(["plans", "--seed", seed, "--minutes", "0"]) == 1
    monkeypatch.setattr(reference, "full_depth_tokens", right)
    capsys.readouterr()
    assert main(["plans", "--seed", seed, "--minutes", "0"]) == 0
    assert re.fullmatch(rf"plans: .* the seeds {seed} to {seed}; \d.*", capsys.readouterr().out.strip())


def test_an_unknown_loop_is_refused():
    with pytest.raises(SystemExit):
        main(["plan"])
