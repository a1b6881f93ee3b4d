"""What a pruned prefill loses, and what it gains: a model's plans and their rivals, in one run and one table.

    python -m tools.evaluate --prune default --prune 0.5 --prune calibrated:0.5 --baselines shortgpt,slicegpt
    python -m tools.evaluate --model DIR --text prose=a.txt,b.txt --text code=c.py --tasks text,needle --json r.json

The prompt is read by each contender, everything behind it runs at full depth (except in methods that make the model
smaller in both stages), and what is measured is how far that moves the model from itself, the full model:

    text        windows of --prompt-tokens + --continuation-tokens from texts of several domains, disjoint and evenly
                spread. The continuation is forced on the model. Perplexity is exp(mean negative log-likelihood of all
                continuation tokens); change is its ratio to the full model's, less one. KL(full || contender) in nats
                and the share of positions with the same likeliest token are means over the continuation; "first" is its
                first token alone, which the boundary token predicts. Intervals: 95 %, bootstrap over windows (for
                the change: of window-wise differences, paired); none for less than five windows.
    ttft        time to first token of one --prompt-tokens prompt: the median of --runs, contenders taking turns after
                an untimed turn. limit: the speedup that the shapes allow (pop/pruning/cost.py).
    generation  greedy answers of --new-tokens tokens to the windows' prompts: the share of leading tokens equal to the
                full model's, and the share of answers that are equal altogether.
    needle, documents, human-eval   see tools/evaluate/tasks.py

Contenders (--prune, repeatable): none, default, a fraction such as 0.5 (of the layers, the deepest), the file of a
saved plan; `calibrated:` before any of these refits its K/V projections on the spot; `:32` behind it runs the last 32
prompt tokens at full depth. --baselines: those of tools/evaluate/baselines.py, NAME or NAME:FRACTION.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from statistics import NormalDist, median

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]

import pop  # noqa: E402
from pop.calibration.refit import builtin_texts  # noqa: E402
from pop.calibration.scores import check_plot  # noqa: E402
from pop.cli.commands import parse_prune  # noqa: E402
from pop.cli.demo import machine  # noqa: E402
from pop.errors import InputError, PopError, check_count  # noqa: E402
from tools.evaluate import tasks as tasks  # noqa: E402
from tools.evaluate.baselines import BASELINES, Contender, calibration_windows  # noqa: E402
from tools.evaluate.report import plot, report, write_whole  # noqa: E402

# What pop.calibrate takes where it is given no text: it can't be test text as well.
BUILTIN = list((ROOT / "pop/data/calibration").iterdir())
CODE = ("argparse", "difflib", "heapq", "statistics")  # the default texts of the domain code
TASKS = ("text", "ttft", "generation", "needle", "documents", "human-eval")
Progress = Callable[[str], None]


def silent(text: str) -> None:
    pass


# ---- Text ----


def read_domains(texts: list[str]) -> dict[str, list[Path]]:
    """--text's values, NAME=FILE[,FILE...], as files by domain. Empty: tools/evaluate/texts/*.txt, and code: some modules of
    Python's own library."""
    if not texts:
        domains = {path.stem: [path] for path in sorted((ROOT / "tools" / "evaluate" / "texts").glob("*.txt"))}
        return {**domains, "code": [Path(find_spec(name).origin) for name in CODE]}
    domains = {}
    for text in texts:
        name, _, files = text.partition("=")
        if not name or not files or name == "all":
            raise InputError(f"--text is {text!r}; write NAME=FILE or NAME=FILE,FILE, and any name but all")
        domains.setdefault(name, []).extend(Path(file) for file in files.split(","))
    return domains


