"""`pop.calibrate`: from texts to a plan with corrections.

Some windows of the texts are held out. The others give the closed form (refit.py), and train it further if steps of
distillation are asked for (distill.py). The held-out windows choose lambda and the best steps (held_out.py).
"""

import dataclasses
import hashlib
import os
import random
from collections.abc import Callable, Iterable, Sequence

import torch

from pop.calibration.distill import distill
from pop.calibration.held_out import Judge
from pop.calibration.passes import check_gradients, working_copy
from pop.calibration.refit import Fit, accumulate
from pop.calibration.resume import SavedProgress
from pop.calibration.texts import SHORTEST, Window, batches, builtin_texts, text_windows
from pop.engine.compile import SMALLEST
from pop.engine.modes import no_autocast
from pop.errors import InputError, PlanError, UnsupportedError, check_count
from pop.generation.sampling import check_finite
from pop.model import Model
from pop.pruning.plan import PrunePlan
from pop.system import __version__
from pop.system.progress import progress_bar

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # candidates for lambda
MIDDLE = 2  # the candidate that is tried first, and that groups with an update of h take
LENGTHS = (512, 2048, 8192)  # prompt lengths for which a plan records its speedup


@no_autocast()
@torch.no_grad()
def calibrate(
    model: Model,
    texts: Sequence[str | Sequence[int]] | None,
    plan: PrunePlan,
    *,
    images=None,
    videos=None,
    rank: int | None = None,
    window: int = 1024,
    held_out: int = 8,
    steps: int = 0,
    resume: str | os.PathLike | None = None,
    seed: int = 0,
    progress: bool = True,
) -> PrunePlan:
    """Fit corrections of the pruned layers' K and V to texts, and updates of h after groups that kept layers follow.

    Args:
        model: A pop.Model.
        texts: Strings or lists of token ids that resemble the prompts to come. Some 50,000 tokens suffice; a wide model
            needs more. None takes a small built-in set of English and Python.
        plan: A PrunePlan, or another value of `prune` in `load`.
        images, videos: A list for each text, as in `Model.generate`. All are in memory at the same time.
        rank: The size of the code that the layers of a group share, from 1 to twice the model's width. A smaller rank
            is faster and less exact. None: half of the model's width.
        window: The tokens of a window, ideally as many as in a typical prompt. Texts with images stay whole.
        held_out: The number of windows, at most a fifth of all, that choose lambda but are not fitted. A plan is judged
            by the 128 tokens after their first 256, or after their last image, and by a passage of these 256 that is
            repeated after them.
        steps: Steps of distillation after the closed form, such as 150. 0: none.
        resume: A file that keeps the unfinished work of these steps. If it exists, they continue from it.
        seed: Decides which windows are held out, and what the steps train on.
        progress: Show a bar on stderr, if tqdm is installed.

    Returns:
        The plan with corrections, and with a full_depth_first of at least 1. It has no corrections if plain pruning is
        better on the held-out windows. Its `about` records the model, the texts, the options and the loss on held-out
        windows.

    Raises:
        InputError: The texts are too short, or an option is out of range.
        PlanError: The plan does not fit the model, or prunes nothing.
        UnsupportedError: Several processes share the model, and steps is not 0.
    """
    if not isinstance(model, Model):
        raise InputError(f"the model is a {type(model).__name__}; load one with pop.load")
    plan = _plain(model, plan)
    width = model.config.hidden_size
    rank = max(1, width // 2) if rank is None else check_count("rank", rank, most=2 * width)
    seed = check_count("seed", seed, least=-(2**63), most=2**63 - 1)
    window = min(check_count("window", window, least=SHORTEST), model.max_seq_len)
    held_out = check_count("held_out", held_out)
    steps = check_count("steps", steps, least=0)
    _check_distillation(model, steps, resume)
    texts = _listed(texts)

    windows = text_windows(model, texts, images, videos, window)
    if len(windows) < 2:
        needed = f"calibration needs two windows of {SHORTEST} to {window} tokens, but the texts have {len(windows)}"
        raise InputError(f"{needed}; give several texts, {window + SHORTEST} tokens in one text, or a smaller window")
    random.Random(seed).shuffle(windows)
    held_out = min(held_out, max(1, len(windows) // 5))
    judged = windows[:held_out]
    windows = windows[held_out:]
    num_tokens = sum(len(tokens) for tokens, _ in windows)
    about = {
        "texts": len(texts),
        "windows": len(windows),
        "held_out": held_out,
        "window": window,
        "tokens": num_tokens,
        "rank": rank,
        "steps": steps,
        "seed": seed,
    }
    saved = None
    if resume is not None:
        saved = SavedProgress(resume, _settings(model, plan, [windows, judged], about))
        saved.check()
    fit = Fit(model, plan, rank)
    with progress_bar("calibrating", len(fit.groups) * num_tokens, "tokens", progress) as step:
        _fit(model, windows, fit, step)
    judge = Judge(model, judged)
    plan = _choose(fit, judge, steps == 0)
    if steps:
        with progress_bar("distilling", steps, "steps", progress) as step:
            plan = distill(model, plan, windows, judge, steps, seed=seed, saved=saved, progress=step)
    return _recorded(model, plan, judge, about)


def _plain(model, plan) -> PrunePlan:
    """The plan to calibrate, without corrections."""
    plan = PrunePlan.of(plan, model.config.num_layers)
    if not plan.layers:
        raise PlanError("the plan prunes no layers, so there is nothing to calibrate; give its layers")
    return dataclasses.replace(plan, full_depth_first=max(1, plan.full_depth_first), corrections=None, name="")


def _check_distillation(model, steps: int, resume) -> None:
    if not steps and resume is not None:
        raise InputError("resume keeps unfinished steps of distillation, but steps is 0; give their number")
    if steps and model.part is not None:
        raise UnsupportedError(f"steps is {steps}, but distillation works in one process only; give 0, or one process")
    if steps:
        check_gradients(model)


def _settings(model, plan: PrunePlan, texts: list[list[Window]], about: dict) -> dict[str, str]:
    """What identifies a run of distillation. texts: the windows to fit, and those that judge."""
    tokens = [[(tokens, [one.sha256 for one in media]) for tokens, media in windows] for windows in texts]
    return {
        "model": f"{hashlib.sha256(model.sketch.numpy().tobytes()).hexdigest()} {model.dtype} {model.max_seq_len}",
        "plan": f"{plan.fields()} {about['rank']}",
        "texts": hashlib.sha256(repr(tokens).encode()).hexdigest(),
        "steps": str(about["steps"]),
        "seed": str(about["seed"]),
    }


def _listed(texts) -> list:
    if texts is None:
        return builtin_texts()
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise InputError(f"texts is a {type(texts).__name__}; give a list of strings or of lists of token ids")
    return list(texts)


def _fit(model, windows: list[Window], fit: Fit, step: Callable[[int], object]) -> None:
    """Pass over the windows, once for each group of pruned layers."""
    # Passes in bfloat16 leave the loss as it is. A small model, or a part of one, need not be copied.
    is_copied = model.num_parameters >= SMALLEST and model.part is None
    module = working_copy(model) if is_copied else model.module
    for _ in fit.groups:
        fit.begin()
        for batch in batches(windows):
            accumulate(model, batch, fit, module)
            step(sum(len(tokens) for tokens, _ in batch))
        if not fit.count:
            raise InputError("full_depth_first leaves no token to fit to; make it smaller, or give longer texts")
        fit.finish(RIDGES[MIDDLE])


def _choose(fit: Fit, judge: Judge, may_be_plain: bool) -> PrunePlan:
    """Choose lambda by the held-out windows. Return the plan without corrections if that is better still.

    The loss has one valley over lambda. So walk from the middle to both sides, as long as the loss falls. Distillation
    does not start from plain pruning, where there is nothing to improve.
    """

    def loss(plan: PrunePlan) -> float:
        found = judge.losses(plan).mean
        check_finite(torch.tensor(found), "predictions on the texts")
        return found

    best = fit.calibrated(RIDGES[MIDDLE])
    least = loss(best)
    directions = (RIDGES[:MIDDLE][::-1], RIDGES[MIDDLE + 1 :]) if fit.last_group_is_open else ()
    for ridges in directions:
        for ridge in ridges:
            plan = fit.calibrated(ridge)
            found = loss(plan)
            if found >= least:
                break
            best = plan
            least = found
    if may_be_plain and loss(fit.plan) < least:
        return fit.plan
    return best


def _recorded(model, plan: PrunePlan, judge: Judge, about: dict) -> PrunePlan:
    """The plan with a record of how it was made, its loss on the windows that chose it, and the speedups it allows."""
    loss = {name: max(0.0, round(value, 6)) for name, value in judge.losses(plan)._asdict().items()}
    lengths = sorted({min(length, model.config.max_positions) for length in LENGTHS})
    limits = {f"{length} tokens": round(plan.speedup(model, length), 3) for length in lengths}
    record = {"model": model.name, "version": __version__, **about}
    record |= {"full_depth_last": plan.full_depth_last, "loss": loss, "speedup_limit": limits}
    return dataclasses.replace(plan, about=record)
