"""How far the logits of an answer on a kept cache are from those on an empty one.

    python -m tools.serve.kept_logits smollm2-135m --prune none --prune smollm2-135m-third

A conversation about a story runs through two engines: one keeps its caches, the other one does not. Both answers have
the tokens that are greedy on the kept cache, so their logits follow the same tokens and can be compared row by row.
"""

from __future__ import annotations

import argparse
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import pop
from pop.errors import InputError, check_count
from pop.generation.sampling import SamplingParams
from pop.models.config import DTYPES
from tools.common import ROOT, Countdown, exit_status, table
from tools.serve.engine import Engine
from tools.serve.rows import Job

STORY = ROOT / "tools" / "evaluate" / "texts" / "prose.txt"
PASSAGE = 1600  # characters of the story in each turn
QUESTION = "What happens here? Answer in one sentence."


class Answered(NamedTuple):
    """An answer, and the logits from which each of its tokens was drawn."""

    text: str
    tokens: list[int]  # without the last one
    logits: Tensor  # [N, V] float32
    cached_tokens: int  # of its prompt


def conversation(turns: int) -> list[str]:
    """What the user says: passages of a story, each with a question."""
    story = STORY.read_text(encoding="utf-8")
    passages = [story[begin : begin + PASSAGE] for begin in range(0, len(story) - PASSAGE + 1, PASSAGE)]
    if turns > len(passages):
        raise InputError(f"--turns is {turns}; the story has passages for {len(passages)}")
    return [f"{passage}\n\n{QUESTION}" for passage in passages[:turns]]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def answer(engine: Engine, prompt: list[int], count: int, forced: list[int] | None = None) -> Answered:
    """The engine's answer of at most `count` tokens to a prompt. The tokens are `forced`, otherwise greedy."""
    taken = []
    rows = []

    def process(tokens: list[int], logits: Tensor) -> Tensor:
        taken[:] = tokens
        rows.append(logits.float().cpu())
        if forced is None or len(tokens) == len(forced):
            return logits
        return logits.index_fill(0, logits.new_tensor([forced[len(tokens)]], dtype=torch.int64), logits.max() + 1)

    events = []
    params = SamplingParams(max_new_tokens=count, logits_processor=process)
    job = Job(0, prompt, [], params, 0, events.append)
    engine.submit([job])
    while engine.waiting or engine.rows:
        engine.turn()
    if events[-1].error is not None:
        raise events[-1].error
    text = "".join(event.text for event in events)
    return Answered(text, taken, torch.stack(rows), job.cached_tokens)


