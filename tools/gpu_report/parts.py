"""The parts of the report. Each yields figures, and runs in a process of its own. The weights are random numbers."""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from statistics import median

import torch
import torch.nn.functional as F

import pop
from pop import engine
from pop.backends import cuda, cuda_graph, span_attention
from pop.calibration.search import last_and_selected
from pop.engine.decode_step import DecodeStep
from pop.engine.layer_pass import ReplayedPasses
from tools.bench import __main__ as bench
from tools.bench.measure import measure_cold, measure_prefill
from tools.bench.rounds import device_seconds, seconds
from tools.bench.shapes import decode_bytes
from tools.bench.subject import load_subject, parse_plan, random_prompt
from tools.bench.turns import bandwidth_turn, peak_turn
from tools.common import ROOT, progress
from tools.gpu_report.estimates import COLD, POSITION

PRUNED = "0.3125"  # 10 of 32 layers
LAST, SELECTED = last_and_selected()
CALIBRATED = f"corrected:0.3125:{LAST}"  # with codes, and as many last tokens at full depth as calibration decides
LONG = 32_000  # tokens
KEYS = (512, 2048, 8192, 32_768)  # that one token attends to
BREAK_EVEN = (64, 128, 256, 512, 1024, 2048, 4096)  # tokens
BATCHES = (8, 32)
L2 = 2**28  # bytes: more than the cache of any GPU, so that matrices that take turns are read from memory
VARIABLES = {"pdl": {"TORCHINDUCTOR_ENABLE_PDL": "1"}}  # of a part's process
SLOW = re.compile("sgemm|cudnn|f32f32|gemmSN|gemv2T")  # names of kernels that multiply in float32, and of cuDNN's

Figure = tuple[str, float | str, str]  # what was measured, the value, and its unit


class Setup:
    """What a part needs: the options of tools.bench and, once it asks for one, the model."""

    def __init__(self, args):
        self.options = args
        self.args = self.bench_options(args.shape, args.lengths)
        self.device = torch.device(args.device)
        self.models: list[pop.Model] = []  # all that were made, so that `fallbacks` can ask how they ran
        self.slow: list[str] = []  # what did not run as fast as it should

    def bench_options(self, shape: str, lengths: str):
        """The options of tools.bench for a shape and lengths."""
        options = ["--shape", shape, "--device", self.options.device, "--lengths", lengths, "--runs", "3"]
        if self.options.layers is not None:
            options += ["--layers", str(self.options.layers)]
        args = bench.parser().parse_args(options)
        bench.check(args)
        return args

    @functools.cached_property
    def model(self) -> pop.Model:
        return self.warm(self.args)

    def warm(self, args) -> pop.Model:
        """A model that is compiled, for one row and for several."""
        progress("making and compiling the model")
        subject = load_subject(args)
        model = subject.model
        self.models.append(model)
        if args.layers is None and model.config.num_layers < subject.all_layers:
            fit = f"{model.config.num_layers} of {subject.all_layers} layers"
            self.slow.append(f"only {fit} fit into the free memory")
        model.warmup(batch_size=2)
        if not model.compiled:
            self.slow.append("the model is not compiled")
        return model


def fallbacks(setup: Setup) -> list[str]:
    """What made figures slower than they would be: nothing may measure a fallback unnoticed."""
    if setup.device.type != "cuda":
        return []
    found = list(setup.slow)
    if not cuda.HAS_KERNELS:
        found.append("torch lacks the attention kernels that pop knows")
    if not span_attention.HAS_TRITON:
        found.append("Triton is missing")
    if span_attention._failed:
        found.append(f"Triton fails for {span_attention._failed}")
    for model in setup.models:
        for what in sorted(cuda_graph._refused.get(model.module, ())):
            found.append(f"{what} could not be captured")
    return found


def device_us(function: Callable, device: torch.device) -> float:
    """Microseconds of a call on the device. A CUDA graph replays the call, so the time includes no launches."""
    if device.type != "cuda":
        return seconds(function, device, 2) * 1e6
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return device_seconds(graph.replay, device, 10) * 1e6


