"""Find the layer that should select tokens: `python -m tools.evaluate.lookup`, see README.md in this folder.

It asks the full model for codes, as pop check does, and for documents and quotations of retrieval. Each layer selects
a share of a prompt's tokens, and the table says how many of the answer's tokens are among them. Chance finds as many as
the share.
"""

from __future__ import annotations

import argparse
import sys

import torch

import pop
from pop.calibration.lookup import selecting_scores
from pop.calibration.questions import codes, make_questions
from pop.errors import InputError, check_count
from tools.common import Countdown, exit_status, integers_in, table
from tools.evaluate.questions import Writer, documents, quotes
from tools.evaluate.text import read_domains, read_text


def run(args) -> tuple[pop.PrunePlan, dict[str, torch.Tensor]]:
    """The plan, and by kind of question the mean of `pop.calibration.lookup.found_by_layer` over its questions, [L]."""
    if not 0 < args.share <= 1:
        raise InputError(f"--share is {args.share}; it must be above 0 and at most 1")
    last = check_count("--last", args.last)
    count = check_count("--questions", args.questions)
    lengths = integers_in("--lengths", args.lengths)
    domains = read_domains(args.text)
    texts = {name: read_text(paths) for name, paths in domains.items()}
    model = pop.load(args.model, compile=False, prune=args.prune)
    model.need_tokenizer("look up")
    model.check_fits(max(lengths), "a prompt of --lengths")
    encoded = {name: model.tokenizer.encode(text, bos=False) for name, text in texts.items()}
    writer = Writer(model, encoded, args.seed)
    makers = [codes, documents, *map(quotes, encoded)]
    by_kind: dict[str, list[tuple[list[int], list[int]]]] = {}
    for length in lengths:
        for question in make_questions(writer, makers, length, count):
            by_kind.setdefault(question.kind, []).append((question.prompt, question.answer))
    found = {}
    step = Countdown("lookup, kind of question", len(by_kind))
    for kind, pairs in by_kind.items():
        step()
        found[kind] = selecting_scores(model, pairs, args.share, last)
    return model.plan, found


def may_select(plan: pop.PrunePlan, num_layers: int) -> list[int]:
    """The layers that may select tokens for a plan: kept ones with pruned ones after them."""
    return [layer for layer in range(num_layers) if layer not in plan.layers and layer < max(plan.layers, default=0)]


def report(plan: pop.PrunePlan, found: dict[str, torch.Tensor], share: float) -> str:
    """The table of a run, in which the best layer that the plan may take has a mark."""
    found = found | {"mean": torch.stack([*found.values()]).mean(0)}
    allowed = may_select(plan, len(found["mean"]))
    best = max(allowed, key=lambda layer: float(found["mean"][layer]), default=None)
    rows = [["layer", *found]]
    for layer, row in enumerate(torch.stack([*found.values()], dim=1).tolist()):  # [L, kinds]
        mark = "*" if layer == best else ""
        rows.append([f"{layer}{mark}", *(f"{part:.0%}" for part in row)])
    layers = ",".join(map(str, plan.layers)) or "none"
    if best is None:
        return f"{table(rows)}\n\nNo layer may select tokens for the plan, which prunes the layers {layers}."
    fields = f"full_depth_selected={share:g}, selecting_layer={best}"
    return f"{table(rows)}\n\n* finds most of those that may select for a plan of the layers {layers}: {fields}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    option = parser.add_argument
    option("--model", help="a name that `pop models` lists, or a directory (smollm2-135m)", default="smollm2-135m")
    option("--prune", help="the plan that needs a selecting layer, as in pop.load (default)", default="default")
    option("--share", help="of the prompt's tokens to select (0.03)", type=float, default=0.03)
    option("--last", help="the prompt's last tokens, which are not selected (64)", type=int, default=64, metavar="N")
    option("--lengths", help="prompt lengths (512)", default="512", metavar="N,...")
    option("--questions", help="questions of each kind and length (8)", type=int, default=8, metavar="N")
    option("--seed", help="the seed of the questions (1)", type=int, default=1, metavar="N")
    option("--text", help="a domain: NAME=FILE[,FILE...]; repeatable", action="append", default=[], metavar="NAME=FILE")
    args = parser.parse_args(argv)

    return exit_status("lookup", lambda: print(report(*run(args), args.share)))


if __name__ == "__main__":
    sys.exit(main())