def compare(model: pop.Model, turns: int, new_tokens: int, tell=lambda: None) -> dict[str, Tensor]:
    """Compare the answers of a conversation on kept caches with those on empty ones, from its second turn on.

    Args:
        model: A model with a chat format. It runs its own plan.
        turns: How many messages the user sends, at least 2.
        new_tokens: The most tokens of an answer.
        tell: Called before each turn.

    Returns:
        Tensors [N] with a number for each answer token, and [turns - 1] with one for each turn:

        - `is_first` [N]: whether the token is the first of its answer.
        - `difference` [N]: the largest difference of its logits, in standard deviations of those on the empty cache.
        - `kl` [N]: KL(empty || kept) in nats.
        - `margin` [N]: by how many standard deviations the empty cache prefers its own first choice to the kept one's.
        - `cached` [turns - 1]: how many tokens of the prompt came from a cache.
        - `prompts` [turns - 1]: how many it has.
    """
    texts = conversation(turns)
    unanswered = [message for text in texts for message in (user(text), assistant(""))][:-1]
    model.check_fits(len(model.chat_tokens(unanswered)) + turns * new_tokens, "the conversation")
    # No kept cache gives way.
    with_kept = Engine(model, most_rows=1, most_waiting=1, kept_bytes=2**40)
    without = Engine(model, most_rows=1, most_waiting=1, kept_bytes=0)
    messages = []
    found = {"is_first": [], "difference": [], "kl": [], "margin": [], "cached": [], "prompts": []}
    for turn, text in enumerate(texts):
        tell()
        messages.append(user(text))
        prompt = model.chat_tokens(messages)
        kept = answer(with_kept, prompt, new_tokens)
        messages.append(assistant(kept.text))
        if turn == 0:
            continue
        empty = answer(without, prompt, len(kept.logits), forced=kept.tokens)
        spread = empty.logits.std(-1)
        preferred = empty.logits.gather(-1, kept.logits.argmax(-1, keepdim=True))[:, 0]
        found["is_first"].append(torch.arange(len(spread)) == 0)
        found["difference"].append((kept.logits - empty.logits).abs().amax(-1) / spread)
        found["kl"].append(divergence(empty.logits, kept.logits))
        found["margin"].append((empty.logits.amax(-1) - preferred) / spread)
        found["cached"].append(torch.tensor([kept.cached_tokens]))
        found["prompts"].append(torch.tensor([len(prompt)]))
    return {name: torch.cat(values) for name, values in found.items()}


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) [N] in nats, from logits [N, V]."""
    return F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1)


HEADS = ["plan", "dtype", "token", "tokens", "difference: median", "largest", "KL, nats", "other choice", "margin"]


def cells_of(plan: str, dtype: str, found: dict[str, Tensor]) -> list[list[str]]:
    """Two lines of the table: the first tokens of the answers, and the later ones."""
    lines = []
    for name, chosen in (("first", found["is_first"]), ("later", ~found["is_first"])):
        difference = found["difference"][chosen]
        margin = found["margin"][chosen]
        if not len(margin):
            continue
        cells = [
            f"{len(margin)}",
            f"{difference.median():.1e}",
            f"{difference.max():.1e}",
            f"{found['kl'][chosen].mean():.1e}",
            f"{int((margin > 0).sum())}",
            f"{margin.max():.2f}" if margin.any() else "",
        ]
        lines.append([plan, dtype, name, *cells])
    return lines


def run(args: argparse.Namespace) -> None:
    """Compare for each plan and dtype, and print a table."""
    check_count("--turns", args.turns, least=2)
    check_count("--new-tokens", args.new_tokens)
    conversation(args.turns)
    cases = [(plan, dtype) for dtype in args.dtype or ["bfloat16", "float32"] for plan in args.prune or ["default"]]
    lines = [HEADS]
    step = Countdown("turn", len(cases) * args.turns)
    for plan, dtype in cases:
        model = pop.load(args.model, prune=plan, dtype=DTYPES[dtype], device=args.device, compile=args.compile)
        model.need_tokenizer("kept_logits")
        found = compare(model, args.turns, args.new_tokens, step)
        lines += cells_of(plan, dtype, found)
    cached = int(found["cached"].sum())
    prompts = int(found["prompts"].sum())
    print(table(lines, words=(0, 1, 2)))
    print(f"\n{cached:,} of {prompts:,} prompt tokens came from kept caches. Differences are in standard deviations of")
    print("the logits. The margin is by how many of them the empty cache prefers its first choice, at most.")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.serve.kept_logits", description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("model", help="a name that `pop models` lists, or a folder")
    option("--prune", action="append", help="a plan, as in pop.load; repeatable (default)", metavar="P")
    option("--dtype", action="append", choices=tuple(DTYPES), help="repeatable (bfloat16 and float32)")
    option("--turns", type=int, default=8, help="messages of the user, of some 400 tokens each (8)", metavar="N")
    option("--new-tokens", type=int, default=32, help="the most tokens of an answer (32)", metavar="N")
    option("--device", help="as in pop.load")
    option("--no-compile", help="run eagerly", dest="compile", action="store_const", const=False, default="auto")
    args = parser.parse_args(argv)
    return exit_status("kept_logits", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