def paths(setup: Setup) -> Iterator[Figure]:
    """Which form each stage takes on this machine, after a prompt and some tokens."""
    model = setup.model
    config = model.config
    cache = model.new_cache(1, 512)
    for _ in range(10):
        cache.reset()
        token = model.prefill([random_prompt(config, 64)], cache).argmax(-1)
    for _ in range(10):
        token = model.decode(token, cache).argmax(-1)
    q = torch.empty(1, 2, config.num_heads, config.head_dim, dtype=model.dtype, device=model.device)
    if setup.device.type != "cuda":
        yield "path of layers", "compiled" if model.compiled else "eager", ""
        yield "path of attention", "kernels of the CPU", ""
        return
    causal = "torch's choice"
    if cuda.is_supported(q):
        causal = "flash" if cuda.has_flash(q) else "memory-efficient"
    runs_triton = span_attention._processors(q) and (q.device, q.dtype, q.shape[-1]) not in span_attention._failed
    step = cache.passes.get(DecodeStep)
    prompts = cache.passes.get(ReplayedPasses)
    passes = prompts.kept.values() if prompts else ()
    replays = {
        "a decode step": step and step.replay,
        "a short prompt": next((one for _, one in passes), None),
    }
    can_have_fa3 = torch.cuda.get_device_properties(q.device).major == 9 and find_spec("flash_attn_interface")
    found = {
        "path of layers": ("compiled" if model.compiled else "eager", "compiled"),
        "path of causal attention": (causal, "flash"),
        "path of flash attention": (cuda.chosen_flash() or "FA2", "FA3" if can_have_fa3 else "FA2"),
        "path of other attention": ("Triton" if runs_triton else "torch's choice", "Triton"),
    }
    for what, replay in replays.items():
        is_captured = getattr(replay, "graph", None) is not None
        found[f"path of {what}"] = ("captured" if is_captured else "launch by launch", "captured")
    for what, (path, fastest) in found.items():
        yield what, path, ""
        if path != fastest:
            setup.slow.append(f"{what}: {path}, not {fastest}")


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
    """Prompts, and one token over caches of several sizes."""
    yield from _prompts("FA2", setup.device)
    for keys in KEYS:
        yield from _one_token(keys, setup.device)


def fa3(setup: Setup) -> Iterator[Figure]:
    """Prompts by FlashAttention-3, which replaces torch's own operator."""
    if find_spec("flash_attn_interface") is None:
        yield "FlashAttention-3", "its package flash_attn_interface is not installed", ""
        return
    from torch.nn.attention import activate_flash_attention_impl

    activate_flash_attention_impl("FA3")
    yield from _prompts("FA3", setup.device)


def _prompts(name: str, device: torch.device) -> Iterator[Figure]:
    """The rate of causal attention."""
    H = 32
    K = 8
    E = 128
    for length in (2048, 8192, LONG):
        q = torch.randn(1, length, H, E, device=device).bfloat16()
        k, v = (torch.randn(1, length, K, E, device=device).bfloat16() for _ in range(2))
        flops = 2 * H * E * length**2  # half of the scores, and of the weighted sum
        us = device_us(lambda: cuda.fused_attention(q, k, v, E**-0.5, engine.attention.UNBOUNDED), device)  # noqa: B023
        yield f"attention of a prompt of {length:,} tokens: {name}", flops / us / 1e6, "TFLOP/s"


