"""Prefill and decode in rounds, and the figures that follow from the times."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import torch

import pop
from pop.backends.cpu import WIDENED
from pop.backends.cuda_graph import CAPTURE_AT
from pop.engine.cache import KVCache
from pop.errors import CacheMemoryError
from pop.pruning import cost
from tools.bench import roofline
from tools.bench.rounds import Turn, ratio, run_rounds, seconds, spread
from tools.bench.shapes import decode_bytes
from tools.bench.subject import random_image, random_prompt
from tools.bench.tower import speedup_limit, vision_flops
from tools.bench.turns import attention_turn, bandwidth_turn, peak_turn, pop_turn, tower_turn

SLOTS = (2048, 32768)  # sizes of the two caches that `measure_slots` compares
Record = dict[tuple, list[float]]  # what `run_rounds` returns


def measure_prefill(model: pop.Model, plans: dict[str, pop.PrunePlan], rivals: list, args) -> dict[int, dict]:
    """Measure full and pruned prefills, decode and the rivals.

    Args:
        model: the model, warmed up.
        plans: the pruned prefills by name.
        rivals: configurations of other libraries, see rivals.py.
        args: lengths, decode_steps, runs and image of the command line.

    Returns:
        {prompt length: figures}, each figure that varies as {"median", "low", "high"}.
    """
    full = pop.PrunePlan.none()
    steps = args.decode_steps
    is_widened = model.dtype in WIDENED and model.device.type == "cpu"
    peak = peak_turn(model.device, torch.float32 if is_widened else model.dtype)
    bandwidth = bandwidth_turn(model.device)
    images = []
    patches = []
    if args.image:
        image, patches = random_image(model, args.image)
        images.append(image)
    turns = {}
    for N in args.lengths:
        prompt = random_prompt(model.config, N, *images)
        cache = model.new_cache(1, N + steps)
        turns[N, "peak"] = peak
        turns[N, "bandwidth"] = bandwidth
        turns[N, "attention"] = attention_turn(model, N)
        if images:
            turns[N, "tower"] = tower_turn(model, prompt, images)
        turns[N, "full"] = pop_turn(model, prompt, cache, full, steps, images)
        for name, plan in plans.items():
            turns[N, name] = pop_turn(model, prompt, cache, plan, 0, images)
        if model._stages(1).replayed_tokens >= N and not images:  # a GPU captures the prompt, and then it is faster
            for name in ("full", *plans):
                for _ in range(CAPTURE_AT):
                    turns[N, name]()
        for rival in rivals:
            turns[N, rival.name] = rival.turn(prompt, steps)
    with torch.no_grad():
        record = run_rounds(turns, args.runs, "prefill and decode")
    result = {}
    for N in args.lengths:
        figures = _full_figures(model, record, N, min(args.lengths), steps, patches)
        if images:
            figures["tower"] = _tower_figures(model, record, N, patches)
        figures["plans"] = {name: _plan_figures(model, record, N, name, plans[name], patches) for name in plans}
        figures["rivals"] = {rival.name: _rival_figures(record, N, rival.name, plans) for rival in rivals}
        result[N] = figures
    return result


def _full_figures(model: pop.Model, record: Record, N: int, shortest: int, steps: int, patches: list[int]) -> dict:
    """The full model after N tokens: its times, and how much of the machine's peak and bandwidth they reach."""
    ttft = record[N, "full", "ttft_s"]
    step = record[N, "full", "step_s"]
    peak = record[N, "peak", "flops_per_s"]
    bandwidth = record[N, "bandwidth", "bytes_per_s"]
    work = cost.prefill_flops(model.config, N, pop.PrunePlan.none()) + vision_flops(model.config, patches)
    filled = N + (steps + 1) / 2  # slots that a step reads, on average
    read = decode_bytes(model.config, round(filled), model.dtype)
    return {
        "peak_flops_per_s": spread(peak),
        "bandwidth_bytes_per_s": spread(bandwidth),
        "ttft_s": spread(ttft),
        "mfu": spread([work / t / p for t, p in zip(ttft, peak, strict=True)]),
        "attention_s": spread(record[N, "attention", "attention_s"]),
        "rest_per_token_s": spread(_rest_per_token(record, N)),
        "flatness": ratio(_rest_per_token(record, N), _rest_per_token(record, shortest)),
        "step_s": spread(step),
        "decode_tokens_per_s": spread([1 / t for t in step]),
        "mbu": spread([read / t / b for t, b in zip(step, bandwidth, strict=True)]),
    }


def _rest_per_token(record: Record, N: int) -> list[float]:
    """Seconds a token of each round's full prefill, without the time of attention."""
    pairs = zip(record[N, "full", "ttft_s"], record[N, "attention", "attention_s"], strict=True)
    return [(ttft - attention) / N for ttft, attention in pairs]


