"""Measure what a pruned prefill loses and what it gains: plans and other methods, in one run and one table.

    python -m tools.evaluate --prune default --prune 0.5 --prune calibrated:0.5 --baselines shortgpt,slicegpt
    python -m tools.evaluate --model DIR --text prose=a.txt,b.txt --text code=c.py --tasks text,ruler --json r.json

The contenders differ in how they read the prompt. Everything after it runs at full depth, except in methods that make
the whole model smaller. --prune takes none, default, third, a fraction of the layers, layers such as 10,12,19-29, the
file of a saved plan, or the name of one that ships. `calibrated:` before it calibrates the plan first. `:32` after it
runs the last 32 prompt tokens at full depth, `:32:0.1` also a tenth of the others, which the plan selects, and
`:32:0.1:18` lets layer 18 select them.
tools/evaluate/README.md defines every figure.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import sys
from pathlib import Path

import torch

import pop
from pop.calibration.questions import Maker, make_questions
from pop.errors import InputError, check_count
from tools.common import (
    ROOT,
    check_plot,
    check_writable,
    commit,
    exit_status,
    integers_in,
    machine,
    names_in,
    progress,
    write_figures,
    write_plot,
)
from tools.evaluate import tasks
from tools.evaluate.contender import Contender
from tools.evaluate.questions import Writer, codes, documents, needle, quotes
from tools.evaluate.report import plot, report
from tools.evaluate.retrieval import evaluate_retrieval
from tools.evaluate.ruler import RULER
from tools.evaluate.selection import BASELINES, check_baselines, make_contenders
from tools.evaluate.text import evaluate_text, read_domains, read_text, spread_windows
from tools.evaluate.timing import measure_ttft

# The texts that pop.calibrate takes by default: test text must not be among them.
BUILTIN = list((ROOT / "pop/data/calibration").iterdir())
TASKS = ("text", "retrieval", "ruler", "ttft", "generation", "human-eval")


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(words)
    args.command = shlex.join(["python", "-m", "tools.evaluate", *words])
    if argv is not None:  # a script, which may have added methods, texts or tasks
        args.command += f"  # called by {Path(sys.argv[0]).name}"
    return exit_status("evaluate", lambda: _evaluate_and_print(args))


def _evaluate_and_print(args) -> None:
    result = run(args)
    print(report(result))
    if args.json:
        write_figures(args.json, result)
    if args.plot:
        write_plot(args.plot, plot(result, check_plot(args.plot)))


def check(args) -> None:
    """Parse the lists among the options, in place. Raises InputError for what cannot be evaluated."""
    args.tasks = names_in("--tasks", args.tasks, TASKS)
    if "text" in args.tasks and not {"retrieval", "ruler"} & set(args.tasks):
        args.tasks.append("retrieval")  # KL does not show what can be looked up, so it never stands alone
    if "human-eval" in args.tasks and not args.run_generated_code:
        raise InputError(
            "human-eval runs programs that the model wrote on this machine, in a sandbox that does not stop malice; "
            "if you agree, add --run-generated-code"
        )
    if args.plot and not {"text", "ttft"} <= set(args.tasks):
        raise InputError("--plot draws the figures of text over those of ttft; have both in --tasks")
    check_writable(args.json, args.plot)
    if args.plot:
        check_plot(args.plot)
    if args.seed < 0:
        raise InputError(f"--seed is {args.seed}; it must be an integer of at least 0")
    for name in ("prompt_tokens", "continuation_tokens", "windows", "runs", "new_tokens", "questions", "human_eval"):
        check_count(f"--{name.replace('_', '-')}", getattr(args, name))
    args.lengths = integers_in("--lengths", args.lengths)
    args.baselines = [baseline for baseline in args.baselines.split(",") if baseline]
    check_baselines(args.baselines)


def run(args) -> dict:
    """Evaluate as the command line asks. Returns what --json writes."""
    check(args)
    domains = read_domains(args.text)
    calibration = _read_calibration(args.calibration, domains)
    problems = tasks.read_human_eval(args.human_eval) if "human-eval" in args.tasks else []
    model = _load(args)
    encoded = {name: model.tokenizer.encode(read_text(paths), bos=False) for name, paths in domains.items()}
    windows = _cut_windows(args, model, encoded)
    makers = _makers(args.tasks, encoded)
    questions = {}
    if makers:
        writer = Writer(model, encoded, args.seed)
        questions = {length: make_questions(writer, makers, length, args.questions) for length in args.lengths}
    progress("making the contenders")
    contenders = make_contenders(
        model,
        args.prune or ["default"],
        args.baselines,
        fraction=args.baseline_fraction,
        calibration=calibration,
        seed=args.seed,
    )
    _note_unpruned(args, contenders)
    result = _settings(args, model, domains, contenders)
    prompts = [window[: args.prompt_tokens] for group in windows.values() for window in group]
    seeded = {"seed": args.seed, "progress": progress}
    work = {
        "text": lambda: evaluate_text(contenders, windows, args.prompt_tokens, **seeded),
        "ttft": lambda: measure_ttft(contenders, prompts[0], args.runs, progress=progress),
        "generation": lambda: tasks.evaluate_generation(contenders, prompts, args.new_tokens, progress=progress),
        "retrieval": lambda: evaluate_retrieval(contenders, questions, **seeded),
        "human-eval": lambda: tasks.evaluate_human_eval(contenders, problems, progress=progress),
    }
    chosen = {*args.tasks} | ({"retrieval"} if questions else set())
    left = [task for task in work if task in chosen]
    while left:
        task = left.pop(0)
        result[task] = work[task]()
        if args.json and left:
            write_figures(args.json, result | {"unfinished": left})
    return result


def _read_calibration(files: list[str], domains: dict[str, list[Path]]) -> list[str] | None:
    """The calibration texts, or None for the built-in ones. Raises InputError for a text that is also test text."""
    fitted = {read_text([Path(path)]) for path in [*files, *BUILTIN]}  # a saved plan may come from the built-in texts
    for path in (path for paths in domains.values() for path in paths):
        if read_text([path]) in fitted:
            raise InputError(f"{path.resolve()} is both calibration and test text; give other text to one of them")
    return [read_text([Path(path)]) for path in files] or None


def _load(args) -> pop.Model:
    dtype = args.dtype and getattr(torch, args.dtype)
    # With its progress, pop.load shows the default plan, which may be no contender.
    shows = "default" in (args.prune or ["default"])
    model = pop.load(args.model, device=args.device, dtype=dtype, compile=args.compile, progress=shows)
    model.need_tokenizer("evaluate")
    model.check_fits(args.prompt_tokens + args.continuation_tokens, "a window")
    if {"retrieval", "ruler"} & set(args.tasks):
        model.check_fits(max(args.lengths) + 64, "a prompt of --lengths, with its answer,")
    return model


def _cut_windows(args, model: pop.Model, encoded: dict[str, list[int]]) -> dict[str, list[list[int]]]:
    """The windows of each domain. Raises InputError for a domain that is shorter than a window."""
    size = args.prompt_tokens + args.continuation_tokens
    windows = {}
    for name, tokens in encoded.items():
        windows[name] = spread_windows(tokens, size, args.windows, model.tokenizer.bos_id)
        if not windows[name]:
            raise InputError(
                f"the domain {name} has {len(tokens)} tokens, less than a window of {size}; "
                "give a longer text, or lower --prompt-tokens or --continuation-tokens"
            )
    return windows


def _makers(chosen: list[str], encoded: dict[str, list[int]]) -> list[Maker]:
    """The kinds of questions that the tasks ask."""
    makers = []
    if "retrieval" in chosen:
        makers += [codes, needle, documents]
        makers += [quotes(name) for name in encoded]
    if "ruler" in chosen:
        makers += RULER
    return makers


def _note_unpruned(args, contenders: list[Contender]) -> None:
    """Say which plans run some of the prompts at full depth, because these are short."""
    shortest = min([args.prompt_tokens, *args.lengths])
    for contender in contenders:
        least = contender.plan.full_depth_below
        if contender.plan.layers and shortest < least:
            progress(f"{contender.name} prunes no prompt of fewer than {least} tokens")


def _settings(args, model: pop.Model, domains: dict[str, list[Path]], contenders: list[Contender]) -> dict:
    """What --json states beside the figures."""
    return {
        "command": args.command,
        "model": args.model,
        "num_layers": model.config.num_layers,
        "dtype": str(model.dtype).removeprefix("torch."),
        "machine": machine(model.device),
        "version": pop.__version__,
        "commit": commit(),
        "seed": args.seed,
        "tokens": {"prompt": args.prompt_tokens, "continuation": args.continuation_tokens, "new": args.new_tokens},
        "text_files": {
            name: {_key(path, paths): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
            for name, paths in domains.items()
        },
        "calibration_files": args.calibration,
        "contenders": {
            contender.name: {
                "method": contender.method,
                "pruned_layers": len(contender.plan.layers),
                "is_own": contender.is_own,  # whether it reads prompts one at a time, in code that is not the engine's
                "plan": contender.plan.fields() | {"name": contender.plan.name, "sha256": hash_of(contender.plan)},
            }
            for contender in contenders
        },
    }


def hash_of(plan: pop.PrunePlan) -> str | None:
    """The SHA-256 of a plan's corrections, which tells plans of the same layers apart. None without any."""
    if plan.corrections is None:
        return None
    found = hashlib.sha256()
    for _, tensor in sorted(plan.corrections.tensors.items()):
        found.update(tensor.float().cpu().contiguous().numpy().tobytes())  # float32, whatever the model's dtype is
    return found.hexdigest()


