"""Turn the figures of `tools.evaluate --json` into a table for README.md.

python -m tools.evaluate --prune default --tasks text,ttft --json mine.json
python -m tools.results.rows mine.json
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from pop.errors import InputError, some
from pop.system.files import read_json
from tools.common import check_plot, exit_status, write_plot
from tools.evaluate.report import plot, summary_rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.results.rows", description=__doc__.splitlines()[0])
    parser.add_argument("files", help="written by tools.evaluate --json", nargs="+")
    parser.add_argument("--plot", help="an SVG or PNG: draw the first file's losses over its speeds", metavar="FILE")
    args = parser.parse_args(argv)

    def work() -> None:
        if args.plot:
            draw(args.files[0], args.plot)
        for path in args.files:
            print(section(path))

    return exit_status("results", work)


def read_result(path: str | Path) -> dict:
    """What `tools.evaluate --json` has written of a run that ended. Raises InputError for another one."""
    result = read_json(path, InputError)
    unfinished = result.get("unfinished")
    if unfinished:
        raise InputError(f"{path} is unfinished: {unfinished} did not run to the end; run its command again")
    return result


def draw(path: str, target: str) -> None:
    """What `tools.evaluate --plot` draws of a run. Raises InputError for one without text or ttft."""
    result = read_result(path)
    if not {"text", "ttft"} <= result.keys():
        raise InputError(f"{path} has no text or no ttft; measure with --tasks text,ttft")
    write_plot(target, plot(result, check_plot(target)))


def section(path: str) -> str:
    """A file's figures as a section of README.md, also of a run that did not end. Raises InputError for other files."""
    result = read_json(path, InputError)
    try:
        return _section(Path(path).stem, result)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} lacks figures ({error!r}); write it with python -m tools.evaluate --json") from None


def _section(title: str, result: dict) -> str:
    computer = result["machine"]
    versions = f"torch {computer['torch']}, Python {computer['python']}, pop {result['version']}"
    if result.get("commit"):
        versions += f" at {result['commit']}"
    first, *rows = summary_rows(result)
    if not rows:
        raise ValueError("text, retrieval or ttft")
    lines = [
        f"## {title}: {result['model']} in {result['dtype']}",
        "",
        f"{computer['device']}, {computer['threads']} threads, {versions}. {_counts(result)}. Intervals cover 95 %.",
        *(f"Unfinished: {task}." for task in result.get("unfinished", ())),
        "",
        "```bash",
        result["command"],
        "```",
        "",
        _row(["prompt encoded with", *first[1:]]),
        _row("---" for _ in first),
    ]
    for name, *cells in rows:
        method = result["contenders"][name]["method"]
        lines.append(_row([f"{name}: {method}" if method else "the full model", *cells]))
    return "\n".join(lines)


def _counts(result: dict) -> str:
    """How many windows and questions there are, how long their prompts are, and the seed."""
    counts = []
    length = f"{result['tokens']['prompt']:,} tokens"
    for domain in list(result.get("text", {}).values())[:1]:  # the first one is all of them
        counts.append(f"{domain['windows']} windows of text after {length}")
    if "retrieval" in result:
        retrieval = result["retrieval"]
        (row, *_) = retrieval["rows"].values()
        lengths = dict.fromkeys(f"{int(kind.split()[-1]):,}" for kind in row["kinds"])  # as in "codes 512"
        counts.append(f"{retrieval['questions']} questions about prompts of {some(list(lengths))} tokens")
    if "ttft" in result:
        counts.append(f"TTFT after {length}")
    return ", ".join([*counts, f"seed {result['seed']}"])


def _row(cells) -> str:
    return f"| {' | '.join(re.sub(r'(?<! )%', ' %', cell.replace('|', '/')) for cell in cells)} |"


if __name__ == "__main__":
    sys.exit(main())
