"""Find the layer that should select tokens: `python -m tools.evaluate.lookup`, see README.md in this folder.

It asks the full model questions of retrieval: codes, documents and quotations. Each layer selects a share of a prompt's
tokens, and the table says how many of the answer's tokens are among them. Chance finds as many as the share.
"""

from __future__ import annotations

import argparse
import sys

import torch

import pop
from pop.engine.selection import select
from pop.errors import InputError, check_count
from tools.common import exit_status, integers_in, table
from tools.evaluate.questions import Question, Writer, codes, documents, make_questions, quotes
from tools.evaluate.text import read_domains, read_text


@torch.no_grad()
def found_by_layer(model: pop.Model, question: Question, share: float, last: int) -> torch.Tensor | None:
    """The share of an answer's tokens that each layer would select, [L]. None: it is not before the prompt's end.

    Args:
        model: A pop.Model. Its plan plays no part.
        question: Its prompt holds its answer.
        share: Of the tokens to select from: all but the first one and the last ones.
        last: How many tokens the prompt's end has. They are at full depth anyway.
    """
    prompt, size = question.prompt, len(question.answer)
    begin = next((at for at in range(len(prompt) - last - size + 1) if prompt[at : at + size] == question.answer), None)
    if begin is None:
        return None
    tokens, position = torch.tensor([prompt], device=model.device), torch.arange(len(prompt))[None]
    others, states = (position > 0) & (position < len(prompt) - last), []

    def step(index, layer, h, rope, attend):
        states.append(h)
        return layer(h, rope, attend)

    model.module.through_layers(tokens, step=step)
    found, count = [], torch.tensor([int(others.sum() * share)])
    for layer, h in enumerate(states):
        plan = pop.PrunePlan((layer,))
        selected = select(model.module, plan, h, position, torch.tensor([len(prompt)]), others, count)
        found.append(selected[0, begin : begin + size].float().mean())
    return torch.stack(found).cpu()


def run(args) -> dict[str, torch.Tensor]:
    """By kind of question: the mean of `found_by_layer` over its questions, [L]."""
    if not 0 < args.share <= 1:
        raise InputError(f"--share is {args.share}; it must be above 0 and at most 1")
    last, count = check_count("--last", args.last), check_count("--questions", args.questions)
    lengths = integers_in("--lengths", args.lengths)
    model = pop.load(args.model, compile=False, prune=None)
    model.need_tokenizer("look up")
    model.check_fits(max(lengths), "a prompt of --lengths")
    encoded = {
        name: model.tokenizer.encode(read_text(paths), bos=False) for name, paths in read_domains(args.text).items()
    }
    writer = Writer(model.tokenizer, encoded, args.seed)
    questions = make_questions(writer, [codes, documents, *map(quotes, encoded)], lengths, count)
    found: dict[str, list[torch.Tensor]] = {}
    for question in (question for group in questions.values() for question in group):
        by_layer = found_by_layer(model, question, args.share, last)
        if by_layer is not None:
            found.setdefault(question.kind, []).append(by_layer)
    if not found:
        raise InputError(f"every answer is among the last {last} tokens; give a smaller --last or longer --lengths")
    return {kind: torch.stack(rows).mean(0) for kind, rows in found.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    option = parser.add_argument
    option("--model", help="a name that `pop models` lists, or a directory (smollm2-135m)", default="smollm2-135m")
    option("--share", help="of the prompt's tokens to select (0.03)", type=float, default=0.03)
    option("--last", help="the prompt's last tokens, which are not selected (64)", type=int, default=64, metavar="N")
    option("--lengths", help="prompt lengths (512)", default="512", metavar="N,...")
    option("--questions", help="questions of each kind and length (8)", type=int, default=8, metavar="N")
    option("--seed", help="the seed of the questions (1)", type=int, default=1, metavar="N")
    option("--text", help="a domain: NAME=FILE[,FILE...]; repeatable", action="append", default=[], metavar="NAME=FILE")
    args = parser.parse_args(argv)

    def work():
        found = run(args)
        found["mean"] = torch.stack([*found.values()]).mean(0)
        rows = [[f"{share:.0%}" for share in row] for row in torch.stack([*found.values()], dim=1).tolist()]
        print(table([["layer", *found], *([str(layer), *row] for layer, row in enumerate(rows))]))

    return exit_status("lookup", work)


if __name__ == "__main__":
    sys.exit(main())
