"""Load a checkpoint of full size, prefill and decode: time against the disk, memory against the weights, TTFT.

    python -m tools.checkpoints.make_random llama3.1-8b FOLDER
    python -m tools.checkpoints.measure FOLDER --lengths 1024,2048

Prompts are random token ids. The full and the pruned prefill take turns after a short, untimed one. Nothing is
compiled. Linux only: the disk is read with cold caches, and memory comes from /proc.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from statistics import mean, median

import torch

import pop
from pop.errors import InputError, check_count
from pop.pruning.cost import speedup_limit
from tools.common import exit_status, integers_in, resident, timed

SAMPLE = 2 * 2**30  # bytes of the files that are read to measure the disk's speed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.checkpoints.measure", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="a checkpoint")
    parser.add_argument("--lengths", default="1024,2048", help="tokens of the prompts (1024,2048)", metavar="N,N")
    parser.add_argument("--prune", type=float, default=1 / 3, help="share of the layers (a third)", metavar="P")
    parser.add_argument("--runs", type=int, default=1, help="timed prefills of each kind (1)", metavar="N")
    parser.add_argument("--decode-steps", type=int, default=4, help="timed decode steps (4)", metavar="N")
    args = parser.parse_args(argv)
    return exit_status("measure", lambda: measure(args))


def measure(args) -> None:
    """Measure as the command line asks, and print each figure as soon as it is known."""
    lengths = [check_count("--lengths", length) for length in integers_in("--lengths", args.lengths)]
    runs = check_count("--runs", args.runs)
    steps = check_count("--decode-steps", args.decode_steps)
    files = sorted(args.folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{args.folder} holds no weights; make some with python -m tools.checkpoints.make_random")
    before = resident("VmRSS")
    model = _measure_load(args.folder, files, args.prune)
    random = torch.Generator().manual_seed(0)
    warm_up = torch.randint(model.config.vocab_size, (1, min(64, *lengths)), generator=random)
    model.prefill(warm_up, model.new_cache(1, 64))
    for length in lengths:
        prompt = torch.randint(model.config.vocab_size, (1, length), generator=random)
        step_s = _measure_prompt(model, prompt, runs, steps)
    print(f"decode   {step_s:.3f} s a token")
    print(f"memory   {(resident('VmHWM') - before) / 1e9:.2f} GB at most, with prefill and decode")


def _measure_load(folder: Path, files: list[Path], prune: float) -> pop.Model:
    """Load with cold caches: the time against plain reading, and the memory against the weights."""
    forget(files)
    speed = read_speed(files)
    print(f"disk     {speed / 1e9:.2f} GB/s", flush=True)
    forget(files)
    before = resident("VmRSS")
    began = time.perf_counter()
    model = pop.load(folder, prune=prune, compile=False, progress=False)
    seconds = time.perf_counter() - began
    peak = resident("VmHWM") - before
    weights = sum(weight.nbytes for weight in model.module.parameters())
    rate = weights / seconds
    print(f"load     {seconds:.1f} s, {rate / 1e9:.2f} GB/s: {rate / speed:.2f} of the disk's speed")
    print(f"memory   {peak / 1e9:.2f} GB at most for {weights / 1e9:.2f} GB of weights: {peak / weights:.3f}")
    return model


def _measure_prompt(model: pop.Model, prompt: torch.Tensor, runs: int, steps: int) -> float:
    """Print the times of the full and the pruned prefill in turn. Returns the mean seconds of a decode step."""
    length = prompt.shape[1]
    cache = model.new_cache(1, length + steps)
    plans = (pop.PrunePlan.none(), model.plan)
    times, steps_s = {plan: [] for plan in plans}, []
    for plan in plans * runs:
        cache.reset()
        ttft, decode = timed(
            lambda plan=plan: int(model.prefill(prompt, cache, plan=plan).argmax()),
            lambda token: int(model.decode(torch.tensor([token]), cache).argmax()),
            steps,
        )
        times[plan].append(ttft)
        steps_s += decode
    full, pruned = (median(times[plan]) for plan in plans)
    limit = speedup_limit(model.config, length, model.plan)
    print(f"prefill  {length} tokens: {full:.2f} s, {pruned:.2f} s without {len(model.plan.layers)} of the layers")
    print(f"         {full / pruned:.2f}x, of {limit:.2f}x that the shapes allow", flush=True)
    return mean(steps_s)


def forget(files: list[Path]) -> None:
    """Ask the system to drop the files from its cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_speed(files: list[Path]) -> float:
    """Bytes per second of plain reading, file after file."""
    done = 0
    began = time.perf_counter()
    buffer = bytearray(2**24)
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while done < SAMPLE and (count := stream.readinto(buffer)):
                done += count
    return done / (time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main())