def _key(path: Path, paths: list[Path]) -> str:
    """The name of one of a domain's files, with its place among them if others have the same name."""
    same = [one for one in paths if one.name == path.name]
    return path.name if len(same) == 1 else f"{path.name} ({paths.index(path) + 1})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    option = parser.add_argument
    option("--model", help="a name that `pop models` lists, or a directory (smollm2-135m)", default="smollm2-135m")
    option("--dtype", help="default: the checkpoint's", choices=("float32", "bfloat16", "float16"))
    option("--device", help="cpu, cuda ...; default: a GPU if there is one")
    some = "text,retrieval,ttft"
    option("--no-compile", help="run eagerly", dest="compile", action="store_const", const=False, default="auto")
    option("--tasks", help=f"any of {','.join(TASKS)} ({some})", default=some, metavar="TASK,...")
    option("--prune", help="a plan, see above; repeatable (default)", action="append", metavar="P")
    option(
        "--baselines", help=f"any of {','.join(BASELINES)}, as NAME or NAME:FRACTION", default="", metavar="NAME,..."
    )
    option("--baseline-fraction", help="what baselines cut by default (0.25)", type=float, default=0.25, metavar="F")
    option("--calibration", help="texts to calibrate on; default: built-in ones", nargs="+", default=[], metavar="FILE")
    option("--seed", help="the seed of calibration, bootstrap and questions (0)", type=int, default=0, metavar="N")
    option("--text", help="a domain: NAME=FILE[,FILE...]; repeatable", action="append", default=[], metavar="NAME=FILE")
    option("--windows", help="windows in each domain (8)", type=int, default=8, metavar="N")
    option("--prompt-tokens", help="(512)", type=int, default=512, metavar="N")
    option("--continuation-tokens", help="(128)", type=int, default=128, metavar="N")
    option("--runs", help="timed prefills of each contender (5)", type=int, default=5, metavar="N")
    option("--new-tokens", help="length of generated answers (32)", type=int, default=32, metavar="N")
    option("--lengths", help="prompt lengths of retrieval and ruler (512)", default="512", metavar="N,...")
    option("--questions", help="questions of each kind and length (10)", type=int, default=10, metavar="N")
    option("--human-eval", help="problems of HumanEval (164, which is all)", type=int, default=164, metavar="N")
    option("--run-generated-code", help="agree that human-eval executes what the model wrote", action="store_true")
    option("--json", help="also write all figures to this file, after each task", metavar="FILE")
    option("--plot", help="also draw KL and retrieval over speedup: FILE.svg or FILE.png", metavar="FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