def _one_token(keys: int, device: torch.device) -> Iterator[Figure]:
    """One token over a cache, in several ways. Caches take turns, so that each is read from memory."""
    H = 32
    K = 8
    E = 128
    count = max(1, L2 // (4 * keys * K * E))
    caches = torch.randn(count, 2, 1, K, keys + 1, E, device=device).bfloat16().transpose(3, 4)
    q = torch.randn(1, 1, H, E, device=device).bfloat16()
    spans = torch.tensor([[[0, keys - 1]]], dtype=torch.int32, device=device)
    metadata = engine.attention.AttentionMetadata((), None, spans)
    mask = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=device)

    def by_torch(k, v):
        k = k[:, :-1].transpose(1, 2)  # [1, K, N, E]
        v = v[:, :-1].transpose(1, 2)  # [1, K, N, E]
        groups = q.view(1, K, -1, E)  # the heads of a group take the place of tokens
        return F.scaled_dot_product_attention(groups, k, v, attn_mask=mask)

    ways = {
        "pop": lambda k, v: cuda.cache_attention(q, k, v, metadata, E**-0.5),
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


def fp8(setup: Setup) -> Iterator[Figure]:
    """Whether products in 8 bits would be worth it."""
    n = 8192
    a = torch.randn(n, n, device=setup.device)
    one = torch.ones((), device=setup.device)
    small = a.to(torch.float8_e4m3fn)
    wide = a.bfloat16()
    fast = device_seconds(lambda: torch._scaled_mm(small, small.T, one, one, out_dtype=torch.bfloat16), setup.device, 5)
    slow = device_seconds(lambda: wide @ wide.T, setup.device, 5)
    yield "product in fp8 / in bfloat16", slow / fast, ""


def decode(setup: Setup) -> Iterator[Figure]:
    """A decode step, launch by launch and as one captured graph."""
    launched = lambda *_: lambda run: run()  # noqa: E731
    yield from _step(setup, setup.model, "uncaptured", setup.model._stages(1)._replace(replay=launched))
    yield from _step(setup, setup.model, "captured", setup.model._stages(1))


def pdl(setup: Setup) -> Iterator[Figure]:
    """A captured decode step whose kernels start before the one before them has ended."""
    yield from _step(setup, setup.model, "captured, with programmatic dependent launch", setup.model._stages(1))


def batches(setup: Setup) -> Iterator[Figure]:
    """Captured decode steps of several rows."""
    for rows in BATCHES:
        yield from _step(setup, setup.model, f"captured, {rows} rows", setup.model._stages(rows), rows)


def _step(setup: Setup, model: pop.Model, name: str, stages, rows: int = 1) -> Iterator[Figure]:
    """A decode step after a prompt, by the clock and on the device alone."""
    cache = model.new_cache(rows, 2048)
    token = torch.zeros(rows, dtype=torch.int64, device=setup.device)
    model.prefill([random_prompt(model.config, POSITION)] * rows, cache)
    step = lambda: engine.decode(model.module, token, cache, stages).argmax(-1).tolist()  # noqa: E731
    second = median([seconds(step, setup.device) for _ in range(40)][10:])
    yield f"decode step at position 1,000, {name}", second * 1e3, "ms"
    if rows == 1:
        read = decode_bytes(model.config, POSITION + 25, model.dtype)
        yield f"MBU, {name}", read / second / bandwidth_turn(setup.device)()["bytes_per_s"], ""
    if name.startswith("captured") and setup.device.type == "cuda":
        graph = cache.passes[DecodeStep].replay.graph
        if graph is None:
            setup.slow.append(f"the decode step of {rows} rows was not captured")
            return
        yield f"device time of a decode step, {name}", device_seconds(graph.replay, setup.device, 10) * 1e3, "ms"


def prefill(setup: Setup) -> Iterator[Figure]:
    """Full and pruned prefill, against the limit that counts memory reads."""
    yield from _prefills(setup.model, setup.args)


def long(setup: Setup) -> Iterator[Figure]:
    """The same for a long prompt."""
    yield from _prefills(setup.model, setup.bench_options(setup.options.shape, str(LONG)))


def _prefills(model: pop.Model, args) -> Iterator[Figure]:
    plans = {PRUNED: parse_plan(PRUNED, model)}
    for length, row in measure_prefill(model, plans, [], args).items():
        pruned = row["plans"][PRUNED]
        yield f"prefill of {length:,} tokens", row["ttft_s"]["median"] * 1e3, "ms"
        yield f"MFU at {length:,} tokens", row["mfu"]["median"], ""
        yield f"speedup at {length:,} tokens", pruned["speedup"]["median"], ""
        yield f"limit of the speedup at {length:,} tokens", pruned["limit"], ""
        yield f"efficiency at {length:,} tokens", pruned["efficiency"]["median"], ""


def calibrated(setup: Setup) -> Iterator[Figure]:
    """A plan as calibration makes it, with its last tokens and selected ones at full depth."""
    model = setup.model
    plan = parse_plan(CALIBRATED, model)
    plans = {"calibrated": plan, "calibrated, with selection": dataclasses.replace(plan, full_depth_selected=SELECTED)}
    model.warmup(plans=list(plans.values()))
    for length, row in measure_prefill(model, plans, [], setup.args).items():
        for name, found in row["plans"].items():
            yield f"speedup at {length:,} tokens, {name}", found["speedup"]["median"], ""


def small(setup: Setup) -> Iterator[Figure]:
    """From how many tokens on a plan makes models of several sizes faster."""
    lengths = ",".join(map(str, BREAK_EVEN))
    for shape in dict.fromkeys(("smollm2-135m", setup.options.shape)):
        args = setup.bench_options(shape, lengths)
        model = setup.warm(args)
        rows = measure_prefill(model, {PRUNED: parse_plan(PRUNED, model)}, [], args)
        speedups = {length: row["plans"][PRUNED]["speedup"]["median"] for length, row in rows.items()}
        for length, speedup in speedups.items():
            yield f"{shape}: speedup at {length:,} tokens", speedup, ""
        faster = [length for length in BREAK_EVEN if speedups[length] > 1]
        yield f"{shape}: a plan is faster from", f"{faster[0]:,} tokens" if faster else "no length on", ""


def memory(setup: Setup) -> Iterator[Figure]:
    """Activations at the peak of a prefill, for one row and for several."""
    model = setup.model
    length = max(setup.args.lengths)
    for rows in (1, *BATCHES):
        cache = model.new_cache(rows, length)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model.prefill([random_prompt(model.config, length)] * rows, cache)
        peak = torch.cuda.max_memory_allocated() - before
        yield f"activations of {rows} rows of {length:,} tokens", peak / 1e9, "GB"
        del cache


def moe(setup: Setup) -> Iterator[Figure]:
    """A mixture of experts: its decode steps, also of more rows than copies of weights serve, and its prefill."""
    args = setup.bench_options("qwen3-30b-a3b", "2048")
    model = setup.warm(args)
    for rows in (1, *BATCHES):
        for what, value, unit in _step(setup, model, f"captured, {rows} rows", model._stages(rows), rows):
            if "MBU" not in what:  # which counts all experts
                yield f"experts: {what}", value, unit
    row = measure_prefill(model, {PRUNED: parse_plan(PRUNED, model)}, [], args)[2048]
    yield "experts: prefill of 2,048 tokens", row["ttft_s"]["median"] * 1e3, "ms"
    yield "experts: speedup at 2,048 tokens", row["plans"][PRUNED]["speedup"]["median"], ""


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
    for_each = (counts[40] - counts[20]) / 20
    yield "waits for each token of generate", for_each, ""
    if for_each > 1:
        setup.slow.append("`generate` waits more than once for each token")


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
    # Without the runtime's calls on the host, such as cudaLaunchKernel.
    on_device = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    counts = Counter({event.key: event.count for event in on_device})
    if not counts:
        raise RuntimeError("the profiler recorded no kernels; the container may lack the permission")
    slow = sum(count for name, count in counts.items() if SLOW.search(name))
    yield "kernels of sgemm or cuDNN", f"{slow} of {counts.total()}" if slow else "none", ""
    if slow:
        setup.slow.append("kernels that multiply in float32, or cuDNN's")
    for name, count in counts.most_common(12):
        yield f"launches of {name[:80]}", count, ""


def tests(setup: Setup) -> Iterator[Figure]:
    """The tests on the GPU."""
    command = [sys.executable, "-m", "pytest", "-n", "4", "-m", "cuda", "tests/test_cuda.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip()
    last = (done.stdout.strip() or said).splitlines()[-1]
    if done.returncode or " passed" not in last:  # a run in which all tests are skipped has the status 0
        print(said[-8000:], file=sys.stderr)
        raise RuntimeError(last)
    yield "pytest -m cuda", last, ""


# In the order of what a wrong result would make the next ones worthless.
ALL = (
    rates, paths, attention, tests, decode, prefill, cold, waits, kernels, products,
    calibrated, long, batches, memory, small, moe, pdl, fa3, fp8,
)  # fmt: skip
PARTS = {part.__name__: part for part in ALL}
