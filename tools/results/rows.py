"""Turn the figures of `tools.evaluate --json` into rows of the tables in README.md.

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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.results.rows", description=__doc__.splitlines()[0])
    parser.add_argument("files", help="written by tools.evaluate --json; the name is that of the run", nargs="+")
    args = parser.parse_args(argv)
    return exit_status("results", lambda: [print("\n".join(rows(path))) for path in args.files])


def rows(path: str) -> list[str]:
    """The row of a run, which lacks its command, and the rows of its contenders. Raises InputError for other files."""
    result, run = read_json(path, InputError), Path(path).stem
    try:
        computer = result["machine"]
        machine = f"{computer['device']}, {computer['threads']} threads, torch {computer['torch']}"
        lines = [_row(run, machine, result["version"], "COMMAND")]
        for name in result["contenders"]:
            lines.append(_row(run, result["model"], result["tokens"]["prompt"], *_cells(result, name)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} lacks figures ({error!r}); write it with python -m tools.evaluate --json") from None
    return lines


def _cells(result: dict, name: str) -> list[str]:
    """Plan, perplexity, KL, same top token, retrieved, of full, speedup and limit. Empty: not measured."""
    contender = result["contenders"][name]
    layers, method = contender["pruned_layers"], contender["method"]
    plan = f"{layers} of {result['num_layers']} layers: {method}" if layers else method or "the full model"
    text = next(iter(result["text"].values()))["rows"][name] if "text" in result else {}
    cells = [f"{text['perplexity']:.2f}", "", ""] if text else ["", "", ""]
    if "kl" in text and method:  # the full model's is 0
        cells = [f"{text['perplexity_change']['value']:+.1%}", f"{text['kl']['value']:.3f}"]
        cells.append(f"{text['same']['value']:.1%}")
    retrieval = result["retrieval"]["rows"][name] if "retrieval" in result else {}
    cells.append(f"{retrieval['exact']:.0%}" if retrieval else "")
    cells.append(f"{retrieval['share']['value']:.0%}" if retrieval and retrieval["share"] else "")
    for figure in ("speedup", "limit"):
        value = result["ttft"][name][figure] if "ttft" in result else None
        cells.append("" if value is None else f"{value:.2f}x")
    return [plan, *(cell.replace("%", " %") for cell in cells)]


def _row(*cells) -> str:
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


if __name__ == "__main__":
    sys.exit(main())
