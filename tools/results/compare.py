"""Compare two methods of one run with each other, where the tables compare each with the full model.

python -m tools.evaluate --prune third --prune default --tasks text --json mine.json
python -m tools.results.compare mine.json third default

Both have seen the same windows and questions, so the differences are paired. With --other, the second method is that of
another run with these windows and questions. An interval that covers 95 % misses the true value in one of twenty
comparisons.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from pop.errors import InputError
from tools.common import exit_status
from tools.evaluate.text import interval
from tools.results.leaderboard import KINDS, kind_of
from tools.results.rows import read_result


def differences(path: str, first: str, second: str, other: str | None = None) -> dict[str, dict]:
    """The first method's mean figures minus the second's: {figure: {"value", "low", "high"}}.

    Args:
        path: Of the run with the first method.
        first, second: The names of the methods.
        other: Of the run with the second method, on the same windows and questions. None: it is the first one.

    Raises:
        InputError: A file or a method lacks the figures, or the full models of two runs differ.
    """
    result = read_result(path)
    seed = result.get("seed", 0)
    found = {}
    try:
        first = _name_in(result, first, path)
        if other is None:
            second = _name_in(result, second, path)
        else:
            other_result = read_result(other)
            second = _add_rows(result, other_result, _name_in(other_result, second, other))
        methods = first, second
        for domain, text in result.get("text", {}).items():
            found[f"KL, {domain}, nats"] = _paired(text["rows"], "by_window", "kl", methods, seed)
        answers = result["retrieval"]["rows"]
        for group, which in _groups(answers[first]["by_question"].get("kind", [])).items():
            found[f"exact answers{group}, share"] = _paired(answers, "by_question", "exact", methods, seed, which)
            found[f"log-probability{group}, nats"] = _paired(answers, "by_question", "log_prob", methods, seed, which)
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        advice = "write it with tools.evaluate --tasks text --json"
        raise InputError(f"{path} lacks {error} for {first} or {second}; {advice}") from None
    return found


def _name_in(result: dict, method: str, path: str) -> str:
    """The name of a method in the result of a file. A plan's file may be given with its folder, as to --prune."""
    names = result.get("contenders", ())
    for name in (method, Path(method).name):
        if name in names:
            return name
    raise InputError(f"{path} has no method {method}; it has {', '.join(names) or 'none'}")


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


def _add_rows(result: dict, other: dict, method: str) -> str:
    """Add a method of another run to a result, and return the name that it has there.

    Raises InputError if the runs differ in what the full model does.
    """
    name_here = f"{method} of the other run"  # the result may have a method of this name
    texts = [", ".join(sorted(run.get("text", {}))) or "none" for run in (result, other)]
    if texts[0] != texts[1]:
        raise InputError(f"one run has the texts {texts[0]}, and the other one {texts[1]}; give runs of equal texts")
    pairs = [(result["retrieval"]["rows"], other["retrieval"]["rows"], "by_question", "log_prob")]
    for domain, text in result.get("text", {}).items():
        pairs.append((text["rows"], other["text"][domain]["rows"], "by_window", "nll"))
    for mine, theirs, figures, name in pairs:
        own = mine["full"][figures][name]
        full = theirs["full"][figures][name]
        if len(own) != len(full) or not np.allclose(own, full, atol=1e-3):
            raise InputError(
                "the full models of the two runs differ, so they had other windows, questions or weights; another "
                "version of Python also gives other ones"
            )
        mine[name_here] = theirs[method]
    return name_here


def _paired(
    rows: dict[str, dict], figures: str, name: str, methods: tuple[str, str], seed: int, which=slice(None)
) -> dict:
    """The first method's figures minus the second's, of `which` windows or questions."""
    first, second = (np.array(rows[method][figures][name])[which] for method in methods)
    return interval(first - second, seed=seed)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.results.compare", description=__doc__.splitlines()[0])
    parser.add_argument("file", help="written by tools.evaluate --json")
    parser.add_argument("first", help="a method, as a row of the tables is called")
    parser.add_argument("second", help="another method")
    parser.add_argument("--other", help="the file of the second method, if it is another run of the same questions")
    args = parser.parse_args(argv)

    def work() -> None:
        found = differences(args.file, args.first, args.second, args.other)
        origin = f" of {args.other}" if args.other else ""
        print(f"{args.first} minus {args.second}{origin}, with intervals of 95 %")
        for name, figure in found.items():
            ends = "too few for an interval"
            if figure["low"] is not None:
                ends = f"[{figure['low']:+.4f}, {figure['high']:+.4f}]"
            print(f"{name}: {figure['value']:+.4f} {ends}")

    return exit_status("compare", work)


if __name__ == "__main__":
    sys.exit(main())