def _tower_figures(model: pop.Model, record: Record, N: int, patches: list[int]) -> dict:
    """The vision tower's share of TTFT, and the ratio of that share to its share of the FLOPs."""
    work = vision_flops(model.config, patches)
    share = work / (work + cost.prefill_flops(model.config, N, pop.PrunePlan.none()))
    tower = record[N, "tower", "tower_s"]
    ttft = record[N, "full", "ttft_s"]
    return {
        "seconds": spread(tower),
        "share": ratio(tower, ttft),
        "flops_share": share,
        "ratio": ratio(tower, ttft, 1 / share),
    }


def _plan_figures(model: pop.Model, record: Record, N: int, name: str, plan: pop.PrunePlan, patches: list[int]) -> dict:
    """A pruned prefill against the full one and against the limit."""
    ttft = record[N, "full", "ttft_s"]
    times = record[N, name, "ttft_s"]
    limit = _limit(model, record, N, plan, patches)
    return {
        "layers": len(plan.layers),
        "rank": plan.corrections.rank if plan.corrections else None,
        "full_depth_last": plan.full_depth_last,
        "full_depth_selected": plan.full_depth_selected,
        "selecting_layer": plan.selecting_layer,
        "ttft_s": spread(times),
        "speedup": ratio(ttft, times),
        "limit": limit,
        "efficiency": ratio(ttft, times, 1 / limit),
    }


def _limit(model: pop.Model, record: Record, N: int, plan: pop.PrunePlan, patches: list[int]) -> float:
    """The limit of the speedup: by FLOPs on CPUs, where nearly all of the time is arithmetic; by reads too on GPUs."""
    if model.device.type != "cuda":
        return speedup_limit(model.config, N, plan, patches)
    machine = roofline.Machine(
        flops_per_s=median(record[N, "peak", "flops_per_s"]),
        bytes_per_s=median(record[N, "bandwidth", "bytes_per_s"]),
        itemsize=model.dtype.itemsize,
        chunk_size=model.chunk_size,
    )
    return roofline.speedup_limit(model.config, N, plan, machine, patches)


def _rival_figures(record: Record, N: int, name: str, plans: dict[str, pop.PrunePlan]) -> dict:
    """Another library's times, and how many times as fast `pop` is."""
    ttft = record[N, name, "ttft_s"]
    steps = record[N, name, "step_s"]
    return {
        "ttft_s": spread(ttft),
        "step_s": spread(steps),
        "full_speedup": ratio(ttft, record[N, "full", "ttft_s"]),
        "pruned_speedup": {plan: ratio(ttft, record[N, plan, "ttft_s"]) for plan in plans},
        "decode_speedup": ratio(steps, record[N, "full", "step_s"]),
    }


def measure_cold(model: pop.Model, lengths: Sequence[int], steps: int) -> dict[int, dict]:
    """Prefill and decode at lengths that this process has not met before, and then the same again.

    Whatever is compiled or chosen for a length makes the first time slow. Each cache has its prompt's size, and
    therefore new strides.
    """
    full = pop.PrunePlan.none()
    result = {}
    for N in lengths:
        prompt = random_prompt(model.config, N)
        result[N] = {}
        for time in ("first", "second"):
            turn = pop_turn(model, prompt, model.new_cache(1, N + steps), full, steps, [])
            result[N][time] = turn()
    return result


def measure_slots(model: pop.Model, num_tokens: int, steps: int, runs: int) -> dict:
    """Decode after the same prompt in a short cache and in a long, mostly empty one."""
    prompt = random_prompt(model.config, num_tokens)
    sizes = [max(size, num_tokens + steps) for size in SLOTS]
    if sizes[0] == sizes[-1]:
        return {
            "slots": sizes,
            "position": num_tokens,
            "left_out": "prompts fill both caches; give shorter --lengths",
        }
    turns = {}

    def turn_of(cache: KVCache) -> Turn:
        model.prefill([prompt], cache)
        end_of_prompt = cache.snapshot()

        def decode_steps():
            for _ in range(steps):
                yield seconds(lambda: int(model.decode([0], cache).argmax()), model.device)

        def turn():
            cache.move_to(*end_of_prompt)
            return {"step_s": median(decode_steps())}

        return turn

    try:
        for size in sizes:
            turns[size,] = turn_of(KVCache(model.config, 1, size, dtype=model.dtype, device=model.device))
    except CacheMemoryError as error:
        return {"slots": sizes, "position": num_tokens, "left_out": str(error)}
    short, long = run_rounds(turns, runs, "slots").values()
    steps_s = [spread(short), spread(long)]
    return {"slots": sizes, "position": num_tokens, "step_s": steps_s, "ratio": ratio(long, short)}
