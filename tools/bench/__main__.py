"""How fast `pop` is, against what the shapes and the machine allow, and against what else there is: one run, one table.

    python -m tools.bench --model smollm2-135m --lengths 512,1024,2048 --against transformers
    python -m tools.bench --shape llama3.1-8b --layers 16 --prune 0.3125 --prune taps1:0.5 --json r.json

--model measures a checkpoint. --shape measures random weights, built on the device, of a known shape or of a folder's
config.json; as many layers as there is memory for, or --layers. The last line of the output is one JSON object.

    TTFT        time to first token: from a prompt's token ids to the id of the first new token, without the allocation
                of the cache.
    limit       FLOPs of the full prefill / FLOPs of the pruned one, from shapes (pop/pruning/cost.py).
    efficiency  speedup / limit.
    MFU         FLOPs of the prefill / (TTFT · peak). peak: FLOPs per second of one large matrix product, in the dtype
                that this machine's products run in (on CPUs without products of 16-bit numbers: float32).
    MBU         bytes that a step of decode must read / (its time · bandwidth). bytes: all weights, of an untied
                embedding one row, and K and V of the filled slots. bandwidth: the fastest of a sum over a large matrix,
                its product with a vector, and a copy of one half of it to the other.
    flatness    TTFT per token without attention, against the shortest prompt's; attention is timed alone.
    slots       decode on a mostly empty cache of 32,768 slots against one of 2,048, at the same position.
    memory      the high-water mark of a full prefill in a process of its own, against `prefill_memory`.
    compile     model.warmup in a fresh process: cold, without any compiled code, and warm, with that of the first.
    tower       with --image, prompts begin with an image: from its pixels to its features, as a share of TTFT, and that
                over its share of the FLOPs. It is a part of TTFT and of the limit.

Whatever is compared takes turns, round by round: full and pruned prefills, decode, the machine's peak and bandwidth,
and the rivals (tools/bench/rivals.py). Every second round runs backwards, so that a drift of the machine's speed
cancels; an untimed round comes first. A ratio is the median of its values in the rounds, not the ratio of two medians:
a round that was slow was slow for both.

Plans (--prune, repeatable): default, a fraction of the layers such as 0.5, or a saved plan's file. `taps1:` or `taps2:`
before it gives it random K/V projections with one or two taps, as fast as calibrated ones; `:32` behind it runs the
last 32 tokens at full depth.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parents[2]

import pop  # noqa: E402
from pop.calibration.scores import check_plot  # noqa: E402
from pop.cli.demo import _time as time_run  # noqa: E402
from pop.cli.demo import machine  # noqa: E402
from pop.engine.cache import KVCache  # noqa: E402
from pop.errors import CacheMemoryError, InputError, PopError, check_count  # noqa: E402
from pop.models.config import DTYPES  # noqa: E402
from pop.models.layers import (  # noqa: E402
    WIDENED,
    attention_by_blocks,
    causal_attention,
    visible,
)
from pop.pruning.cost import prefill_flops, speedup_limit, vision_flops  # noqa: E402
from tools.bench import rivals as bench_rivals  # noqa: E402
from tools.bench.report import plot, report  # noqa: E402
from tools.bench.shapes import (  # noqa: E402
    BIG,
    CHUNK,
    SHAPES,
    decode_bytes,
    load_subject,
    parse_plan,
    prefill_memory,
    random_image,
    saved_bytes,
)
from tools.evaluate.report import write_whole  # noqa: E402

TASKS = ("compile", "memory", "prefill", "slots")
SLOTS = (2048, 32768)


def progress(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


# ---- Rounds ----

Turn = Callable[[], dict[str, float]]


def run_rounds(turns: dict[tuple, Turn], runs: int, what: str) -> dict[tuple, list[float]]:
    """Let `turns` take turns, `runs` rounds after an untimed one; figure `name` of turn `key` is at (*key, name)."""
    record = defaultdict(list)
    for number in range(runs + 1):
        progress(f"{what}, round {number} of {runs}" if number else f"{what}, untimed round")
        order = list(turns.items())
        for key, turn in reversed(order) if number % 2 else order:
            for name, value in turn().items():
                if number:
                    record[(*key, name)].append(value)
    return dict(record)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "low": min(values), "high": max(values)}


def ratio(numerators: list[float], denominators: list[float], factor: float = 1.0) -> dict[str, float]:
    """The spread of factor * numerator / denominator, round by round."""
    return spread([factor * n / d for n, d in zip(numerators, denominators, strict=True)])


def seconds(function: Callable, device: torch.device, times: int = 1) -> float:
    """The fastest of so many calls, until the device is done."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return min(taken)


