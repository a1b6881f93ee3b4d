"""Measure how fast `pop` is: against the limit that the shapes set, against the machine, and against other libraries.

    python -m tools.bench --model smollm2-135m --lengths 512,1024,2048 --against transformers
    python -m tools.bench --shape llama3.1-8b --layers 16 --prune 0.3125 --prune corrected:0.5 --json r.json

--model measures a checkpoint. --shape measures random weights of a known shape or of a config.json.
--prune takes default, third, a fraction of the layers, or a saved plan. `corrected:` before it adds random corrections,
which are as fast as those of a calibrated plan. `:32:0.03` after it runs the last 32 tokens at full depth, and has
3 % of the others selected.
tools/bench/README.md defines every figure. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import tempfile

import pop
from pop.errors import InputError, check_count
from pop.models.config import DTYPES
from tools.bench import rivals as libraries
from tools.bench.measure import measure_cold, measure_prefill, measure_slots
from tools.bench.processes import CHILDREN, in_child
from tools.bench.report import plot, report
from tools.bench.shapes import SHAPES
from tools.bench.subject import load_subject, parse_plan
from tools.common import (
    check_plot,
    check_writable,
    exit_status,
    integers_in,
    machine,
    names_in,
    progress,
    write_figures,
    write_plot,
)

TASKS = ("compile", "memory", "cold", "prefill", "slots")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    return exit_status("bench", lambda: _measure_and_print(args, argv))


def _measure_and_print(args, argv: list[str]) -> None:
    check(args)
    if args.child:
        print(json.dumps(CHILDREN[args.child](args)))
        return
    result = run(args, argv)
    print(report(result))
    if args.json:
        write_figures(args.json, result)
    if args.plot:
        write_plot(args.plot, plot(result, check_plot(args.plot)))
    print(json.dumps(result))


def run(args, argv: list[str]) -> dict:
    """Measure all that --tasks asks for.

    Tasks with their own processes come first, because two models may not fit into memory. Then comes `cold`, before
    any other task has met its lengths.
    """
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        if "compile" in args.tasks:
            progress("compiling, cold and warm")
            measured["compile"] = {name: in_child("compile", argv, folder) for name in ("cold", "warm")}
        if "memory" in args.tasks:
            progress("measuring memory")
            measured["memory"] = {N: in_child("memory", argv, folder, ("--lengths", str(N))) for N in args.lengths}
    progress("loading the model")
    subject = load_subject(args)
    model = subject.model
    model.check_fits(max(args.lengths) + args.decode_steps, "the longest of --lengths, with --decode-steps,")
    plans = {text: parse_plan(text, model) for text in args.prune}
    rivals = []
    for name in args.against:
        rivals += libraries.RIVALS[name](model, subject.fields, args.gguf)
    progress("compiling")
    model.warmup(plans=list(plans.values()))
    result = {
        "model": args.model or args.shape,
        "weights": "real" if args.model else "random",
        "layers": model.config.num_layers,
        "all_layers": subject.all_layers,
        "dtype": str(model.dtype).removeprefix("torch."),
        "compiled": model.compiled,
        "machine": machine(model.device),
        "versions": {"pop": pop.__version__, "python": platform.python_version(), **libraries.versions(rivals)},
        "runs": args.runs,
        "decode_steps": args.decode_steps,
        "image": args.image,
        "tasks": args.tasks,
        **measured,
    }
    if "cold" in args.tasks:
        result["cold"] = measure_cold(model, args.lengths, args.decode_steps)
    if "prefill" in args.tasks:
        result["prefill"] = measure_prefill(model, plans, rivals, args)
    if "slots" in args.tasks:
        result["slots"] = measure_slots(model, min(args.lengths), args.decode_steps, args.runs)
    return result


def check(args) -> None:
    """Parse the lists among the options, in place. Raises InputError for what cannot be measured."""
    if args.model and args.shape:
        raise InputError("--model and --shape are both given; leave out one")
    if not args.shape:
        args.model = args.model or "smollm2-135m"
    if args.model and args.layers is not None:
        raise InputError("--layers shortens a --shape, not a --model; leave it out")
    check_count("--runs", args.runs)
    check_count("--decode-steps", args.decode_steps)
    if args.layers is not None:
        check_count("--layers", args.layers)
    args.lengths = sorted(set(integers_in("--lengths", args.lengths)))
    check_count("the shortest of --lengths", args.lengths[0])
    args.tasks = names_in("--tasks", args.tasks, TASKS)
    args.against = names_in("--against", args.against, tuple(libraries.RIVALS))
    args.prune = args.prune or ["default", "corrected:0.5"]
    if args.image is not None:
        args.image = _image_size(args.image)
        if args.against:
            raise InputError("--against compares text prompts; leave out --against or --image")
    check_writable(args.json, args.plot)
    if args.plot:
        check_plot(args.plot)
        if "prefill" not in args.tasks:
            raise InputError("--plot draws the figures of the task prefill; add prefill to --tasks")


def _image_size(text: str) -> tuple[int, int]:
    """Width and height, in pixels."""
    sides = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if not sides:
        raise InputError(f"--image is {text!r}; write width and height in pixels, as in 640x480")
    width, height = sides.groups()
    return int(width), int(height)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--model", help="a name that `pop models` lists, or a directory (smollm2-135m)")
    option("--shape", help=f"random weights of a shape: {', '.join(SHAPES)}, or a folder with a config.json")
    option("--layers", help="shorten the shape to N layers (as many as fit into memory)", type=int, metavar="N")
    option("--dtype", help="default: the checkpoint's", choices=tuple(DTYPES))
    option("--device", help="cpu, cuda ...; default: a GPU if there is one")
    option("--compile", help="(auto)", choices=("auto", "true", "false"), default="auto")
    option("--tasks", help=f"any of {','.join(TASKS)} (all)", default=",".join(TASKS), metavar="TASK,...")
    option("--lengths", help="prompt lengths in tokens (512,1024,2048)", default="512,1024,2048", metavar="N,...")
    option("--image", help="begin the prompts with an image of this size in pixels, as in 640x480", metavar="WxH")
    option("--prune", help="a plan; repeatable (default, corrected:0.5)", action="append", metavar="P")
    option("--runs", help="timed rounds (5)", type=int, default=5, metavar="N")
    option("--decode-steps", help="decode steps in each round (16)", type=int, default=16, metavar="N")
    option("--against", help=f"rivals: {', '.join(libraries.RIVALS)}", default="", metavar="NAME,...")
    option("--gguf", help="the file that llama.cpp reads, with the same weights", metavar="FILE")
    option("--json", help="also write all figures to this file", metavar="FILE")
    option("--plot", help="also draw TTFT over prompt length: FILE.svg or FILE.png", metavar="FILE")
    option("--child", choices=tuple(CHILDREN), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
