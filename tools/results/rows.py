"""Turn the figures of `tools.evaluate --json` into a table for README.md.

python -m tools.evaluate --prune default --tasks text,ttft --json mine.json
python -m tools.results.rows mine.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pop.errors import InputError
from pop.system.files import read_json
from tools.common import exit_status

COLUMNS = ("plan", "perplexity", "KL, nats", "same top token", "retrieved", "of full", "speedup", "limit")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.results.rows", description=__doc__.splitlines()[0])
    parser.add_argument("files", help="written by tools.evaluate --json", nargs="+")
    args = parser.parse_args(argv)

    def work() -> None:
        for path in args.files:
            print(section(path))

    return exit_status("results", work)


def section(path: str) -> str:
    """A file's figures as a section of README.md. Raises InputError for other files."""
    result = read_json(path, InputError)
    try:
        return _section(Path(path).stem, result)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} lacks figures ({error!r}); write it with python -m tools.evaluate --json") from None


def _section(title: str, result: dict) -> str:
    computer = result["machine"]
    lines = [
        f"## {title}: {result['model']} in {result['dtype']}, prompts of {result['tokens']['prompt']:,} tokens",
        "",
        f"{computer['device']}, {computer['threads']} threads, torch {computer['torch']}, pop {result['version']}",
        "",
        "```bash",
        result["command"],
        "```",
        "",
        _row(COLUMNS),
        _row("---" for _ in COLUMNS),
    ]
    lines += [_row(_cells(result, name)) for name in result["contenders"]]
    return "\n".join(lines)


def _cells(result: dict, name: str) -> list[str]:
    """The cells of COLUMNS for one contender. A figure that was not measured is an empty cell."""
    cells = _text_cells(result, name)
    cells += _retrieval_cells(result, name)
    for figure in ("speedup", "limit"):
        value = result["ttft"][name][figure] if "ttft" in result else None
        cells.append("" if value is None else f"{value:.2f}x")
    return [_plan(result, name), *(cell.replace("%", " %") for cell in cells)]


def _plan(result: dict, name: str) -> str:
    contender = result["contenders"][name]
    method = contender["method"]
    if not contender["pruned_layers"]:
        return method or "the full model"
    return f"{contender['pruned_layers']} of {result['num_layers']} layers: {method}"


def _text_cells(result: dict, name: str) -> list[str]:
    if "text" not in result:
        return [""] * 3
    domain = next(iter(result["text"].values()))
    row = domain["rows"][name]
    if not result["contenders"][name]["method"]:  # the full model
        return [f"{row['perplexity']:.2f}", "", ""]
    return [f"{row['perplexity_change']['value']:+.1%}", f"{row['kl']['value']:.3f}", f"{row['same']['value']:.1%}"]


def _retrieval_cells(result: dict, name: str) -> list[str]:
    if "retrieval" not in result:
        return [""] * 2
    row = result["retrieval"]["rows"][name]
    share = f"{row['share']['value']:.0%}" if row["share"] else ""
    return [f"{row['exact']:.0%}", share]


def _row(cells) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


if __name__ == "__main__":
    sys.exit(main())
