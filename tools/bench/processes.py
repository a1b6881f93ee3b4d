"""What needs a fresh process: the memory of a prefill, and the time to compile.

`in_child` starts `python -m tools.bench` with the same options and the hidden option --child, which calls one of
CHILDREN.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from pop.backends.cpu import WIDENED
from pop.errors import InputError
from tools.bench.shapes import prefill_memory
from tools.bench.subject import load_subject, parse_plan, random_prompt
from tools.common import ROOT, resident


def measure_memory(args) -> dict:
    """Measure the peak of a full prefill of the first length in this process, and compute what it should be.

    On a CPU, the peak is the bytes of the weights plus the rise of the high-water mark during the prefill. This
    leaves out Python, libraries, the tokenizer and compiled code. "process_bytes" includes them.
    """
    model = load_subject(args).model
    N = args.lengths[0]
    on_gpu = model.device.type == "cuda"
    if not on_gpu and sys.platform != "linux":
        raise InputError("memory is measured on GPUs and under Linux only; leave it out of --tasks")
    model.warmup()
    short = min(16, N)
    model.prefill([random_prompt(model.config, short)], model.new_cache(1, short))  # loads the libraries it uses

    def prefill():
        model.prefill([random_prompt(model.config, N)], model.new_cache(1, N))

    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(model.device)
        prefill()
        process = torch.cuda.max_memory_allocated(model.device)
        peak = process
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = resident("VmRSS")
        prefill()
        process = resident("VmHWM")
        weights = sum(weight.nbytes for weight in model.module.parameters())
        peak = weights + process - before
    formula = prefill_memory(model.config, N, model.dtype, model.dtype in WIDENED and not on_gpu)
    return {"peak_bytes": peak, "formula_bytes": formula, "ratio": peak / formula, "process_bytes": process}


def measure_compile(args) -> dict:
    """Seconds of the first prefill of the first length by each plan, and of the first decode step, in this process."""
    model = load_subject(args).model
    N = args.lengths[0]
    plans = [parse_plan(text, model) for text in args.prune]
    prompt = random_prompt(model.config, N)
    cache = model.new_cache(1, N + 1)
    began = time.perf_counter()
    for plan in plans:
        cache.reset()
        model.prefill([prompt], cache, plan=plan)
    model.decode(prompt[:1], cache)
    return {"seconds": time.perf_counter() - began, "compiled": model.compiled}


CHILDREN = {"memory": measure_memory, "compile": measure_compile}


def in_child(what: str, argv: list[str], folder: str, extra: tuple[str, ...] = ()) -> dict:
    """Run one of CHILDREN in a fresh process.

    Args:
        what: its name in CHILDREN.
        argv: the options of this process.
        folder: where the compiler keeps compiled code.
        extra: further options.

    Returns:
        What the function in CHILDREN returns.
    """
    command = [sys.executable, "-m", "tools.bench", *argv, *extra, "--child", what]
    # Paths among the options are relative to the current folder, so the child stays there and finds `tools` by path.
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Freed blocks of 64 kB or more go back to the system at once: the peak is what was in use, not what malloc keeps.
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "TORCHINDUCTOR_CACHE_DIR": folder, "PYTHONPATH": paths}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        if done.returncode == 2 and reason.startswith("bench: "):  # perhaps what is wrong whatever is measured
            raise InputError(f"{reason.removeprefix('bench: ')} (in the process that measures {what})")
        raise InputError(f"the process that measures {what} failed ({reason}); leave {what} out of --tasks")
    return json.loads(done.stdout.splitlines()[-1])
