"""What a plan changes in the predictions of your own answers: `python -m tools.evaluate.answers`, see README.md here.

    python -m tools.evaluate.answers log.jsonl --model llama3.1-8b-instruct --prune my.plan

A line of log.jsonl is a conversation that ends with an answer: {"messages": [...]}, with "tools" if there are some. The
answer's tokens are given, and predicted one after the other, at full depth and after a prompt that the plan prunes. So
unlike answers that are generated, the two do not drift apart at the first near tie.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from itertools import takewhile
from typing import NamedTuple

import numpy as np
import torch

import pop
from pop.cli.texts import read_text
from pop.errors import InputError, PopError, UnsupportedError, check_count
from tools.common import Countdown, exit_status, table
from tools.evaluate.text import interval

FULL_DEPTH = pop.PrunePlan.none()
SHOWN = 12  # tokens before the one that loses most


class Answer(NamedTuple):
    """An answer, after its prompt: token ids."""

    where: str  # the file and line
    prompt: list[int]
    tokens: list[int]


class Change(NamedTuple):
    """What a plan changes in one answer. `full`, `change`, `kl` and `same` are means over its tokens."""

    full: float  # log-probability at full depth, in nats
    change: float  # the plan's log-probability, minus that
    kl: float  # KL(full || plan), in nats
    first: float  # KL of the first token
    same: float  # the share of tokens whose likeliest token is the same
    lost: float  # nats that the whole answer loses
    most: float  # nats that one of its tokens loses
    place: int  # of that token


def split(model, path: str, most: int) -> tuple[list[Answer], list[str]]:
    """The answers of a .jsonl file, each with at most `most` tokens, and why other lines are left out."""
    answers = []
    refused = []
    for where, conversation in read_text(path):
        try:
            answers.append(Answer(where, *_split_one(model, conversation, most)))
        except PopError as error:
            refused.append(f"{where}: {error}")
    return answers, refused


def _split_one(model, conversation: dict, most: int) -> tuple[list[int], list[int]]:
    """The token ids of a conversation's prompt, and of the answer after it, with the token that ends it."""
    chat = model.chat_format()
    messages = conversation["messages"]
    if conversation["add_generation_prompt"] or len(messages) < 2:
        raise InputError("the conversation does not end with an answer")
    whole = chat.encode(**conversation)
    prompt = chat.encode(messages[:-1], tools=conversation["tools"])
    with suppress(UnsupportedError):  # the model always thinks
        brief = chat.encode(messages[:-1], tools=conversation["tools"], enable_thinking=False)
        if whole[: len(brief)] == brief:  # the answer has no thoughts, so none were asked for
            prompt = brief
    if whole[: len(prompt)] != prompt:
        raise InputError("with its answer, the conversation begins in another way, as with formats that drop thoughts")
    rest = whole[len(prompt) :]
    spoken = [*takewhile(lambda token: token not in chat.end_ids, rest)]
    tokens = rest[: len(spoken) + 1][:most]
    model.check_fits(len(prompt) + len(tokens), "the conversation")
    return prompt, tokens


@torch.inference_mode()
def change(model, answer: Answer) -> Change:
    """What the model's plan changes in an answer."""
    full = _log_probs(model, answer, FULL_DEPTH)
    by_plan = _log_probs(model, answer, model.plan)
    tokens = torch.tensor(answer.tokens, device=full.device)[:, None]
    of_full = full.gather(1, tokens)[:, 0]  # [C]
    of_plan = by_plan.gather(1, tokens)[:, 0]
    kl = (full.exp() * (full - by_plan)).sum(-1).clamp(min=0)  # [C]; rounding can leave a sum just below zero
    same = (full.argmax(-1) == by_plan.argmax(-1)).double()
    lost = of_full - of_plan
    return Change(
        full=float(of_full.mean()),
        change=float((of_plan - of_full).mean()),
        kl=float(kl.mean()),
        first=float(kl[0]),
        same=float(same.mean()),
        lost=float(lost.sum()),
        most=float(lost.max()),
        place=int(lost.argmax()),
    )