def peak_turn(device: torch.device, dtype: torch.dtype) -> Turn:
    """FLOPs per second of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return lambda: {"flops_per_s": 2 * n**3 / seconds(lambda: a @ b, device, 3)}


def bandwidth_turn(device: torch.device) -> Turn:
    """Bytes per second of memory: reading alone, by a sum or a product, or reading half and writing half."""
    big, vector = torch.ones(2, BIG // 8 // 4096, 4096, device=device), torch.ones(4096, device=device)
    moves = (lambda: big.sum(), lambda: big.view(-1, 4096) @ vector, lambda: big[0].copy_(big[1]))
    return lambda: {"bytes_per_s": BIG / min(seconds(move, device, 3) for move in moves)}


def attention_turn(model: pop.Model, num_tokens: int) -> Turn:
    """Seconds of all layers' attention in a full prefill, chunk by chunk as in pop/engine/forward.py."""
    H, K, E = model.config.num_heads, model.config.num_kv_heads, model.config.head_dim
    q, k, v = (torch.randn(1, num_tokens, heads, E, device=model.device).to(model.dtype) for heads in (H, K, K))

    def attend():
        for begin in range(0, num_tokens, CHUNK):
            end = min(begin + CHUNK, num_tokens)
            positions = torch.arange(begin, end, device=model.device)[None]
            masks = {window: visible(positions, end, window) for window in set(model.config.windows)}
            for window in model.config.windows:
                first = 0 if window is None else max(0, begin - window + 1)
                queries, keys, values = q[:, begin:end], k[:, first:end], v[:, first:end]
                if begin == 0 and (window is None or end <= window):
                    causal_attention(queries, keys, values, E**-0.5, None)
                    continue
                span = torch.tensor([begin - first, end if window is None else window - 1, 0])
                attention_by_blocks(queries, keys, values, masks[window][..., first:], span, E**-0.5)

    return lambda: {"attention_s": seconds(attend, model.device)}


def tower_turn(model: pop.Model, prompt: list[int], images: list) -> Turn:
    """Seconds from prepared images to what the language model is given."""
    tokens, lengths = torch.tensor([prompt], device=model.device), torch.tensor([len(prompt)])
    arguments = model.module, [images], tokens, lengths, model._stages(1).vision_layer
    return lambda: {"tower_s": seconds(lambda: model.vision.images(*arguments), model.device)}


def pop_turn(
    model: pop.Model, prompt: list[int], cache: KVCache, plan: pop.PrunePlan, steps: int, images: list
) -> Turn:
    def turn():
        ttft, steps_s = time_run(model, prompt, cache, plan, steps, images)
        return {"ttft_s": ttft, "step_s": median(steps_s)} if steps else {"ttft_s": ttft}

    return turn


# ---- The measurements ----


