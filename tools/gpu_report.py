"""Measure on a GPU what was estimated without one, and print both side by side: about ten minutes on an H100.

    python -m tools.gpu_report                                 # or some of its parts: ... attention decode --layers 8

Each figure is a JSON line as soon as it is measured, and a row of the table at the end. A part that fails does not stop
the others. The model has the shape of Llama-3.1-8B and random weights.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from statistics import median

import torch
import torch.nn.functional as F

import pop
from pop import engine
from pop.backends import cuda
from pop.backends.decode_attention import decode_attention
from pop.errors import InputError
from tools.bench import __main__ as bench
from tools.bench.measure import measure_cold, measure_prefill
from tools.bench.rounds import device_seconds, seconds
from tools.bench.shapes import decode_bytes
from tools.bench.subject import load_subject, parse_plan, random_prompt
from tools.bench.turns import bandwidth_turn, peak_turn
from tools.common import ROOT, exit_status, machine, names_in, progress, table

COLD = (611, 1203, 2222, 5003)  # prompt lengths that no other part uses
KEYS = (512, 2048, 8192, 32_768)  # that one token attends
PRUNED = "0.3125"  # 10 of 32 layers
L2 = 2**28  # bytes: more than the cache of any GPU, so that matrices that take turns are read from memory

# Estimates for one H100 (3.0 TB/s, 640 TFLOP/s), all 32 layers, bfloat16. They are computed from shapes, not measured.
ESTIMATES = {
    "matrix product": "640 TFLOP/s",
    "memory": "3.0 TB/s",
    "attention of one token, 32,768 keys: pop": "52 us",
    "attention of one token, 32,768 keys: flash": "55 us",
    "attention of one token, 32,768 keys: torch's choice": "250 to 700 us",
    "matrix 4,096 x 4,096 and one token: cuBLAS": "2.2 TB/s",
    "matrix 4,096 x 4,096 and one token: Inductor": "2.6 TB/s",
    "matrix 28,672 x 4,096 and one token: cuBLAS": "2.8 TB/s",
    "matrix 28,672 x 4,096 and one token: Inductor": "2.8 TB/s",
    **{f"{length:,} tokens: first TTFT / second": "1" for length in COLD},
    "decode step at position 1,000, uncaptured": "7 to 8 ms",
    "decode step at position 1,000, captured": "6.2 to 6.6 ms",
    "MBU, captured": "0.76 to 0.81",
    "prefill of 2,048 tokens": "50 to 55 ms",
    "MFU at 2,048 tokens": "0.75",
    "speedup at 512 tokens": "at most 1.20",
    "speedup at 2,048 tokens": "1.33 to 1.36",
    "speedup at 8,192 tokens": "1.40",
    "waits for each token of generate": "1",
    "kernels of sgemm or cuDNN": "none",
    "pytest -m cuda": "all pass",
}
Figure = tuple[str, float | str, str]  # what was measured, the value, and its unit


class Setup:
    """What the parts share: the options of tools.bench and, once a part asks for it, the model."""

    def __init__(self, args):
        options = ["--shape", args.shape, "--device", args.device, "--lengths", args.lengths, "--prune", PRUNED]
        if args.layers is not None:
            options += ["--layers", str(args.layers)]
        self.args = bench.parser().parse_args(options)
        self.device = torch.device(args.device)
        bench.check(self.args)

    @functools.cached_property
    def model(self) -> pop.Model:
        progress("making and compiling the model")
        model = load_subject(self.args).model
        model.warmup()
        return model


def device_us(function: Callable, device: torch.device) -> float:
    """Microseconds of a call on the device. A CUDA graph replays the call, so the time includes no launches."""
    if device.type != "cuda":
        return seconds(function, device, 2) * 1e6
    with torch.cuda.stream(torch.cuda.Stream()):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return device_seconds(graph.replay, device, 10) * 1e6


def rates(setup: Setup) -> Iterator[Figure]:
    """The machine's limits."""
    yield "matrix product", peak_turn(setup.device, torch.bfloat16)()["flops_per_s"] / 1e12, "TFLOP/s"
    yield "memory", bandwidth_turn(setup.device)()["bytes_per_s"] / 1e12, "TB/s"


