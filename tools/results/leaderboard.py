"""Print the page of all plans, one row for each file of tools/results/plans: what plans keep, and how fast they are.

python -m tools.results.leaderboard > tools/results/PLANS.md
python -m tools.results.leaderboard mine.json
python -m tools.results.leaderboard --from figures.json --plan smollm2-135m-third > mine.json

The last one makes a file of the figures that `tools.evaluate --json` has written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from itertools import compress
from pathlib import Path

import numpy as np

from pop.errors import InputError
from pop.pruning.plan import SHIPPED
from pop.system.files import read_json
from tools.common import exit_status
from tools.evaluate.retrieval import share_of
from tools.evaluate.text import read_domains
from tools.results.rows import read_result

PLANS = Path(__file__).parent / "plans"
# What a row must say, and what it may. A figure that is null or missing is not known.
NEEDED = ("model", "plan")
TEXTS = (*NEEDED, "machine", "commit", "run", "dtype", "texts", "python")
FIGURES = ("speedup_2048", "speedup_8192", "limit_2048", "kl", "retrieved", "lambada")
COUNTS = ("prompt_tokens", "windows", "questions", "question_tokens", "seed")
KINDS = ("codes", "needle", "documents", "quotes")  # of retrieval
FIELDS = (*TEXTS, *FIGURES, *COUNTS, "kept", "kinds")
HEADS = (
    "plan",
    "limit at 2,048 tokens",
    "speedup at 2,048",
    "at 8,160 or 8,192",
    "KL, nats",
    "after tokens",
    *KINDS,
    "all",
    "of full",
    "LAMBADA",
    "machine",
    "commit",
    "run",
)
OTHER = ", measured in other ways"
FULL = "the full model"
TITLE = """# All plans

