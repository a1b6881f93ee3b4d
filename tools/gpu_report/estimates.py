"""Estimates for one H100, and a model in the shape of Llama-3.1-8B in bfloat16. They follow from shapes and rates.

Nothing here is measured. Times of prefills and decode steps follow from one utilisation (MFU, MBU) each, so they agree
with each other: seconds = FLOPs / (MFU x FLOPs per second) = bytes / (MBU x bytes per second).
"""

from __future__ import annotations

import dataclasses

import torch

import pop
from pop.calibration.search import last_and_selected
from pop.pruning import cost
from pop.pruning.corrections import Corrections
from pop.pruning.sketch import SKETCH_SIZE
from tools.bench.roofline import Machine, speedup_limit
from tools.bench.shapes import decode_bytes
from tools.bench.subject import _read_shape

SHAPE = "llama3.1-8b"
FLOPS = 798e12  # per second, of a large matrix product
BYTES = 3.0e12  # per second
MFU = {512: (0.45, 0.55), 2048: (0.65, 0.71), 8192: (0.69, 0.74), 32_000: (0.60, 0.67)}  # by tokens of a prompt
MBU = {"uncaptured": (0.50, 0.65), "captured": (0.72, 0.78)}
POSITION = 1000  # of the decode step
COLD = (611, 1203, 2222, 5003)  # prompt lengths that no other part uses

# Speedups of 10 of 32 pruned layers. The limits are those of tools/bench/roofline.py at these rates.
SPEEDUPS = {512: "at most 1.15", 2048: "1.33 to 1.35", 8192: "1.39 to 1.41", 32_000: "1.41 to 1.43"}

# What the code is to reach, by the name of a figure. Prefills are the whole model's, and vLLM's are on the same card.
TARGETS = {
    "MBU, captured": "0.80 or more",
    "speedup at 2,048 tokens": "1.34 or more",
    "speedup at 8,192 tokens": "1.39 or more",
    "prefill of 2,048 tokens": "1.05 x vLLM's, or less",
    "prefill of 8,192 tokens": "1.05 x vLLM's, or less",
    "pytest -m cuda": "all pass",
}


def estimates(of_model: bool = True) -> dict[str, str]:
    """By the name of a figure: of the device and, unless another model is measured, of the model."""
    found = {
        "matrix product": f"{FLOPS / 1e12:.0f} TFLOP/s",
        "memory": f"{BYTES / 1e12:.1f} TB/s",
        "attention of one token, 32,768 keys: pop": "52 us",
        "attention of one token, 32,768 keys: flash": "55 us",
        "attention of one token, 32,768 keys: torch's choice": "250 to 700 us",
        "attention of a prompt of 32,000 tokens: FA2": "355 to 410 TFLOP/s",
        "attention of a prompt of 32,000 tokens: FA3": "600 to 620 TFLOP/s",
        "matrix 4,096 x 4,096 and one token: cuBLAS": "2.2 TB/s",
        "matrix 4,096 x 4,096 and one token: Inductor": "2.6 TB/s",
        "matrix 28,672 x 4,096 and one token: cuBLAS": "2.8 TB/s",
        "matrix 28,672 x 4,096 and one token: Inductor": "2.8 TB/s",
        "product in fp8 / in bfloat16": "1.6 to 1.8",
        "waits for each token of generate": "1",
        "kernels of sgemm or cuDNN": "none",
        "pytest -m cuda": "all pass",
    }
    for length in COLD:
        found[f"{length:,} tokens: first TTFT / second"] = "1"
    for name, (low, high) in MBU.items():
        found[f"MBU, {name}"] = f"{low} to {high}"
    if not of_model:
        return found
    config, _ = _read_shape(SHAPE)
    read = decode_bytes(config, POSITION + 25, torch.bfloat16)
    for name, (low, high) in MBU.items():
        found[f"decode step at position 1,000, {name}"] = span(1e3 * read / BYTES, low, high, "ms")
    for length, (low, high) in MFU.items():
        work = cost.prefill_flops(config, length, pop.PrunePlan.none())
        found[f"prefill of {length:,} tokens"] = span(1e3 * work / FLOPS, low, high, "ms")
        found[f"MFU at {length:,} tokens"] = f"{low} to {high}"
        found[f"speedup at {length:,} tokens"] = SPEEDUPS[length]
        for name, plan in calibrated_plans(config, 10).items():
            limit = speedup_limit(config, length, plan, Machine(FLOPS, BYTES))
            found[f"speedup at {length:,} tokens, {name}"] = f"at most {limit:.2f}"
    return found


def calibrated_plans(config, count: int) -> dict[str, pop.PrunePlan]:
    """Plans as `pop calibrate` makes them, for the deepest `count` layers. The corrections are all zeros."""
    layers = tuple(range(config.num_layers - count, config.num_layers))
    rank = config.hidden_size // 2
    zero = torch.zeros(1)
    corrections = Corrections(
        layers,
        weight=zero.expand(count, 2, config.num_kv_heads * config.head_dim, rank),
        shared=zero.expand(1, rank, 2 * config.hidden_size),
        update=None,
        sketch=torch.zeros(count, 2, SKETCH_SIZE),
    )
    last, selected = last_and_selected()
    plan = pop.PrunePlan(layers, full_depth_last=last, full_depth_first=1, corrections=corrections)
    selecting = dataclasses.replace(plan, full_depth_selected=selected)
    return {"calibrated": plan, "calibrated, with selection": selecting}


def span(least: float, low: float, high: float, unit: str) -> str:
    """The times at two utilisations, given the time at full utilisation."""
    shortest, longest = (float(f"{least / utilisation:.3g}") for utilisation in (high, low))
    return f"{shortest:,g} to {longest:,g} {unit}"
