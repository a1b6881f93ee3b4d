"""tools/results: rows from figures, and a table that states what the other README.md files state."""

import json
import re

import pytest
from support.goldens import GOLDENS
from support.readme import READMES

from tools.results.rows import main

# Made-up figures, as tools.evaluate writes them.
FIGURES = json.loads((GOLDENS / "evaluate" / "run.json").read_bytes())


@pytest.mark.parametrize(
    ("left_out", "full", "half"),
    [
        ((), "18.28 | | | 98 % | 100 % | 1.00x | 1.00x", "+9.4 % | 0.050 | 90.0 % | 50 % | 51 % | 1.50x |"),
        (("text", "retrieval", "ttft"), "| | | | | |", "| | | | | |"),
    ],
)
def test_figures_become_rows(left_out, full, half, tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({name: value for name, value in FIGURES.items() if name not in left_out}))
    assert main([str(path)]) == 0
    lines = [re.sub(" +", " ", line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "## run: mine, prompts of 64 tokens"
    assert "A|B, 2 threads, torch 2.0, pop 0.1.0" in lines
    assert lines[-2:] == [f"| the full model | {full} |", f"| 3 of 6 layers: calibrated | {half} |"]


def test_figures_without_a_table_are_refused(tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps(FIGURES | {"text": []}))
    assert main([str(tmp_path / "run.json")]) == 2
    assert "run.json" in capsys.readouterr().err


def rows(path: str) -> list[list[str]]:
    """The rows of all tables of a README, without the first column and without intervals."""
    lines = re.findall(r"^\|(.+)\|$", READMES[path], re.M)
    table = [[re.sub(r" \[.*\]", "", cell).strip() for cell in line.split("|")] for line in lines]
    return [row[1:] for row in table]


def test_each_loss_of_the_readme_is_among_the_results():
    """KL and the share of answers kept, in the README's rows that begin with a measured speedup."""
    results = [set(row) for row in rows("tools/results/README.md")]
    _full, *losses = [row[1:] for row in rows("README.md") if re.fullmatch(r"\d\.\d\dx", row[0])]
    assert len(losses) == 4
    for row in losses:
        assert any(set(row) <= figures for figures in results), row
