"""Running a loop: one case after the other, in a process that may crash or hang."""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import multiprocessing
import os
import random
import signal
import sys
import time
from contextlib import suppress
from itertools import count

import torch

HANGS = 300  # seconds after which a case that has not ended hangs


def watch(name: str, args: argparse.Namespace) -> bool:
    """Run a loop in a process of its own, so that a crash or a hang is a failure like any other. Whether it passed."""
    print(f"{name}: cases from seed {args.seed} on", flush=True)
    spawn = multiprocessing.get_context("spawn")
    seed = spawn.Value("q", args.seed)  # of the current case
    child = spawn.Process(target=run, args=(name, args, seed))
    child.start()
    hangs = False
    try:
        while child.exitcode is None and not hangs:
            before = seed.value
            child.join(HANGS)
            hangs = child.exitcode is None and seed.value == before
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # and the processes that it has started
    if child.exitcode == 0:
        return True
    how = f"takes more than {HANGS} seconds" if hangs else f"has failed with status {child.exitcode}"
    again = f"python -m tools.fuzz {name} --seed {seed.value} --cases 1"
    print(f"{name}: the case with seed {seed.value} {how}; repeat it with `{again}`", file=sys.stderr, flush=True)
    return False


def run(name: str, args: argparse.Namespace, seed) -> None:
    """Run the cases of a loop. Any exception ends the process with status 1.

    Args:
        name: The loop's module. Its `Loop(model)` has `try_one(random)` for a case, and `summary()`.
        args: The options of the command.
        seed: Shared memory for the seed of the current case.
    """
    os.setpgrp()
    faulthandler.enable()
    torch.set_num_threads(1)  # tiny tensors run faster without a thread pool to wake
    loop = importlib.import_module(f"tools.fuzz.{name}").Loop(args.model)
    began = time.monotonic()
    for number in count():
        is_over = time.monotonic() - began >= 60 * args.minutes
        if number == args.cases or (is_over and number > 0):
            break
        seed.value = args.seed + number
        loop.try_one(random.Random(seed.value))
    seconds = time.monotonic() - began
    print(f"{name}: {number} cases in {seconds:.0f} s from seed {args.seed}; {loop.summary()}", flush=True)
