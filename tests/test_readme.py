"""The README is true: its links exist, its Python runs as printed, its commands do what it says."""

import json
import re
import shlex
from pathlib import Path

import pytest

from pop import demo
from pop.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def test_every_link_leads_to_a_file():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_ci_runs_the_two_commands_as_printed():
    first, second = (line for block in blocks("bash") for line in block.splitlines() if line.startswith("pip "))
    assert (first, second) == ("pip install -e '.[demo]' && pop demo", "pip install -e '.[test]' && pytest")
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert second in script
    assert "pip install --quiet -e '.[demo]' && pop demo" in script


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_the_python_runs_as_printed(index, smollm2, capsys):
    exec(compile(blocks("python")[index], f"README.md, block {index + 1}", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_commands_run_as_printed(smollm2, capsys):
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("pop ")]
    assert len(lines) >= 3
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0
        assert capsys.readouterr().out.strip(), line


def test_the_demo_prints_what_the_readme_shows(smollm2, capsys):
    """All but the times: these are of a machine that the README names.

    The answers of calibrated plans are left out too: they turn on the last digits of a fit, which differ by machine.
    """
    assert main(["demo", "--runs", "1", "--max-new-tokens", "48", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    (shown,) = blocks("text")
    numbers, answers = shown.split("answers\n")
    assert len(rows) == 5
    for row in rows:
        label = demo.describe(row) + "  "
        (line,) = (line for line in numbers.splitlines() if line.startswith(label))
        *_, speedup, limit, kl = line.split()
        assert speedup.endswith("x")
        assert limit == f"{row['speedup_limit']:.2f}x"
        assert float(kl) == pytest.approx(row["kl_nats"], rel=0.05 if row["taps"] else 0, abs=0.001)
        (line,) = (line for line in answers.splitlines() if line.startswith(label))
        assert row["taps"] or line.removeprefix(label).strip() == row["answer"]