`python -m tools.results.leaderboard > tools/results/PLANS.md` writes this page. [README.md](README.md#all-plans)
explains the columns, and how to add a row. Compare rows of one table only, and speedups only where the column "machine"
says the same of them: the commit is that of the losses.
Plans in bold are those that ship. Questions of ruler are left out, so shares differ from those of tables that count
them. The rows of novel, manual and c are those of the [unseen texts](README.md#on-unseen-texts).
"""


def read_row(path: Path) -> dict:
    """A row. Raises InputError, which names the field, for a file that is none."""
    row = read_json(path, InputError)
    for name in row:
        if name not in FIELDS:
            raise InputError(f"{path} has the field {name!r}; a row has {', '.join(FIELDS)}")
    for name in TEXTS:
        value = row.get(name)
        is_text = isinstance(value, str) and value
        if not is_text and (name in NEEDED or value is not None):
            raise InputError(f"{path}: {name} is {value!r}; it must be a text that is not empty")
    if row.get("commit") is not None and not re.fullmatch("[0-9a-f]{7,40}(-dirty)?", row["commit"]):
        raise InputError(f"{path}: commit is {row['commit']!r}; it must be that of git, or null")
    for name in FIGURES:
        _check_figure(path, name, row.get(name), 1 if name in ("retrieved", "lambada") else 1000)
    for name in COUNTS:
        value = row.get(name)
        if value is not None and (type(value) is not int or value < 0):
            raise InputError(f"{path}: {name} is {value!r}; it must be an integer of at least 0, or null")
    kept = row.get("kept")
    if kept is not None and not (isinstance(kept, list) and len(kept) == 3 and None not in kept):
        raise InputError(f"{path}: kept is {kept!r:.80}; it must be a share, and the two ends of its interval")
    for share in kept or ():
        _check_figure(path, "kept", share, 1000)
    if kept and not kept[1] <= kept[2]:
        raise InputError(f"{path}: kept is {kept}; the lower end of its interval comes first")
    kinds = row.get("kinds") or {}
    if not isinstance(kinds, dict) or not {*kinds} <= {*KINDS}:
        raise InputError(f"{path}: kinds is {kinds!r:.80}; it may have {', '.join(KINDS)}")
    for name, share in kinds.items():
        _check_figure(path, f"kinds.{name}", share, 1)
    return row


def _check_figure(path: Path, name: str, value, most: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (is_number and 0 <= value <= most):
        raise InputError(f"{path}: {name} is {value!r}; it must be a number from 0 to {most}, or null")


def row_of(path: Path, plan: str) -> dict:
    """A row of what tools.evaluate has measured of a plan. Raises InputError for files of others and other plans."""
    result = read_result(path)
    try:
        machine = result["machine"]
        domains = result["text"]
        first = next(iter(domains.values()))  # all domains
        answers = result["retrieval"]
        if plan not in answers["rows"]:
            raise InputError(f"{path} has no {plan!r}; it has {', '.join(answers['rows'])}")
        asked = answers["rows"][plan]["kinds"]
        lengths = {int(name.split()[-1]) for name in asked if kind_of(name) in KINDS}
        if len(lengths) != 1:
            names = ", ".join(asked)
            raise InputError(f"{path} has the questions {names}; measure with --tasks text,retrieval and one length")
        figures = _lookups(answers, plan, result["seed"])
        row = {
            "model": Path(result["model"]).name,
            "plan": FULL if plan == "full" else plan,
            "machine": f"{machine['device']}, {machine['threads']} threads",
            "commit": result["commit"],
            "run": path.name,
            "dtype": result["dtype"],
            "texts": ", ".join(_text(name, result["text_files"][name]) for name in domains if name != "all"),
            "python": machine["python"],
            "speedup_2048": None,
            "speedup_8192": None,
            "limit_2048": None,
            "kl": round(first["rows"][plan].get("kl", {"value": 0})["value"], 3),
            "retrieved": round(figures["exact"], 2),
            "kept": None if plan == "full" else _kept(figures["share"]),
            "kinds": _pooled(figures["kinds"]),
            "prompt_tokens": result["tokens"]["prompt"],
            "windows": first["windows"],
            "questions": figures["questions"],
            "question_tokens": min(lengths),
            "seed": result["seed"],
            "lambada": None,
        }
        measured = f"speedup_{row['prompt_tokens']}"
        if "ttft" in result:
            times = result["ttft"][plan]
            is_own = result["contenders"][plan].get("is_own")  # code that is written to be read
            has_few_rounds = times.get("low", 0) is None  # older runs have no interval
            if measured in FIGURES and not is_own and not has_few_rounds:
                row[measured] = round(times["speedup"], 2)
            if row["prompt_tokens"] == 2048 and times["limit"] is not None:
                row["limit_2048"] = round(times["limit"], 2)
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise InputError(
            f"{path} lacks figures ({error!r}); write it with tools.evaluate --tasks text --json"
        ) from None
    return row


def _text(name: str, files: list[str] | dict[str, str]) -> str:
    """The name of a domain. If its files are not those of tools.evaluate, the beginning of their hash follows."""
    if isinstance(files, list):  # an older run has no hashes
        return name
    own = {path.name: path for path in read_domains([]).get(name, [])}
    if files.keys() == own.keys():
        is_equal = (hashlib.sha256(own[file].read_bytes()).hexdigest() == hash for file, hash in files.items())
        if name == "code" or all(is_equal):  # the version of Python, which a row states, decides "code"
            return name
    hashes = [*files.values()]
    whole = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    return f"{name} {whole[:7]}"


def _lookups(answers: dict, plan: str, seed: int) -> dict:
    """The figures of a plan's answers to questions of KINDS, without those of other kinds, such as ruler's."""
    figures = answers["rows"][plan]
    kinds = {name: cell for name, cell in figures["kinds"].items() if kind_of(name) in KINDS}
    if len(kinds) == len(figures["kinds"]):
        return figures | {"questions": answers["questions"]}
    asked = [kind in kinds for kind in figures["by_question"]["kind"]]
    full = next(iter(answers["rows"].values()))
    exact, of_full = (np.array(row["by_question"]["exact"])[asked] for row in (figures, full))
    share = share_of(exact, of_full, seed=seed)
    return {"exact": float(exact.mean()), "share": share, "kinds": kinds, "questions": len(exact)}


def _kept(share: dict | None) -> list[float] | None:
    """The share and its interval. None if the full model had too few exact answers for one."""
    if share is None or share.get("low") is None:
        return None
    return [round(share[end], 2) for end in ("value", "low", "high")]


def kind_of(name: str) -> str:
    """The kind in "quotes-prose 512", as tools.evaluate names the questions about a domain."""
    return name.split()[0].partition("-")[0]


def _pooled(figures: dict[str, dict]) -> dict[str, float]:
    """The share of exact answers of each kind, over all its domains."""
    shares = {}
    for kind in KINDS:
        found = [cell for name, cell in figures.items() if kind_of(name) == kind]
        asked = sum(cell["questions"] for cell in found)
        if asked:
            shares[kind] = round(sum(cell["exact"] * cell["questions"] for cell in found) / asked, 2)
    return shares


def page(rows: list[dict]) -> str:
    """The rows as a page in Markdown: a table for each model and what it was asked, the highest limit first."""
    tables = {}
    for row in sorted(rows, key=lambda row: (row["model"], -(row.get("limit_2048") or 0), row["plan"])):
        tables.setdefault(_asked(row), []).append(row)
    parts = [TITLE.strip()]
    for asked in sorted(tables, key=lambda asked: (asked.endswith(OTHER), asked)):
        lines = [HEADS, ["---"] * len(HEADS), *map(_cells, tables[asked])]
        parts.append(f"## {asked}")
        lines = [[" ".join(cell.replace("|", "/").split()) for cell in line] for line in _without_empty(lines)]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)


def _without_empty(lines: list[Sequence[str]]) -> list[list[str]]:
    """The lines of a table without columns that say nothing about any plan."""
    plans = [cells for cells in lines[2:] if cells[0] != FULL] or lines[2:]
    shown = [any(cell != "-" for cell in column) for column in zip(*plans, strict=True)]
    return [[*compress(cells, shown)] for cells in lines]


def _asked(row: dict) -> str:
    """What rows that can be compared have in common, as the heading of their table."""
    names = ("questions", "question_tokens", "texts", "seed", "dtype", "python")
    questions, tokens, texts, seed, dtype, python = (row.get(name) for name in names)
    if texts is None:
        return row["model"] + OTHER
    asked = "" if tokens is None else f", {questions} questions of {tokens:,} tokens"
    return f"{row['model']}: {texts}{asked}, seed {seed}, {dtype}, Python {python or 'not known'}"


def _cells(row: dict) -> list[str]:
    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value).replace("%", " %")

    kept = row.get("kept")
    of_full = "-" if kept is None else "{:.0%} [{:.0%}, {:.0%}]".format(*kept).replace("%", " %")
    kinds = row.get("kinds") or {}
    run = row.get("run")
    ships = (SHIPPED / f"{row['plan']}.plan").exists()
    return [
        f"**{row['plan']}**" if ships else row["plan"],
        cell(row.get("limit_2048"), "{:.2f}x"),
        cell(row.get("speedup_2048"), "{:.2f}x"),
        cell(row.get("speedup_8192"), "{:.2f}x"),
        cell(row.get("kl"), "{:.3f}"),
        cell(row.get("prompt_tokens"), "{:,}"),
        *(cell(kinds.get(kind), "{:.0%}") for kind in KINDS),
        cell(row.get("retrieved"), "{:.0%}"),
        of_full,
        cell(row.get("lambada"), "{:.1%}"),
        row.get("machine") or "-",
        re.sub("(?<=^.{7})[0-9a-f]*", "", row.get("commit") or "-"),
        f"[figures](runs/{run})" if run else "-",
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.results.leaderboard", description=__doc__.splitlines()[0])
    parser.add_argument("files", help="rows; default: those of tools/results/plans", nargs="*", type=Path)
    parser.add_argument("--from", help="written by tools.evaluate --json: print a row", dest="figures", type=Path)
    parser.add_argument("--plan", help="the name of the plan in it (default)", default="default")
    args = parser.parse_args(argv)

    def work() -> None:
        if args.figures:
            print(json.dumps(row_of(args.figures, args.plan), indent=2))
        else:
            print(page([*map(read_row, args.files or sorted(PLANS.glob("*.json")))]))

    return exit_status("leaderboard", work)


if __name__ == "__main__":
    sys.exit(main())
