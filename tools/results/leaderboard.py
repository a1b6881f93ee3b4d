"""Print the table of tools/results/plans, one row for each file: plans, what they keep and how fast they are.

python -m tools.results.leaderboard
python -m tools.results.leaderboard mine.json
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from pop.errors import InputError
from pop.system.files import read_json
from tools.common import exit_status

PLANS = Path(__file__).parent / "plans"
# What a row must say, and what it may. A figure that is null or missing is not known.
NEEDED = ("model", "plan")
TEXTS = (*NEEDED, "machine", "commit")
FIGURES = ("speedup_2048", "speedup_8192", "kl", "retrieved", "lambada")
KINDS = ("codes", "needle", "documents", "quotes")  # of retrieval
HEADS = ("model", "plan", "2,048 tokens", "8,192 tokens", "KL, nats", *KINDS, "all", "LAMBADA", "machine", "commit")


def read_row(path: Path) -> dict:
    """A row. Raises InputError, which names the field, for a file that is none."""
    row = read_json(path, InputError)
    for name in row:
        if name not in (*TEXTS, *FIGURES, "kinds"):
            raise InputError(f"{path} has the field {name!r}; a row has {', '.join((*TEXTS, *FIGURES))}, kinds")
    for name in TEXTS:
        value = row.get(name)
        is_text = isinstance(value, str) and value
        if not is_text and (name in NEEDED or value is not None):
            raise InputError(f"{path}: {name} is {value!r}; it must be a text that is not empty")
    if row.get("commit") is not None and not re.fullmatch("[0-9a-f]{7,40}", row["commit"]):
        raise InputError(f"{path}: commit is {row['commit']!r}; it must be that of git, or null")
    for name in FIGURES:
        _check_figure(path, name, row.get(name), 1 if name in ("retrieved", "lambada") else 1000)
    kinds = row.get("kinds", {})
    if not isinstance(kinds, dict) or not {*kinds} <= {*KINDS}:
        raise InputError(f"{path}: kinds is {kinds!r:.80}; it may have {', '.join(KINDS)}")
    for name, share in kinds.items():
        _check_figure(path, f"kinds.{name}", share, 1)
    return row


def _check_figure(path: Path, name: str, value, most: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (is_number and 0 <= value <= most):
        raise InputError(f"{path}: {name} is {value!r}; it must be a number from 0 to {most}, or null")


def table(rows: list[dict]) -> str:
    """The rows as a table in Markdown, by model, the fastest first."""
    rows = sorted(rows, key=lambda row: (row["model"], -(row.get("speedup_2048") or 0), row["plan"]))
    lines = [HEADS, ["---"] * len(HEADS), *map(_cells, rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in lines)


def _cells(row: dict) -> list[str]:
    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value).replace("%", " %")

    kinds = row.get("kinds", {})
    return [
        row["model"],
        row["plan"],
        cell(row.get("speedup_2048"), "{:.2f}x"),
        cell(row.get("speedup_8192"), "{:.2f}x"),
        cell(row.get("kl"), "{:.3f}"),
        *(cell(kinds.get(kind), "{:.0%}") for kind in KINDS),
        cell(row.get("retrieved"), "{:.0%}"),
        cell(row.get("lambada"), "{:.1%}"),
        row.get("machine") or "-",
        (row.get("commit") or "-")[:7],
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.results.leaderboard", description=__doc__.splitlines()[0])
    parser.add_argument("files", help="rows; default: those of tools/results/plans", nargs="*", type=Path)
    args = parser.parse_args(argv)
    return exit_status(
        "leaderboard", lambda: print(table([*map(read_row, args.files or sorted(PLANS.glob("*.json")))]))
    )


if __name__ == "__main__":
    sys.exit(main())