def read_text(files: list[Path]) -> str:
    """The files' text, UTF-8, one behind the other."""
    pieces = []
    for file in files:
        try:
            pieces.append(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise InputError(f"{file} cannot be read as text ({reason}); check the path") from None
    return "\n\n".join(pieces)


def spread_windows(tokens: list[int], size: int, count: int, bos_id: int | None = None) -> list[list[int]]:
    """At most `count` disjoint windows of `size` tokens, evenly spread over `tokens`, as many as there is room for.

    With a bos_id, each begins with it, as every prompt of such a model does, and holds size - 1 tokens of the text.
    """
    head = [] if bos_id is None else [bos_id]
    length = size - len(head)
    count = min(count, len(tokens) // length)
    steps = max(count - 1, 1)
    begins = [(len(tokens) - length) * index // steps for index in range(count)]
    return [[*head, *tokens[begin : begin + length]] for begin in begins]


MEASURES = ("nll", "kl", "kl_first", "same", "same_first")


def evaluate_text(
    contenders: list[Contender],
    domains: dict[str, list[list[int]]],
    prompt_tokens: int,
    *,
    samples: int = 1000,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, dict]:
    """Compare all contenders with the first, the full model, on windows of token ids, by domain.

    Returns {domain: {"windows", "continuation_tokens", "rows": {contender: summary}}}; with several domains "all"
    pools their windows. A summary holds perplexity, and perplexity_change, kl, kl_first, same, same_first, each as
    {"value", "low", "high"}; low and high are None for less than five windows. One window's logits of the full model
    and of one contender are in memory at a time.
    """
    records = {name: [] for name in domains}
    total = sum(map(len, domains.values()))
    for name, windows in domains.items():
        for window in windows:
            progress(f"text, window {sum(map(len, records.values())) + 1} of {total}")
            prompt, continuation = window[:prompt_tokens], window[prompt_tokens:]
            full = contenders[0].logits(prompt, continuation).double().log_softmax(-1)  # [C, V]
            rows = [_measure(full, full, continuation)]
            for contender in contenders[1:]:
                log_probs = contender.logits(prompt, continuation).double().log_softmax(-1)
                rows.append(_measure(full, log_probs, continuation))
            records[name].append(rows)
    if len(domains) > 1:
        records = {"all": [rows for domain in records.values() for rows in domain], **records}
    lengths = {len(window) - prompt_tokens for windows in domains.values() for window in windows}
    result = {}
    for name, record in records.items():
        values = np.array(record)  # [windows, contenders, measures]
        result[name] = {
            "windows": len(values),
            "continuation_tokens": len(values) * max(lengths),
            "rows": {
                contender.name: _summary(values[:, index], values[:, 0], samples, seed)
                for index, contender in enumerate(contenders)
            },
        }
    return result


def _measure(full: torch.Tensor, log_probs: torch.Tensor, targets: list[int]) -> list[float]:
    """MEASURES of one window, means over its continuation: full and log_probs [C, V], natural logarithms."""
    nll = -log_probs.gather(1, torch.tensor(targets, device=log_probs.device)[:, None])[:, 0]  # [C]
    kl = (full.exp() * (full - log_probs)).sum(-1).clamp(min=0)  # [C]; rounding can leave a sum just below zero
    same = (full.argmax(-1) == log_probs.argmax(-1)).double()
    return [float(x) for x in (nll.mean(), kl.mean(), kl[0], same.mean(), same[0])]


def _summary(values: np.ndarray, full: np.ndarray, samples: int, seed: int) -> dict:
    """One contender's windows [N, measures], and the full model's, as the figures of a row."""
    columns = dict(zip(MEASURES, values.T, strict=True))
    nll = columns.pop("nll")

    def interval(window_values: np.ndarray, transform=lambda x: x) -> dict:
        low, high = bootstrap(window_values, samples, seed)
        ends = (None, None) if low is None else (float(transform(low)), float(transform(high)))
        return {"value": float(transform(window_values.mean())), "low": ends[0], "high": ends[1]}

    return {
        "perplexity": float(np.exp(nll.mean())),
        "perplexity_change": interval(nll - full[:, 0], np.expm1),  # windows are equally long: pooled over tokens
        **{name: interval(column) for name, column in columns.items()},
    }


def bootstrap(values: np.ndarray, samples: int = 1000, seed: int = 0) -> tuple[float | None, float | None]:
    """A 95 % interval of the mean of values [N], from resampled windows; None for N < 5, too few to resample.

    The plain percentile interval is too short for few windows: of 8 it holds the mean 83 to 88 times in 100. So the
    percentiles are those of the expanded percentile interval (Hesterberg 2015): Phi(-t sqrt(N / (N - 1))) and 1 less
    that, with t the 97.5 % quantile of Student's distribution (its expansion around the normal one's, to 1 / (N-1)^2).
    The same seed resamples the same windows, whatever the values are: intervals of one table are paired.
    """
    N, normal = len(values), NormalDist()
    if N < 5:
        return None, None
    z = normal.inv_cdf(0.975)
    t = z + (z**3 + z) / (4 * (N - 1)) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * (N - 1) ** 2)
    tail = 100 * normal.cdf(-t * (N / (N - 1)) ** 0.5)
    index = np.random.default_rng(seed).integers(N, size=(samples, N))
    low, high = np.percentile(values[index].mean(axis=1), (tail, 100 - tail))
    return float(low), float(high)


# ---- Generation and time ----


def evaluate_generation(
    contenders: list[Contender], prompts: list[list[int]], new_tokens: int, *, progress: Progress = silent
) -> dict[str, dict]:
    """{contender: {"prompts", "leading", "exact"}}: mean share of leading tokens equal to the first contender's
    greedy answer, which is the full model's, and share of answers equal to it altogether."""
    shares = {contender.name: [] for contender in contenders}
    for number, prompt in enumerate(prompts):
        progress(f"generation, prompt {number + 1} of {len(prompts)}")
        reference = contenders[0].generate(prompt, new_tokens)
        for contender in contenders:
            answer = reference if contender is contenders[0] else contender.generate(prompt, new_tokens)
            pairs = zip(reference, answer, strict=False)
            shares[contender.name].append(len(list(takewhile(lambda p: p[0] == p[1], pairs))) / len(reference))
    return {
        name: {"prompts": len(prompts), "leading": float(np.mean(share)), "exact": float(np.mean(np.equal(share, 1)))}
        for name, share in shares.items()
    }


def measure_ttft(
    contenders: list[Contender], prompt: list[int], runs: int, *, progress: Progress = silent
) -> dict[str, dict]:
    """{contender: {"median_s", "fastest_s", "slowest_s", "speedup", "limit"}}, speedups over the first contender.

    From the prompt's token ids to the id of the first new token, without the allocation of the cache.
    """
    seconds = {contender.name: [] for contender in contenders}
    for number in range(runs + 1):  # the first is the warm-up
        progress(f"ttft, run {number} of {runs}" if number else "ttft, warm-up")
        for contender in contenders:
            cache = contender.model.new_cache(1, len(prompt))
            began = time.perf_counter()
            int(contender.prefill(prompt, cache).argmax())  # waits for the device
            if number:
                seconds[contender.name].append(time.perf_counter() - began)
    full = contenders[0]
    result = {}
    for contender in contenders:
        times, flops = seconds[contender.name], contender.flops(len(prompt))
        result[contender.name] = {
            "median_s": median(times),
            "fastest_s": min(times),
            "slowest_s": max(times),
            "speedup": median(seconds[full.name]) / median(times),
            "limit": None if flops is None else full.flops(len(prompt)) / flops,
        }
    return result


# ---- Contenders ----


def make_contenders(
    model: pop.Model, prunes: list[str], baselines: list[str], *, fraction=0.25, calibration=None, taps=2, seed=0
) -> list[Contender]:
    """The full model, then one contender for each of --prune and --baselines.

    calibration: texts for `calibrated:` and for the baselines; None takes the built-in ones.
    """
    contenders = [Contender("full", model, pop.PrunePlan.none())]
    prunes = [prune for prune in prunes if prune != "none"]
    contenders += [_plan_contender(model, prune) for prune in prunes]
    pairs = zip(contenders[1:], prunes, strict=True)
    if waiting := [contender for contender, prune in pairs if prune.startswith("calibrated:")]:
        plans = pop.calibrate(model, calibration, [contender.plan for contender in waiting], taps=taps, seed=seed)
        for contender, plan in zip(waiting, plans, strict=True):
            contender.plan = plan
    if baselines:
        windows = calibration_windows(model, calibration or builtin_texts())
    for baseline in baselines:
        name, _, share = baseline.partition(":")
        if name not in BASELINES:
            raise InputError(f"--baselines holds {name!r}; it knows {', '.join(BASELINES)}")
        try:
            share = float(share) if share else fraction
        except ValueError:
            raise InputError(f"--baselines holds {baseline!r}; write NAME or NAME:FRACTION") from None
        contender = BASELINES[name](model, share, windows)
        contenders.append(dataclasses.replace(contender, name=f"{name} {share:g}"))
    names = [contender.name for contender in contenders]
    if len(set(names)) < len(names):
        raise InputError(f"two contenders have the same name, of {', '.join(names)}; leave one out, or rename its file")
    return contenders


def _plan_contender(model: pop.Model, prune: str) -> Contender:
    """The contender of one --prune; one that is to be calibrated has its plain plan still."""
    calibrated, what, last = re.fullmatch(r"(calibrated:)?(.*?)(?::(\d+))?", prune, re.S).groups()
    plan = model.resolve(parse_prune(what) or pop.PrunePlan.none())
    name = f"calibrated {Path(what).name}" if calibrated else Path(what).name
    if last:
        plan, name = dataclasses.replace(plan, full_depth_last=int(last)), f"{name} w={int(last)}"
    return Contender(name, model, plan)


# ---- The command line ----


def run(args) -> dict:
    """Evaluate as the command line asks: what --json writes."""
    wanted = args.tasks.split(",")
    for task in wanted:
        if task not in TASKS:
            raise InputError(f"--tasks holds {task!r}; it knows {', '.join(TASKS)}")
    if "human-eval" in wanted and not args.run_generated_code:
        raise InputError(
            "human-eval runs programs that the model wrote on this machine, in a sandbox that is no safe one against "
            "malice; if you agree, add --run-generated-code"
        )
    if args.quantize and args.baselines:
        raise InputError("--baselines change whole weights; leave them or --quantize out")
    if args.plot and not {"text", "ttft"} <= set(wanted):
        raise InputError("--plot draws text over ttft; have both in --tasks")
    for path in (args.json, args.plot):
        if path and (os.path.isdir(path) or not os.access(Path(path).resolve().parent, os.W_OK)):
            raise InputError(f"{path} cannot be written; name a file in a folder that there is")
    if args.plot:
        check_plot(args.plot)  # what is wrong is better known now than after the work
    if args.seed < 0:
        raise InputError(f"--seed is {args.seed}; it must be an integer of at least 0")
    for name in ("prompt_tokens", "continuation_tokens", "windows", "runs", "new_tokens", "questions", "human_eval"):
        check_count(f"--{name.replace('_', '-')}", getattr(args, name))
    domains = read_domains(args.text)
    # Whatever is calibrated in this run: the file of a saved plan may be calibrated too.
    seen = {Path(path).resolve() for path in [*args.calibration, *BUILTIN]}
    if shared := seen & {path.resolve() for paths in domains.values() for path in paths}:
        raise InputError(f"{shared.pop()} is both calibration and test text; give other text to one of them")
    calibration = [read_text([Path(path)]) for path in args.calibration] or None
    problems = tasks.read_human_eval(args.human_eval) if "human-eval" in wanted else []

    def progress(text: str) -> None:
        print(f"... {text}", file=sys.stderr, flush=True)

    dtype = args.dtype and getattr(torch, args.dtype)
    model = pop.load(args.model, device=args.device, dtype=dtype, prune=None, quantize=args.quantize)
    model.need_tokenizer("evaluate")
    size = args.prompt_tokens + args.continuation_tokens
    model.check_fits(size, "a window")
    encoded = {name: model.tokenizer.encode(read_text(paths), bos=False) for name, paths in domains.items()}
    windows = {
        name: spread_windows(tokens, size, args.windows, model.tokenizer.bos_id) for name, tokens in encoded.items()
    }
    for name in domains:
        if not windows[name]:
            raise InputError(f"the domain {name} has {len(encoded[name])} tokens, less than a window of {size}")
    progress("making the contenders")
    baselines = args.baselines.split(",") if args.baselines else []
    contenders = make_contenders(
        model,
        args.prune or ["default"],
        baselines,
        fraction=args.baseline_fraction,
        calibration=calibration,
        taps=args.taps,
        seed=args.seed,
    )
    result = {
        "model": args.model,
        "num_layers": model.config.num_layers,
        "dtype": str(model.dtype).removeprefix("torch.") + (f", {args.quantize}" if args.quantize else ""),
        "machine": machine(model.device),
        "seed": args.seed,
        "tokens": {"prompt": args.prompt_tokens, "continuation": args.continuation_tokens, "new": args.new_tokens},
        "text_files": {name: [path.name for path in paths] for name, paths in domains.items()},
        "calibration_files": args.calibration,
    }
    prompts = [window[: args.prompt_tokens] for some in windows.values() for window in some]
    haystack = [token for tokens in encoded.values() for token in tokens]
    if "text" in wanted:
        result["text"] = evaluate_text(contenders, windows, args.prompt_tokens, seed=args.seed, progress=progress)
    if "ttft" in wanted:
        result["ttft"] = measure_ttft(contenders, prompts[0], args.runs, progress=progress)
    if "generation" in wanted:
        result["generation"] = evaluate_generation(contenders, prompts, args.new_tokens, progress=progress)
    makers = {"needle": tasks.needle_questions, "documents": tasks.document_questions}
    for task, make in makers.items():
        if task in wanted:
            lengths = _lengths(args.lengths, model)
            questions = make(model.tokenizer, haystack, lengths, args.questions, args.seed)
            result[task] = tasks.evaluate_retrieval(
                contenders, questions, lambda text, t=task: progress(f"{t}, {text}")
            )
    if "human-eval" in wanted:
        result["human-eval"] = tasks.evaluate_human_eval(contenders, problems, progress=progress)
    return result


def _lengths(text: str, model: pop.Model) -> list[int]:
    try:
        lengths = [int(length) for length in text.split(",")]
    except ValueError:
        raise InputError(f"--lengths is {text!r}; write numbers of tokens, as in 512,1024") from None
    model.check_fits(max(lengths) + 64, "a prompt of --lengths, with its answer,")
    return lengths


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        result = run(args)
        print(report(result))
        if args.json:
            write_whole(args.json, (json.dumps(result, indent=2) + "\n").encode())
        if args.plot:
            write_whole(args.plot, plot(result, check_plot(args.plot)))
        return 0
    except PopError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def option(name: str, text: str, **settings) -> None:
        parser.add_argument(name, help=text, **settings)

    option("--model", "a name that `pop models` lists, or a directory (smollm2-135m)", default="smollm2-135m")
    option("--dtype", "default: the checkpoint's", choices=("float32", "bfloat16", "float16"))
    option("--device", "cpu, cuda ...; default: a GPU if there is one")
    option("--quantize", "int8: round the weights, as pop.load does, of the full model, too", metavar="KIND")
    option("--tasks", f"any of {','.join(TASKS)} (text,ttft)", default="text,ttft", metavar="TASK,...")
    option("--prune", "a contender, see above; repeatable (default)", action="append", metavar="P")
    option("--baselines", f"any of {','.join(BASELINES)}", default="", metavar="NAME,...")
    option(
        "--baseline-fraction", "what baselines cut where none is given (0.25)", type=float, default=0.25, metavar="F"
    )
    option("--calibration", "texts to calibrate on; default: built-in ones", nargs="+", default=[], metavar="FILE")
    option("--taps", "inputs of calibrated projections, 1 or 2 (2)", type=int, default=2)
    option("--seed", "of calibration, bootstrap and questions (0)", type=int, default=0)
    option("--text", "NAME=FILE[,FILE...], a domain; repeatable", action="append", default=[], metavar="NAME=FILE")
    option("--windows", "windows a domain (8)", type=int, default=8, metavar="N")
    option("--prompt-tokens", "(256)", type=int, default=256, metavar="N")
    option("--continuation-tokens", "(128)", type=int, default=128, metavar="N")
    option("--runs", "timed prefills of each contender (5)", type=int, default=5, metavar="N")
    option("--new-tokens", "length of generated answers (32)", type=int, default=32, metavar="N")
    option("--lengths", "prompt lengths of needle and documents (512,1024)", default="512,1024", metavar="N,...")
    option("--questions", "questions a length and depth (2)", type=int, default=2, metavar="N")
    option("--human-eval", "problems of HumanEval (164, all)", type=int, default=164, metavar="N")
    option("--run-generated-code", "agree that human-eval executes what the model wrote", action="store_true")
    option("--json", "also write all figures here", metavar="FILE")
    option("--plot", "also draw KL over speedup: FILE.svg or FILE.png", metavar="FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