def _log_probs(model, answer: Answer, plan: pop.PrunePlan) -> torch.Tensor:
    """The log-probabilities [C, V] that predict each of an answer's C tokens, in float32."""
    cache = model.new_cache(1, len(answer.prompt) + len(answer.tokens))
    logits = model.prefill(torch.tensor([answer.prompt]), cache, plan=plan)  # [1, V]
    if len(answer.tokens) > 1:
        logits = torch.cat((logits, model.extend(torch.tensor([answer.tokens[:-1]]), cache)[0]))
    return logits.float().log_softmax(-1)


def words_at(model, answer: Answer, place: int) -> str:
    """A token of an answer, and what the answer says before it."""
    before = model.tokenizer.decode(answer.tokens[max(0, place - SHOWN) : place])
    return f"{model.tokenizer.decode(answer.tokens[place : place + 1])!r} after {before!r}"


def report(model, changes: list[tuple[Answer, Change]], most: int) -> str:
    """The table of a run, and the `most` answers that lose most, with the words at which they do."""
    values = np.array([found for _, found in changes])
    columns = Change(*values.T)
    rows = [["mean over the answers", "", "95 % interval"]]
    for name, column, form in (
        ("log-probability at full depth, nats a token", columns.full, "{:.3f}"),
        ("the plan's, minus that", columns.change, "{:+.4f}"),
        ("KL, nats a token", columns.kl, "{:.4f}"),
        ("KL of the first token", columns.first, "{:.4f}"),
        ("same likeliest token", columns.same, "{:.1%}"),
    ):
        figure = interval(column)
        ends = [figure["low"], figure["high"]]
        between = "" if None in ends else "[" + ", ".join(map(form.format, ends)) + "]"
        rows.append([name, form.format(figure["value"]), between])
    losing = [pair for pair in changes if pair[1].lost > 0]
    worst = sorted(losing, key=lambda pair: pair[1].lost, reverse=True)[:most]
    lines = [f"{len(changes)} answers. {'Those that lose most:' if worst else 'None loses anything.'}"]
    for answer, found in worst:
        words = words_at(model, answer, found.place)
        lines.append(f"{answer.where}: {found.lost:.1f} nats, and {found.most:.1f} at {words}")
    return "\n".join([table(rows), "", *lines])


def run(args) -> str:
    most = check_count("--max-tokens", args.max_tokens)
    worst = check_count("--worst", args.worst)
    if not args.file.endswith(".jsonl"):
        raise InputError(f"{args.file} must end in .jsonl, and hold a conversation in each line")
    read_text(args.file)  # before the model, which takes longer
    model = pop.load(args.model, prune=args.prune, compile=args.compile)
    if not model.plan.layers:
        raise InputError("the plan prunes nothing; give another one with --prune")
    answers, refused = split(model, args.file, most)
    pruned = [answer for answer in answers if model.plan.num_pruned(len(answer.prompt))]
    changes = []
    step = Countdown("answer", len(pruned))
    for answer in pruned:
        step()
        changes.append((answer, change(model, answer)))
    notes = []
    if len(pruned) < len(answers):
        notes.append(f"{len(answers) - len(pruned)} prompts are too short for the plan to prune, and left out.")
    if refused:
        notes.append(f"{len(refused)} lines cannot be used. The first: {refused[0]}")
    if not changes:
        raise InputError(" ".join(["no answer can be compared.", *notes]))
    return "\n".join([report(model, changes, worst), *notes])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.evaluate.answers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", help="a .jsonl file", metavar="FILE")
    parser.add_argument("--model", help="a name that `pop models` lists, or a directory", required=True)
    parser.add_argument("--prune", help="the plan, as in pop.load (default)", default="default", metavar="PLAN")
    parser.add_argument("--max-tokens", help="of an answer that count (256)", type=int, default=256, metavar="N")
    parser.add_argument("--worst", help="name so many answers that lose most (3)", type=int, default=3, metavar="N")
    parser.add_argument("--no-compile", dest="compile", action="store_const", const=False, default="auto")
    args = parser.parse_args(argv)

    return exit_status("answers", lambda: print(run(args)))


if __name__ == "__main__":
    sys.exit(main())
