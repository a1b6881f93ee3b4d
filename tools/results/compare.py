"""Compare two methods of one run with each other, where the tables compare each with the full model.

python -m tools.evaluate --prune third --prune default --tasks text --json mine.json
python -m tools.results.compare mine.json third default

Both have seen the same windows and questions, so the differences are paired. An interval that covers 95 % misses the
true value in one of twenty comparisons.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from pop.errors import InputError
from tools.common import exit_status
from tools.evaluate.text import interval
from tools.results.leaderboard import KINDS, kind_of
from tools.results.rows import read_result


def differences(path: str, first: str, second: str) -> dict[str, dict]:
    """The first method's mean figures minus the second's: {figure: {"value", "low", "high"}}.

    Raises InputError for a file or a method that lacks them.
    """
    result = read_result(path)
    methods = first, second
    found = {}
    try:
        for domain, text in result.get("text", {}).items():
            found[f"KL, {domain}, nats"] = _paired(text["rows"], "by_window", "kl", methods)
        answers = result["retrieval"]["rows"]
        for group, which in _groups(answers[first]["by_question"].get("kind", [])).items():
            found[f"exact answers{group}, share"] = _paired(answers, "by_question", "exact", methods, which)
            found[f"log-probability{group}, nats"] = _paired(answers, "by_question", "log_prob", methods, which)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        names = ", ".join(result.get("contenders", ()))
        advice = f"it has the methods {names}; write it with tools.evaluate --tasks text --json"
        raise InputError(f"{path} lacks {error} for {first} or {second}; {advice}") from None
    return found


def _groups(kinds: list[str]) -> dict[str, np.ndarray | slice]:
    """Which questions are in a group: all, those of the task retrieval, those of other tasks, and each kind."""
    groups = {"": slice(None)}
    in_retrieval = np.array([kind_of(kind) in KINDS for kind in kinds], dtype=bool)
    if in_retrieval.any() and not in_retrieval.all():
        groups[", all of retrieval"] = in_retrieval
        groups[", all of other tasks"] = ~in_retrieval
    for kind in dict.fromkeys(kinds):
        groups[f", {kind}"] = np.array(kinds) == kind
    return groups


def _paired(rows: dict[str, dict], figures: str, name: str, methods: tuple[str, str], which=slice(None)) -> dict:
    """The first method's figures minus the second's, of `which` windows or questions."""
    first, second = (np.array(rows[method][figures][name])[which] for method in methods)
    return interval(first - second)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.results.compare", description=__doc__.splitlines()[0])
    parser.add_argument("file", help="written by tools.evaluate --json")
    parser.add_argument("first", help="a method, as a row of the tables is called")
    parser.add_argument("second", help="another method")
    args = parser.parse_args(argv)

    def work() -> None:
        found = differences(args.file, args.first, args.second)
        print(f"{args.first} minus {args.second}, with intervals of 95 %")
        for name, figure in found.items():
            ends = "too few for an interval"
            if figure["low"] is not None:
                ends = f"[{figure['low']:+.4f}, {figure['high']:+.4f}]"
            print(f"{name}: {figure['value']:+.4f} {ends}")

    return exit_status("compare", work)


if __name__ == "__main__":
    sys.exit(main())
