"""Timing in rounds: everything that is compared takes turns, so that a drift of the machine's speed cancels.

A *turn* is a function that measures one thing once and returns its figures by name.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median

import torch

from tools.common import Countdown

Turn = Callable[[], dict[str, float]]


def run_rounds(turns: dict[tuple, Turn], runs: int, what: str) -> dict[tuple, list[float]]:
    """Run all turns once untimed, then in `runs` timed rounds, every second round in reverse order.

    Args:
        turns: the turns by key.
        runs: the number of timed rounds.
        what: what is measured, for the progress messages.

    Returns:
        {(*key, name): the values of the figure `name` of turn `key`, one for each round}.
    """
    record = defaultdict(list)
    step = Countdown(f"{what}, round (the first is not timed)", runs + 1)
    for number in range(runs + 1):
        step()
        order = list(turns.items())
        for key, turn in reversed(order) if number % 2 else order:
            for name, value in turn().items():
                if number:
                    record[(*key, name)].append(value)
    return dict(record)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "low": min(values), "high": max(values)}


def ratio(numerators: list[float], denominators: list[float], factor: float = 1.0) -> dict[str, float]:
    """The spread of factor * numerator / denominator, taken round by round.

    A slow round is slow for both sides, so this median is steadier than the ratio of two medians.
    """
    return spread([factor * n / d for n, d in zip(numerators, denominators, strict=True)])


def seconds(function: Callable, device: torch.device, times: int = 1) -> float:
    """The time of the fastest of `times` calls, each measured until the device has finished."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return min(taken)


def device_seconds(function: Callable, device: torch.device, times: int = 1) -> float:
    """Like `seconds`, but on a GPU without the time to launch a single kernel: between two events on the device."""
    if device.type != "cuda":
        return seconds(function, device, times)
    taken = []
    for _ in range(times):
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    return min(taken)
