"""The time to first token of all contenders, in turn."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import numpy as np

from tools.common import Countdown, timed
from tools.evaluate.contender import Contender
from tools.evaluate.text import interval


def measure_ttft(
    contenders: list[Contender], prompt: list[int], runs: int, *, progress: Callable[[str], None] = lambda text: None
) -> dict[str, dict]:
    """Time the prefill of one prompt: `runs` rounds in turn, after an untimed one.

    The time is from the prompt's token ids to the id of the first new token, without the allocation of the cache.

    Args:
        contenders: the contenders. Speedups are over the first one.
        prompt: token ids.
        runs: the number of timed rounds.
        progress: receives a line for each round.

    Returns:
        {contender: {"seconds", "median_s", "fastest_s", "slowest_s", "speedup", "low", "high", "limit"}}. seconds are
        those of each round. speedup is the ratio of medians. low and high are its 95 % interval by resampled rounds,
        None for fewer than five. limit is the speedup that the shapes allow, or None where pop/pruning/cost.py cannot
        count.
    """
    seconds = {contender.name: [] for contender in contenders}
    step = Countdown("ttft, the first of which warms up: run", runs + 1, progress)
    for number in range(runs + 1):
        step()
        for contender in contenders:
            cache = contender.new_cache(1, len(prompt))
            ttft, _ = timed(lambda run=contender, cache=cache: int(run.prefill(prompt, cache).argmax()), int, 0)
            if number:
                seconds[contender.name].append(ttft)
    full = contenders[0]
    full_times = seconds[full.name]
    result = {}
    for contender in contenders:
        times = seconds[contender.name]
        flops = contender.flops(len(prompt))
        pairs = np.array([full_times, times]).T  # [rounds, 2]
        speedup = interval(pairs, figure=lambda medians: medians[..., 0] / medians[..., 1], mean=np.median)
        result[contender.name] = {
            "seconds": times,
            "median_s": median(times),
            "fastest_s": min(times),
            "slowest_s": max(times),
            "speedup": speedup["value"],
            "low": speedup["low"],
            "high": speedup["high"],
            "limit": None if flops is None else full.flops(len(prompt)) / flops,
        }
    return result
