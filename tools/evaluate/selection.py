"""From the options --prune and --baselines to contenders."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import pop
from pop.calibration.texts import builtin_texts
from pop.errors import InputError
from tools.common import plan_of
from tools.evaluate.attended import fastkv, snapkv
from tools.evaluate.baselines import calibration_windows, deepest_dropped, first_kv, no_boundary, no_kv, shortgpt
from tools.evaluate.contender import Contender
from tools.evaluate.controls import constant_kv, embedding_kv
from tools.evaluate.slicegpt import slicegpt

# How the fields that --prune changes are shown in a contender's name.
CHANGED = {"full_depth_last": " w=", "full_depth_selected": " s=", "selecting_layer": " at "}
# Each takes a model, the fraction to cut and calibration windows (token ids, each [T]).
BASELINES: dict[str, Callable[[pop.Model, float, list[torch.Tensor]], Contender]] = {
    "shortgpt": shortgpt,
    "deepest-dropped": deepest_dropped,
    "slicegpt": slicegpt,
    "fastkv": fastkv,
    "snapkv": snapkv,
    "no-kv": no_kv,
    "no-boundary": no_boundary,
    "first-kv": first_kv,
    "constant-kv": constant_kv,
    "embedding-kv": embedding_kv,
}
FITTED = ("constant-kv", "embedding-kv")  # to all calibration text; others need a few windows
TITLES = {
    "shortgpt": "ShortGPT",
    "deepest-dropped": "deepest layers removed",
    "slicegpt": "SliceGPT",
    "fastkv": "FastKV",
    "snapkv": "SnapKV",
    "no-kv": "plain pruning without K and V",
    "no-boundary": "plain pruning without boundary handling",
    "first-kv": "K and V of the first token only",
    "constant-kv": "constant K and V",
    "embedding-kv": "K and V from the embedding",
}


def make_contenders(
    model: pop.Model, prunes: list[str], baselines: list[str], *, fraction=0.25, calibration=None, seed=0
) -> list[Contender]:
    """The full model, then one contender for each value of --prune and --baselines.

    Args:
        model: the full model.
        prunes: values of --prune, [calibrated:] PLAN [:LAST [:SHARE [:LAYER]]]; "none" adds nothing.
        baselines: values of --baselines, NAME or NAME:FRACTION.
        fraction: the default fraction of baselines.
        calibration: texts for calibration and baselines. None takes the built-in ones.
        seed: the seed of the calibration.
    """
    prunes = [prune for prune in prunes if prune != "none"]
    pruned = [_plan_contender(model, prune) for prune in prunes]
    check_baselines(baselines)
    names = ["full", *(contender.name for contender in pruned), *baselines]
    if len(set(names)) < len(names):
        raise InputError(f"two contenders have the same name, of {', '.join(names)}; leave one out, or rename its file")
    for contender, prune in zip(pruned, prunes, strict=True):
        if prune.startswith("calibrated:"):
            contender.plan = pop.calibrate(model, calibration, contender.plan, steps=0, seed=seed)
    contenders = [Contender("full", model, pop.PrunePlan.none()), *pruned]
    return contenders + [_baseline_contender(model, baseline, fraction, calibration) for baseline in baselines]


def _plan_contender(model: pop.Model, prune: str) -> Contender:
    """The contender of one --prune value. One that is to be calibrated still has its plain plan."""
    calibrated, what, plan, changes = plan_of(prune, model, "calibrated")
    name = Path(what).name
    if calibrated:
        name = f"calibrated {name}"
    for field, value in changes.items():
        name += f"{CHANGED[field]}{value:g}"
    method = "calibrated" if calibrated else _method(plan, model.config.num_layers)
    if plan.full_depth_selected:
        method += f", {100 * plan.full_depth_selected:g} % of the tokens selected"
    if plan.full_depth_last > 1:
        method += f", last {plan.full_depth_last} tokens at full depth"
    return Contender(name, model, plan, method)


def _method(plan: pop.PrunePlan, num_layers: int) -> str:
    if plan.about.get("steps"):
        return "distilled"
    if plan.corrections:
        return "calibrated"
    deepest = range(num_layers - len(plan.layers), num_layers)
    return "plain pruning, the paper's method" if plan == pop.PrunePlan(deepest) else "plain pruning"


def check_baselines(baselines: list[str]) -> None:
    """Raise InputError unless each value of --baselines is a known name, or NAME:FRACTION."""
    for baseline in baselines:
        name, _, share = baseline.partition(":")
        if name not in BASELINES:
            raise InputError(f"--baselines holds {name!r}; it knows {', '.join(BASELINES)}")
        if share and not re.fullmatch(r"\d*\.?\d+", share):
            raise InputError(f"--baselines holds {baseline!r}; write NAME or NAME:FRACTION")


def _baseline_contender(model: pop.Model, baseline: str, fraction: float, calibration) -> Contender:
    """The contender of one --baselines value."""
    name, _, share = baseline.partition(":")
    share = float(share) if share else fraction
    most = {"most": sys.maxsize} if name in FITTED else {}
    windows = calibration_windows(model, calibration or builtin_texts(), **most)
    contender = BASELINES[name](model, share, windows)
    # In place: a subclass may have a state that a copy would lose.
    contender.name = baseline.replace(":", " ")
    contender.method = contender.method or f"{TITLES.get(name, name)}, {100 * share:.0f} %"
    return contender