def cold(setup: Setup) -> Iterator[Figure]:
    """Lengths that the process has not met before."""
    for length, row in measure_cold(setup.model, COLD, 8).items():
        first = row["first"]
        yield f"{length:,} tokens: first TTFT / second", first["ttft_s"] / row["second"]["ttft_s"], ""
        yield f"{length:,} tokens: first decode steps", first["step_s"] * 1e3, "ms"


def attention(setup: Setup) -> Iterator[Figure]:
    """One token over caches of several sizes."""
    for keys in KEYS:
        yield from _one_token(keys, setup.device)


def _one_token(keys: int, device: torch.device) -> Iterator[Figure]:
    """The ways to attend. Caches take turns, so that each is read from memory."""
    H = 32
    K = 8
    E = 128
    count = max(1, L2 // (4 * keys * K * E))
    caches = torch.randn(count, 2, 1, K, keys + 1, E, device=device).bfloat16().transpose(3, 4)
    q = torch.randn(1, 1, H, E, device=device).bfloat16()
    spans = torch.tensor([[[0, keys - 1]]], dtype=torch.int32, device=device)
    mask = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=device)

    def by_torch(k, v):
        k = k[:, :-1].transpose(1, 2)  # [1, K, N, E]
        v = v[:, :-1].transpose(1, 2)  # [1, K, N, E]
        groups = q.view(1, K, -1, E)  # the heads of a group take the place of tokens
        return F.scaled_dot_product_attention(groups, k, v, attn_mask=mask)

    ways = {
        "pop": lambda k, v: decode_attention(q, k, v, spans, E**-0.5),
        "flash": lambda k, v: cuda.fused_attention(q, k[:, :-1], v[:, :-1], E**-0.5),
        "torch's choice": by_torch,
    }
    exact = engine.attention.decode_attention(q.float(), *caches[0].float(), spans, E**-0.5).flatten()
    for name, way in ways.items():
        what = f"attention of one token, {keys:,} keys: {name}"
        yield what, device_us(lambda: [way(*cache) for cache in caches], device) / count, "us"  # noqa: B023
        yield f"{what}, error", float((way(*caches[0]).float().flatten() - exact).norm() / exact.norm()), ""


