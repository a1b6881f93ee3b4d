"""From the options --prune and --baselines to contenders."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import pop
from pop.calibration.refit import builtin_texts
from pop.errors import InputError
from tools.evaluate.baselines import calibration_windows, deepest_dropped, first_kv, no_boundary, no_kv, shortgpt
from tools.evaluate.contender import Contender
from tools.evaluate.controls import constant_kv, embedding_kv
from tools.evaluate.slicegpt import slicegpt

# Each takes a model, the fraction to cut and calibration windows (token ids, each [T]).
BASELINES: dict[str, Callable[[pop.Model, float, list[torch.Tensor]], Contender]] = {
    "shortgpt": shortgpt,
    "deepest-dropped": deepest_dropped,
    "slicegpt": slicegpt,
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
    "no-kv": "plain pruning without K and V",
    "no-boundary": "plain pruning without boundary handling",
    "first-kv": "K and V of the first token only",
    "constant-kv": "constant K and V",
    "embedding-kv": "K and V from the embedding",
}


def make_contenders(
    model: pop.Model, prunes: list[str], baselines: list[str], *, fraction=0.25, calibration=None, taps=2, seed=0
) -> list[Contender]:
    """The full model, then one contender for each value of --prune and --baselines.

    Args:
        model: the full model.
        prunes: values of --prune, [calibrated:] PLAN [:LAST [:SHARE [:LAYER]]]; "none" adds nothing.
        baselines: values of --baselines, NAME or NAME:FRACTION.
        fraction: the default fraction of baselines.
        calibration: texts for calibration and baselines. None takes the built-in ones.
        taps: inputs of calibrated projections, 1 or 2.
        seed: the seed of the calibration.
    """
    contenders = [Contender("full", model, pop.PrunePlan.none())]
    prunes = [prune for prune in prunes if prune != "none"]
    contenders += [_plan_contender(model, prune) for prune in prunes]
    pairs = zip(contenders[1:], prunes, strict=True)
    if waiting := [contender for contender, prune in pairs if prune.startswith("calibrated:")]:
        plans = pop.calibrate(model, calibration, [contender.plan for contender in waiting], taps=taps, seed=seed)
        for contender, plan in zip(waiting, plans, strict=True):
            contender.plan = plan
    for baseline in baselines:
        name, _, share = baseline.partition(":")
        if name not in BASELINES:
            raise InputError(f"--baselines holds {name!r}; it knows {', '.join(BASELINES)}")
        try:
            share = float(share) if share else fraction
        except ValueError:
            raise InputError(f"--baselines holds {baseline!r}; write NAME or NAME:FRACTION") from None
        most = {"most": sys.maxsize} if name in FITTED else {}
        contender = BASELINES[name](model, share, calibration_windows(model, calibration or builtin_texts(), **most))
        method = f"{TITLES[name]}, {100 * share:.0f} %"
        contenders.append(dataclasses.replace(contender, name=f"{name} {share:g}", method=method))
    names = [contender.name for contender in contenders]
    if len(set(names)) < len(names):
        raise InputError(f"two contenders have the same name, of {', '.join(names)}; leave one out, or rename its file")
    return contenders


def _plan_contender(model: pop.Model, prune: str) -> Contender:
    """The contender of one --prune value. One that is to be calibrated still has its plain plan."""
    pattern = r"(calibrated:)?(.*?)(?::(\d+)(?::(\d+(?:\.\d+)?)(?::(\d+))?)?)?"
    calibrated, what, last, share, layer = re.fullmatch(pattern, prune, re.S).groups()
    plan = model.resolve(what)
    name = f"calibrated {Path(what).name}" if calibrated else Path(what).name
    method = "calibrated" if calibrated or plan.corrections else "plain pruning, the paper's method"
    method = "distilled" if plan.about.get("steps") and not calibrated else method
    if last:
        plan, name = dataclasses.replace(plan, full_depth_last=int(last)), f"{name} w={int(last)}"
    if share:
        plan, name = dataclasses.replace(plan, full_depth_selected=float(share)), f"{name} s={float(share):g}"
    if layer:
        plan, name = dataclasses.replace(plan, selecting_layer=int(layer)), f"{name} at {int(layer)}"
    if plan.full_depth_selected:
        method += f", {100 * plan.full_depth_selected:g} % of the tokens selected"
    if plan.full_depth_last > 1:
        method += f", last {plan.full_depth_last} tokens at full depth"
    return Contender(name, model, plan, method)
