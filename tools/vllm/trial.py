"""What pruning gains in your vLLM: python -m tools.vllm.trial FOLDER --input-len 8000 [OPTIONS]

It measures the time to the first token at full depth and with two plans, which it makes. "plain" prunes the deepest
third of the layers, rounded up, and "selects" also runs as many tokens at full depth as a calibrated plan selects.
Neither is for use, since no correction is fitted. --plan FILE measures that plan in their place. All other options
follow FOLDER. They are those of `vllm bench latency`, such as --tensor-parallel-size 2.

It starts vLLM anew for each plan, which takes minutes. The prompts are random tokens. The limit is what the counted
arithmetic allows.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pop
from pop.calibration.search import last_and_selected
from pop.checkpoints.config_json import read_config
from pop.checkpoints.registry import find_folder
from pop.errors import InputError, PopError, check_count
from pop.pruning.cost import speedup_limit
from pop.system.files import read_json

# `vllm bench latency`, which vLLM's CPU build does not install
PROGRAM = """
from vllm.benchmarks import latency
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
latency.add_cli_args(parser)
latency.main(parser.parse_args())
"""
LINES = 15  # of a log that shows why vLLM has failed
UNCACHED = "--no-enable-prefix-caching"  # every prompt is sent many times


def shape_of(folder: Path):
    """The config of a checkpoint. If its weights are quantised, it is that of the original ones."""
    path = folder / "config.json"
    fields = read_json(path) if path.is_file() else {}
    if fields.pop("quantization_config", None) is None:
        return read_config(folder)
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        (copy / "config.json").write_text(json.dumps(fields), encoding="utf-8")
        return read_config(copy)


def plans_of(config, given: list[str], length: int) -> dict[str, pop.PrunePlan]:
    """The plans to measure, by name: those that are given, or two that show what pruning can gain.

    Raises PopError if one does not fit the model, or prunes no prompt of this length.
    """
    plans = {name: pop.PrunePlan.of(name, config.num_layers) for name in given}
    if not given:
        layers = range(2 * config.num_layers // 3, config.num_layers)
        last, selected = last_and_selected()
        options = {"full_depth_first": 1, "full_depth_last": last}
        plans["plain"] = pop.PrunePlan(layers, **options)
        plans["selects"] = pop.PrunePlan(layers, **options, full_depth_selected=selected)
    for name, plan in plans.items():
        if not plan.num_pruned(length):
            raise InputError(f"the plan {name} prunes no prompt of {length} tokens; give a longer --input-len")
    return plans


def first_token_ms(plan: pop.PrunePlan, name: str, words: list[str], folder: Path) -> float:
    """The median time to the first token of vLLM with a plan. Raises PopError if it fails, or prunes nothing."""
    file = folder / "measured.plan"
    plan.save(file)
    figures = folder / "figures.json"
    log = folder / "log"
    with log.open("w") as output:
        status = subprocess.run(
            [sys.executable, "-c", PROGRAM, *words, "--output-json", figures],
            env=os.environ | {"POP_PLAN": str(file), "VLLM_LOGGING_LEVEL": "INFO"},  # which tells of pruning
            stdout=output,
            stderr=subprocess.STDOUT,
        ).returncode
    said = log.read_text(errors="replace")
    if status:
        lines = [line for line in said.splitlines() if "pop.errors" in line] or said.splitlines()[-LINES:]
        print(*lines, sep="\n", file=sys.stderr)
        kept = shutil.copy(log, tempfile.mkdtemp(prefix="pop-trial-"))  # an engine's own error is further above
        raise PopError(f"vLLM has ended with status {status} for the plan {name}; the lines above are from {kept}")
    if plan.layers and "now pruning" not in said:
        raise PopError(
            f"with the plan {name}, vLLM has pruned nothing: is pop-prefill-vllm installed where {sys.executable} is?"
        )
    try:
        return 1000 * json.loads(figures.read_text())["percentiles"]["50"]
    except (OSError, ValueError, LookupError):
        raise PopError(
            f"vLLM has measured nothing with the plan {name}; leave out options that change its output"
        ) from None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.vllm.trial",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", help="what vLLM is given: a folder, or a repository in the cache", metavar="FOLDER")
    parser.add_argument("--input-len", type=int, default=8000, help="tokens of a prompt (%(default)s)", metavar="N")
    parser.add_argument("--plan", action="append", default=[], help="measure this value of POP_PLAN", metavar="FILE")
    args, options = parser.parse_known_args(argv)
    words = ["--model", args.model, "--input-len", str(args.input_len), "--batch-size", "1", "--output-len", "1"]
    try:
        check_count("--input-len", args.input_len)
        config = shape_of(find_folder(args.model))
        plans = {"none": pop.PrunePlan.none(), **plans_of(config, args.plan, args.input_len)}
        print(f"{'plan':30} {'first token, ms':>16} {'gain':>7} {'limit':>7}", flush=True)
        full = None
        for name, plan in plans.items():
            with tempfile.TemporaryDirectory() as folder:
                taken = first_token_ms(plan, name, [*words, *options, UNCACHED], Path(folder))
            full = full or taken
            limit = speedup_limit(config, args.input_len, plan)
            print(f"{name:30} {taken:16,.0f} {full / taken:6.2f}x {limit:6.2f}x", flush=True)
    except PopError as error:
        print(f"trial: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
