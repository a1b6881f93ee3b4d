"""tools/results: rows from figures, and a table that states what the other README.md files state."""

import json
import re

import pytest
from support.readme import READMES

from tools.results.rows import main

FIGURES = {
    "model": "mine",
    "num_layers": 6,
    "machine": {"device": "A|B", "threads": 2, "torch": "2.0"},
    "version": "0.1.0",
    "tokens": {"prompt": 64},
    "contenders": {
        "full": {"method": "", "pruned_layers": 0},
        "half": {"method": "calibrated", "pruned_layers": 3},
    },
    "text": {
        "all": {
            "rows": {
                "full": {"perplexity": 18.284},
                "half": {
                    "perplexity": 20.0,
                    "perplexity_change": {"value": 0.0941},
                    "kl": {"value": 0.0496},
                    "same": {"value": 0.9},
                },
            }
        },
        "a": {},
    },
    "retrieval": {
        "rows": {"full": {"exact": 0.98, "share": {"value": 1}}, "half": {"exact": 0.5, "share": {"value": 0.51}}},
    },
    "ttft": {"full": {"speedup": 1, "limit": 1}, "half": {"speedup": 1.5, "limit": None}},
}
EMPTY = ("text", "retrieval", "ttft")


@pytest.mark.parametrize(
    ("left_out", "full", "half"),
    [
        ((), "18.28 | | | 98 % | 100 % | 1.00x | 1.00x", "+9.4 % | 0.050 | 90.0 % | 50 % | 51 % | 1.50x |"),
        (EMPTY, "| | | | | |", "| | | | | |"),
    ],
)
def test_figures_become_rows(left_out, full, half, tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({name: value for name, value in FIGURES.items() if name not in left_out}))
    assert main([str(path)]) == 0
    assert [re.sub(" +", " ", line) for line in capsys.readouterr().out.splitlines()] == [
        "| run | A/B, 2 threads, torch 2.0 | 0.1.0 | COMMAND |",
        f"| run | mine | 64 | the full model | {full} |",
        f"| run | mine | 64 | 3 of 6 layers: calibrated | {half} |",
    ]


@pytest.mark.parametrize("content", [None, "", "{}", "[]", json.dumps(FIGURES | {"text": []})])
def test_other_files_are_refused_in_a_sentence(content, tmp_path, capsys):
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content)
    assert main([str(path)]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1) and str(path) in err


def cells(path: str, heading: str) -> list[list[str]]:
    """The rows of the tables of one section of a README."""
    section = re.split(r"^## ", READMES[path], flags=re.M)
    (text,) = (part for part in section if part.startswith(heading))
    lines = re.findall(r"^\|(.+)\|$", text, re.M)
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def test_the_table_states_what_the_others_do():
    """The figures of each row elsewhere, and each of its pairs "1.35x of 1.43x", stand in one row here."""
    results = [set(row) for row in cells("tools/results/README.md", "Results\n")]
    rows = [*cells("README.md", "What it buys")]
    rows += cells("tools/evaluate/README.md", "SmolLM2") + cells("tools/evaluate/README.md", "Gemma")
    stated = [row[1:] for row in rows if re.match(r"[+x] ?\d", row[1])]
    stated += [cell.split(" of ") for row in rows for cell in row if "x of " in cell]
    assert len(stated) == 9 + 10 + 19 + 8
    for figures in stated:
        wanted = {figure for figure in figures if figure and ", " not in figure}
        assert any(wanted <= row for row in results), figures