def products(setup: Setup) -> Iterator[Figure]:
    """A matrix and one token, by cuBLAS and by Inductor. The matrices take turns, as above."""
    inductor = torch.compile(lambda x, w: F.linear(x, w), options={"coordinate_descent_tuning": True}, dynamic=False)
    for out, inner in ((4096, 4096), (1024, 4096), (14_336, 4096), (28_672, 4096), (4096, 14_336)):
        count = max(1, L2 // (2 * out * inner))
        matrices = torch.randn(count, out, inner, device=setup.device).bfloat16()
        x = torch.randn(1, inner, device=setup.device).bfloat16()
        for name, product in (("cuBLAS", F.linear), ("Inductor", inductor)):
            us = device_us(lambda: [product(x, matrix) for matrix in matrices], setup.device)  # noqa: B023
            yield f"matrix {out:,} x {inner:,} and one token: {name}", matrices.nbytes / us / 1e6, "TB/s"


def decode(setup: Setup) -> Iterator[Figure]:
    """A decode step, launch by launch and as one captured graph."""
    model = setup.model
    position = 1000
    cache = model.new_cache(1, 2048)
    token = torch.zeros(1, dtype=torch.int64, device=setup.device)
    model.prefill([random_prompt(model.config, position)], cache)
    end_of_prompt = cache.snapshot()
    stages = model._stages(1)
    size = decode_bytes(model.config, position + 25, model.dtype)
    rate = bandwidth_turn(setup.device)()["bytes_per_s"]
    for name, chosen in (("uncaptured", stages._replace(replay=lambda *_: lambda run: run())), ("captured", stages)):
        cache.restore(end_of_prompt)
        step = lambda: int(engine.decode(model.module, token, cache, chosen).argmax())  # noqa: B023, E731
        second = median([seconds(step, setup.device) for _ in range(40)][10:])
        yield f"decode step at position 1,000, {name}", second * 1e3, "ms"
        yield f"MBU, {name}", size / second / rate, ""


def prefill(setup: Setup) -> Iterator[Figure]:
    """Full and pruned prefill, against the limit that counts memory reads."""
    figures = measure_prefill(setup.model, {PRUNED: parse_plan(PRUNED, setup.model)}, [], setup.args)
    for length, row in figures.items():
        pruned = row["plans"][PRUNED]
        yield f"prefill of {length:,} tokens", row["ttft_s"]["median"] * 1e3, "ms"
        yield f"MFU at {length:,} tokens", row["mfu"]["median"], ""
        yield f"speedup at {length:,} tokens", pruned["speedup"]["median"], ""
        yield f"limit of the speedup at {length:,} tokens", pruned["limit"], ""
        yield f"efficiency at {length:,} tokens", pruned["efficiency"]["median"], ""


def waits(setup: Setup) -> Iterator[Figure]:
    """How often `generate` waits for the device."""
    counts = {}
    for tokens in (20, 20, 40):  # the first warms up
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            setup.model.generate([1] * 300, max_new_tokens=tokens)
        torch.cuda.set_sync_debug_mode("default")
        counts[tokens] = sum("synchroniz" in str(warning.message) for warning in caught)
    yield "waits for each token of generate", (counts[40] - counts[20]) / 20, ""


def kernels(setup: Setup) -> Iterator[Figure]:
    """The kernels of a pruned prefill and of decode steps, by name."""
    model = setup.model
    plan = parse_plan(PRUNED, model)
    cache = model.new_cache(1, 1024)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        token = model.prefill([random_prompt(model.config, 512)], cache, plan=plan).argmax(-1)
        for _ in range(12):
            token = model.decode(token, cache).argmax(-1)
        torch.cuda.synchronize()
    counts = Counter({event.key: event.count for event in profile.key_averages()})
    slow = sum(count for name, count in counts.items() if "sgemm" in name or "cudnn" in name)
    yield "kernels of sgemm or cuDNN", f"{slow} of {counts.total()}", ""
    for name, count in counts.most_common(12):
        yield f"launches of {name[:80]}", count, ""


def tests(setup: Setup) -> Iterator[Figure]:
    """The tests on the GPU."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-m", "cuda", "tests/test_cuda.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    yield "pytest -m cuda", (done.stdout or done.stderr).strip().splitlines()[-1], ""


PARTS = {part.__name__: part for part in (rates, attention, products, cold, decode, prefill, waits, kernels, tests)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(PARTS)} (all)")
    parser.add_argument("--layers", type=int, help="shorten the model to N layers", metavar="N")
    parser.add_argument("--shape", help="as in tools.bench (llama3.1-8b)", default="llama3.1-8b")
    parser.add_argument("--lengths", help="of prefills (512,2048,8192)", default="512,2048,8192", metavar="N,...")
    parser.add_argument("--device", help="(cuda)", default="cuda")
    return exit_status("gpu_report", lambda: _measure(parser.parse_args(argv)))


def _measure(args) -> None:
    parts = names_in("parts", ",".join(args.parts or PARTS), tuple(PARTS))
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("this machine has no GPU that torch can use; run gpu_report where there is one")
    setup = Setup(args)
    rows = [["", "estimate for an H100", "measured"]]
    print(json.dumps({"machine": machine(setup.device), "pop": pop.__version__}), flush=True)
    for name in parts:
        progress(name)
        try:
            for what, value, unit in PARTS[name](setup):
                print(json.dumps({"part": name, "what": what, "value": value, "unit": unit}), flush=True)
                shown = value if isinstance(value, str) else f"{value:,.4g} {unit}"
                rows.append([what, ESTIMATES.get(what, ""), shown])
        except Exception as error:  # the other parts can still be measured
            print(json.dumps({"part": name, "failed": f"{type(error).__name__}: {error}"[:500]}), flush=True)
            rows.append([name, "", f"failed: {type(error).__name__}"])
    print("\n" + table(rows, words=(0, 1, 2)))


if __name__ == "__main__":
    sys.exit(main())