def measure_prefill(model: pop.Model, plans: dict[str, pop.PrunePlan], rivals: list, args) -> dict[int, dict]:
    """All that is measured in rounds, by prompt length."""
    config, full = model.config, pop.PrunePlan.none()
    peak_dtype = torch.float32 if model.dtype in WIDENED and model.device.type == "cpu" else model.dtype
    peak, bandwidth = peak_turn(model.device, peak_dtype), bandwidth_turn(model.device)
    image, patches = random_image(model, args.image) if args.image else (None, [])
    images, turns = [image] if image else [], {}
    for N in args.lengths:
        prompt, cache = random_prompt(config, N, image), model.new_cache(1, N + args.decode_steps)
        turns |= {(N, "peak"): peak, (N, "bandwidth"): bandwidth, (N, "attention"): attention_turn(model, N)}
        turns |= {(N, "tower"): tower_turn(model, prompt, images)} if image else {}
        turns[N, "full"] = pop_turn(model, prompt, cache, full, args.decode_steps, images)
        turns |= {(N, name): pop_turn(model, prompt, cache, plan, 0, images) for name, plan in plans.items()}
        turns |= {(N, rival.name): rival.turn(prompt, args.decode_steps) for rival in rivals}
    with torch.no_grad():
        record = run_rounds(turns, args.runs, "prefill and decode")
    result = {}
    for N in args.lengths:
        ttft, step = record[N, "full", "ttft_s"], record[N, "full", "step_s"]
        filled = N + (args.decode_steps + 1) / 2  # slots that a step reads, on average
        work = prefill_flops(config, N, full, patches)
        read = decode_bytes(config, round(filled), model.dtype) - saved_bytes(model)
        figures = {
            "peak_flops_per_s": spread(record[N, "peak", "flops_per_s"]),
            "bandwidth_bytes_per_s": spread(record[N, "bandwidth", "bytes_per_s"]),
            "ttft_s": spread(ttft),
            "mfu": spread([work / t / p for t, p in zip(ttft, record[N, "peak", "flops_per_s"], strict=True)]),
            "attention_s": spread(record[N, "attention", "attention_s"]),
            "rest_per_token_s": spread(rest_per_token(record, N)),
            "flatness": ratio(rest_per_token(record, N), rest_per_token(record, min(args.lengths))),
            "step_s": spread(step),
            "decode_tokens_per_s": spread([1 / t for t in step]),
            "mbu": spread([read / t / b for t, b in zip(step, record[N, "bandwidth", "bytes_per_s"], strict=True)]),
            "plans": {},
            "rivals": {},
        }
        if image:
            share = vision_flops(config, patches) / work
            tower = record[N, "tower", "tower_s"]
            figures["tower"] = {"seconds": spread(tower), "share": ratio(tower, ttft), "flops_share": share}
            figures["tower"]["ratio"] = ratio(tower, ttft, 1 / share)
        for name, plan in plans.items():
            times, limit = record[N, name, "ttft_s"], speedup_limit(config, N, plan, patches)
            figures["plans"][name] = {
                "layers": len(plan.layers),
                "taps": plan.projections.taps if plan.projections else None,
                "full_depth_last": plan.full_depth_last,
                "ttft_s": spread(times),
                "speedup": ratio(ttft, times),
                "limit": limit,
                "efficiency": ratio(ttft, times, 1 / limit),
            }
        for rival in rivals:
            times, steps = record[N, rival.name, "ttft_s"], record[N, rival.name, "step_s"]
            figures["rivals"][rival.name] = {
                "ttft_s": spread(times),
                "step_s": spread(steps),
                "full_speedup": ratio(times, ttft),
                "pruned_speedup": {name: ratio(times, record[N, name, "ttft_s"]) for name in plans},
                "decode_speedup": ratio(steps, step),
            }
        result[N] = figures
    return result


def rest_per_token(record: dict, num_tokens: int) -> list[float]:
    """Seconds a token of each round's full prefill, attention's taken off."""
    pairs = zip(record[num_tokens, "full", "ttft_s"], record[num_tokens, "attention", "attention_s"], strict=True)
    return [(ttft - attention) / num_tokens for ttft, attention in pairs]


def random_prompt(config, num_tokens: int, image=None) -> list[int]:
    """So many tokens, those of an image before the text."""
    tokens = torch.randint(config.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    placeholders = {getattr(config, name, None) for name in ("image_id", "video_id")}
    tokens = [0 if token in placeholders else token for token in tokens]
    before = [token for piece in image.pieces if not isinstance(piece, str) for token in piece] if image else []
    if len(before) >= num_tokens:
        raise InputError(f"the image has {len(before)} tokens; make --lengths longer than that")
    return before + tokens[len(before) :]


def measure_slots(model: pop.Model, num_tokens: int, steps: int, runs: int) -> dict:
    """Decode behind the same prompt in a short and in a long cache."""
    prompt, turns = random_prompt(model.config, num_tokens), {}
    sizes = [max(size, num_tokens + steps) for size in SLOTS]

    def turn_of(cache: KVCache) -> Turn:
        model.prefill([prompt], cache)
        end_of_prompt = cache.point

        def turn():
            cache.point = end_of_prompt
            return {"step_s": median(seconds(lambda: int(model.decode([0], cache).argmax()), model.device)
                                     for _ in range(steps))}  # fmt: skip

        return turn

    try:
        for size in sizes:
            turns[size,] = turn_of(KVCache(model.config, 1, size, dtype=model.dtype, device=model.device))
    except CacheMemoryError as error:
        return {"slots": sizes, "position": num_tokens, "left_out": str(error)}
    short, long = run_rounds(turns, runs, "slots").values()
    steps_s = [spread(short), spread(long)]
    return {"slots": sizes, "position": num_tokens, "step_s": steps_s, "ratio": ratio(long, short)}


def measure_memory(args) -> dict:
    """The peak of a full prefill of the first length, in this process, and what it should be.

    On a CPU: the weights' bytes and what the high-water mark rises above what was in memory before the cache was there.
    Python, libraries, tokenizer and compiled code are no part of it; `process_bytes` has them.
    """
    model, N = load_subject(args).model, args.lengths[0]
    on_gpu = model.device.type == "cuda"
    if not on_gpu and sys.platform != "linux":
        raise InputError("memory is measured on GPUs and under Linux only; leave it out of --tasks")
    weights = sum(weight.nbytes for weight in model.module.parameters())
    model.warmup()
    short = min(16, N)
    model.prefill([random_prompt(model.config, short)], model.new_cache(1, short))  # libraries are read when first used
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(model.device)
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
        before = _resident("VmRSS")
    model.prefill([random_prompt(model.config, N)], model.new_cache(1, N))
    process = torch.cuda.max_memory_allocated(model.device) if on_gpu else _resident("VmHWM")
    peak = process if on_gpu else weights + process - before
    formula = prefill_memory(model.config, N, model.dtype, model.dtype in WIDENED and not on_gpu) - saved_bytes(model)
    return {"peak_bytes": peak, "formula_bytes": formula, "ratio": peak / formula, "process_bytes": process}


def _resident(name: str) -> int:
    """Bytes of this process in memory: now, VmRSS, or at most so far, VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measure_compile(args) -> dict:
    """Seconds of model.warmup in this process."""
    model = load_subject(args).model
    plans = [parse_plan(text, model) for text in args.prune]
    began = time.perf_counter()
    model.warmup(plans=plans)
    return {"seconds": time.perf_counter() - began, "compiled": model.compiled}


CHILDREN = {"memory": measure_memory, "compile": measure_compile}


def in_child(what: str, argv: list[str], folder: str, extra: tuple[str, ...] = ()) -> dict:
    """One of CHILDREN in a fresh process, with inductor's cache in `folder`.

    Its allocator gives freed memory back at once: a peak is what was in use, not what the allocator kept for later.
    """
    command = [sys.executable, "-m", "tools.bench", *argv, *extra, "--child", what]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise InputError(f"the process that measures {what} failed ({reason}); leave {what} out of --tasks")
    return json.loads(done.stdout.splitlines()[-1])


# ---- The command line ----


def run(args, argv: list[str]) -> dict:
    """All that --tasks asks for. What has a process of its own comes first: two models may not fit into memory."""
    result = {"tasks": args.tasks}
    with tempfile.TemporaryDirectory() as folder:
        if "compile" in args.tasks:
            progress("compiling, cold and warm")
            result["compile"] = {name: in_child("compile", argv, folder) for name in ("cold", "warm")}
        if "memory" in args.tasks:
            progress("measuring memory")
            result["memory"] = {N: in_child("memory", argv, folder, ("--lengths", str(N))) for N in args.lengths}
    progress("loading the model")
    subject = load_subject(args)
    model = subject.model
    model.check_fits(max(args.lengths) + args.decode_steps, "the longest of --lengths, with --decode-steps,")
    plans = {text: parse_plan(text, model) for text in args.prune}
    rivals = []
    for name in args.against:
        rivals += bench_rivals.RIVALS[name](model, subject.fields, args.gguf)
    progress("compiling")
    model.warmup(plans=list(plans.values()))
    result = {
        "model": args.model or args.shape,
        "weights": "real" if args.model else "random",
        "layers": model.config.num_layers,
        "all_layers": subject.all_layers,
        "dtype": str(model.dtype).removeprefix("torch.") + (f", {args.quantize}" if args.quantize else ""),
        "compiled": model.compiled,
        "machine": machine(model.device),
        "versions": {"pop": pop.__version__, "python": platform.python_version(), **bench_rivals.versions(rivals)},
        "runs": args.runs,
        "decode_steps": args.decode_steps,
        "image": args.image,
        **result,
    }
    if "prefill" in args.tasks:
        result["prefill"] = measure_prefill(model, plans, rivals, args)
    if "slots" in args.tasks:
        result["slots"] = measure_slots(model, min(args.lengths), args.decode_steps, args.runs)
    return result


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    try:
        check(args)
        result = CHILDREN[args.child](args) if args.child else run(args, argv)
        if not args.child:
            print(report(result))
        if args.json and not args.child:
            write_whole(args.json, (json.dumps(result, indent=2) + "\n").encode())
        if args.plot and not args.child:
            write_whole(args.plot, plot(result, check_plot(args.plot)))
        print(json.dumps(result))
        return 0
    except PopError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2


def check(args) -> None:
    """Turn lists in `args` into lists, and raise InputError for what cannot be measured."""
    args.model = args.model or (None if args.shape else "smollm2-135m")
    if args.model and args.shape:
        raise InputError("--model and --shape are both given; leave out one")
    if args.model and args.layers is not None:
        raise InputError("--layers shortens a --shape, not a --model; leave it out")
    for name in ("runs", "decode_steps", "layers"):
        if getattr(args, name) is not None:
            check_count(f"--{name.replace('_', '-')}", getattr(args, name))
    try:
        args.lengths = sorted({int(length) for length in args.lengths.split(",")})
    except ValueError:
        raise InputError(f"--lengths is {args.lengths!r}; write numbers of tokens, as in 512,1024") from None
    check_count("the shortest of --lengths", args.lengths[0])
    if args.image is not None:
        sides = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", args.image)
        if not sides:
            raise InputError(f"--image is {args.image!r}; write width and height in pixels, as in 640x480")
        args.image = tuple(map(int, sides.groups()))
        if args.against:
            raise InputError("--against compares text prompts; leave it or --image out")
    if args.quantize and args.against:
        raise InputError("--against compares the same weights; leave it or --quantize out")
    for name, known in (("tasks", TASKS), ("against", tuple(bench_rivals.RIVALS))):
        values = [value for value in getattr(args, name).split(",") if value]
        for value in values:
            if value not in known:
                raise InputError(f"--{name} holds {value!r}; it knows {', '.join(known)}")
        setattr(args, name, values)
    args.prune = args.prune or ["default", "taps1:0.5", "taps2:0.5"]
    for path in filter(None, (args.json, args.plot)):
        if os.path.isdir(path) or not os.access(Path(path).resolve().parent, os.W_OK):
            raise InputError(f"{path} cannot be written; name a file in a folder that there is")
    if args.plot:
        check_plot(args.plot)  # what is wrong is better known now than after the work
        if "prefill" not in args.tasks:
            raise InputError("--plot draws what the task prefill measures; have it in --tasks")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def option(name: str, text: str, **settings) -> None:
        parser.add_argument(name, help=text, **settings)

    option("--model", "a name that `pop models` lists, or a directory (smollm2-135m)")
    option("--shape", f"random weights of a shape: {', '.join(SHAPES)}, or a folder with a config.json")
    option("--layers", "shorten the shape to so many layers (as many as fit into memory)", type=int, metavar="N")
    option("--dtype", "default: the checkpoint's", choices=tuple(DTYPES))
    option("--device", "cpu, cuda ...; default: a GPU if there is one")
    option("--compile", "(auto)", choices=("auto", "true", "false"), default="auto")
    option("--quantize", "int8: round the weights, as pop.load does", metavar="KIND")
    option("--tasks", f"any of {','.join(TASKS)} (all)", default=",".join(TASKS), metavar="TASK,...")
    option("--lengths", "prompt lengths in tokens (512,1024,2048)", default="512,1024,2048", metavar="N,...")
    option("--image", "begin the prompts with an image of so many pixels, as in 640x480", metavar="WxH")
    option("--prune", "a plan, see above; repeatable (default, taps1:0.5, taps2:0.5)", action="append", metavar="P")
    option("--runs", "timed rounds (5)", type=int, default=5, metavar="N")
    option("--decode-steps", "steps of decode a turn (16)", type=int, default=16, metavar="N")
    option("--against", "rivals: " + ", ".join(bench_rivals.RIVALS), default="", metavar="NAME,...")
    option("--gguf", "the file that llama.cpp reads, with the same weights", metavar="FILE")
    option("--json", "also write all figures here", metavar="FILE")
    option("--plot", "also draw TTFT over prompt length: FILE.svg or FILE.png", metavar="FILE")
    parser.add_argument("--child", choices=tuple(CHILDREN), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
