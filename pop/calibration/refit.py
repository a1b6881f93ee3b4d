"""Calibration: refit the K and V projections of pruned layers in closed form.

A pruned layer l projects K and V from h_r, the state that enters its run of pruned layers, though its weights were
trained on h_l, the state one to many layers later. That is the method's error, and much of it is linear: let x_t be
h_r of token t, normalised without a weight, y_t what the full model has as l's K (or V) of that token before K's norm
and the rotary position, and W0, b0 the layer's own projection with its norm's weight folded in. Ridge regression
toward W0 over the n tokens of a calibration text,

    min_W  sum_t |y_t - b0 - W x_t|^2 + lambda n |W - W0|^2

has the solution

    W = W0 + d D,    D = R' X (X' X + lambda n I)^-1,    R = Y - b0 - X W0',    d = 1,

and is plain prefill-only pruning for lambda to infinity, or for a damping d of 0. With two taps the input is
[x_t ; x_{t-1}], and W0 is zero for the previous token's half: deep layers' K and V depend on what attention brought
from the token before, which a map of x_t alone cannot know. The first token is left out: it is the attention sink,
unlike all others, and runs at full depth in a calibrated plan.

One pass over the text gives X' X and X' Y, summed in float64; no token's states are kept. The states entering a later
run depend on the layers kept in between, but not on any refit: all that pruned tokens attend there are pruned tokens,
and the first ones at full depth. So one pass serves all runs. lambda and the dampings of K and V are then those with
the least KL(full || pruned) on held-out windows of the text.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterable, Sequence
from importlib.resources import files
from itertools import islice

import torch
import torch.nn.functional as F

from pop import engine
from pop.errors import InputError, PlanError, check_count
from pop.inputs.processors import Prepared
from pop.model import Model
from pop.progress import progress_bar
from pop.pruning.plan import PrunePlan
from pop.pruning.projections import KVProjections

RIDGES = (1e-2, 1e-1, 1.0)  # candidates for lambda
DAMPINGS = (1.0, 0.85)  # candidates for d, of V and of K
TRIALS = len(RIDGES) + 2 * (len(DAMPINGS) - 1) + 1  # of each plan: one setting after the other, and none
SHORTEST = 16  # tokens of a window; less, left over at the end of a text, is of little use
JUDGED = 384  # tokens of a held-out window that are used, at most
TOKENS_AT_ONCE = 4096  # of the calibration text in one forward pass, at most

Window = tuple[list[int], list[Prepared]]  # token ids, and the images and videos that they have places for


@torch.no_grad()
def calibrate(
    model: Model,
    texts: Sequence[str | Sequence[int]] | None,
    plan: PrunePlan | Sequence[PrunePlan],
    *,
    images=None,
    videos=None,
    taps: int = 2,
    window: int = 1024,
    held_out: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> PrunePlan | list[PrunePlan]:
    """Refit the pruned layers' K and V projections to a text. Returns the plan with its projections.

    model: a pop.Model. texts: strings or lists of token ids, like what will be prompted with: some 50,000 tokens, more
        for a wide model; None takes a small built-in set of English and Python.
    plan: a PrunePlan, or several, which share the pass over the text; then a list comes back. A plan's
        full_depth_first becomes 1 where it is 0; everything else stays.
    images, videos: a list for each text, as in `Model.generate`. All are prepared at once, and so in memory together.
    taps: 2 gives the projections the token before as a second input, at the price of a second product; 1 does not.
    window: texts are cut into windows of so many tokens; best as long as the prompts will be. One that has images or
        videos stays whole.
    held_out: windows, at most a fifth of all, that are not fitted to but choose lambda and the dampings, by what
        follows their first 256 tokens, or their last image. seed: which windows these are.
    progress: show a bar on stderr, if tqdm is installed.

    Raises InputError for texts too short to be fitted to and for options out of range, PlanError for a plan that does
    not fit the model or prunes nothing.
    """
    if not isinstance(model, Model):
        raise InputError(f"the model is a {type(model).__name__}; load one with pop.load")
    several = isinstance(plan, (list, tuple))
    plans = [_checked(model, one) for one in (plan if several else [plan])]
    if not plans:
        raise PlanError("the list of plans is empty, so there is nothing to calibrate")
    if type(taps) is not int or taps not in (1, 2):
        raise InputError(f"taps is {taps!r}; it is 1 or 2")
    if type(seed) is not int:
        raise InputError(f"seed is {seed!r}; it is an integer")
    if check_count("window", window) < SHORTEST:
        raise InputError(f"window is {window}; windows of less than {SHORTEST} tokens are not fitted to")
    held_out = check_count("held_out", held_out)
    windows = _windows(model, texts, images, videos, min(window, model.max_seq_len))
    if len(windows) < 2:
        raise InputError(
            f"texts hold less than two windows of {SHORTEST} tokens or more; give more text or a smaller window"
        )
    random.Random(seed).shuffle(windows)
    held_out = min(held_out, max(1, len(windows) // 5))
    judge, windows = windows[:held_out], windows[held_out:]
    fits = [_Fit(model, one, taps) for one in plans]
    with progress_bar("calibrating", sum(len(window) for window, _ in windows), "tokens", progress) as step:
        for batch in _batches(windows):
            _accumulate(model, batch, fits)
            step(sum(len(window) for window, _ in batch))
    if not all(fit.count for fit in fits):
        raise InputError("no token of the texts is left to fit to; give longer texts, or a smaller full_depth_first")
    tune = Judge(model, judge)
    with progress_bar("choosing lambda", len(fits) * TRIALS, "trials", progress) as step:
        results = [_choose(fit, tune, step) for fit in fits]
    return results if several else results[0]


def builtin_texts() -> list[str]:
    """What stands in for texts=None: public-domain English of five kinds, and some of this package's own Python."""
    folder = files("pop").joinpath("data", "calibration")
    return [file.read_text(encoding="utf-8") for file in sorted(folder.iterdir(), key=lambda file: file.name)]


# What goes in


def _checked(model, plan) -> PrunePlan:
    if not isinstance(plan, PrunePlan):
        raise PlanError(f"plan is {plan!r}; give a pop.PrunePlan, such as pop.PrunePlan.deepest(num_layers, 1 / 2)")
    if not plan.check(model.config.num_layers).layers:
        raise PlanError("the plan prunes nothing, so there is nothing to calibrate")
    return dataclasses.replace(plan, full_depth_first=max(1, plan.full_depth_first), projections=None)


def _windows(model, texts, images, videos, size: int) -> list[Window]:
    """The texts as token ids, in windows of at most `size`, each behind BOS where the text is."""
    if isinstance(texts, str) or not (texts is None or isinstance(texts, Iterable)):
        raise InputError(f"texts is a {type(texts).__name__}; give a list of strings or of lists of token ids")
    texts = builtin_texts() if texts is None else list(texts)
    windows = []
    for text, seen in zip(texts, model.vision.prepare_batch(images, videos, len(texts)), strict=True):
        if isinstance(text, int):
            raise InputError(f"texts holds {text}; give strings or lists of token ids")
        ids = model.encode(text, "text", seen=seen)
        if seen:
            model.check_fits(len(ids), "a text with images")
            windows.append((ids, seen))
            continue
        bos = ids[:1] if ids[0] == model.config.bos_id else []
        body = ids[len(bos) :]
        step = max(1, size - len(bos))
        windows += [(bos + body[begin : begin + step], []) for begin in range(0, len(body), step)]
    return [(ids, seen) for ids, seen in windows if len(ids) >= SHORTEST]


def _batches(windows: list[Window]):
    """Windows of about equal lengths together, as many as TOKENS_AT_ONCE allows."""
    queue = iter(sorted(windows, key=lambda window: len(window[0]), reverse=True))
    while first := next(queue, None):
        yield [first, *islice(queue, max(0, TOKENS_AT_ONCE // len(first[0]) - 1))]


# The normal equations


class _Fit:
    """The sums of one plan: for each run of pruned layers X' X, and X' Y for each layer of it."""

    def __init__(self, model, plan: PrunePlan, taps: int):
        self.model, self.plan, self.taps = model, plan, taps
        runs = plan.groups(model.config.num_layers, model.module.deepstack_layers)
        self.runs = [run for pruned, run in runs if pruned]
        device, F_in = model.device, taps * model.config.hidden_size
        KE = model.module.config.num_kv_heads * model.config.head_dim
        zeros = lambda *shape: torch.zeros(shape, dtype=torch.float64, device=device)  # noqa: E731
        self.xx = {run[0]: zeros(F_in, F_in) for run in self.runs}
        self.x = {run[0]: zeros(F_in) for run in self.runs}
        self.xy = {index: zeros(F_in, 2 * KE) for index in plan.layers}
        self.count = 0

    def solve(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """W0 [n, 2, K * E, taps * D], the correction D of the same shape, and b0 [n, 2, K * E], in float64."""
        own, corrections, biases = [], [], []
        for run in self.runs:
            xx = self.xx[run[0]]
            if not all(sums.isfinite().all() for sums in (xx, *(self.xy[index] for index in run))):
                raise InputError("the hidden states of the texts are not finite; check the weights, or the dtype")
            factor = torch.linalg.cholesky(
                xx + ridge * self.count * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
            )
            for index in run:
                weight, bias = self.model.module.layers[index].folded_projections()
                weight = F.pad(weight, (0, len(xx) - weight.shape[2]))  # the previous token's half is zero
                flat = weight.flatten(0, 1).T  # [taps * D, 2 * K * E]
                residual = self.xy[index] - xx @ flat - self.x[run[0]][:, None] * bias.flatten()
                correction = torch.cholesky_solve(residual, factor)
                own.append(weight)
                corrections.append(correction.T.unflatten(0, weight.shape[:2]))
                biases.append(bias)
        return torch.stack(own), torch.stack(corrections), torch.stack(biases)


def _accumulate(model, batch: list[Window], fits: list[_Fit]) -> None:
    """Add the tokens of a batch of windows to the sums of each fit.

    One full forward pass gives the targets, and what enters a plan's first run. Behind it each plan has a stream of
    its own, in which pruned tokens skip the plan's layers, up to the last run.
    """
    module, device = model.module, model.device
    lengths = torch.tensor([len(window) for window, _ in batch])
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(window) for window, _ in batch], batch_first=True)
    images = model.vision.images(module, [seen for _, seen in batch], tokens, lengths)
    lengths, tokens = lengths.to(device), tokens.to(device)
    position = torch.arange(tokens.shape[1], device=device)
    deepest = max(fit.plan.layers[-1] for fit in fits)  # no later layer is needed
    streams = [None for _ in fits]  # each plan's h, from its first pruned layer on; before that it is the full pass's
    inputs = [None for _ in fits]  # [N, taps * D] float64, of the group that the layer is in

    def step(index, layer, h, rope, attend):
        updated = layer(h, rope, attend) if index < deepest else h
        if index > deepest:
            return h
        targets = None
        for number, fit in enumerate(fits):
            plan = fit.plan
            if not plan.layers[0] <= index <= plan.layers[-1]:
                continue
            stream = h if index == plan.layers[0] else streams[number]
            if index in plan.layers:
                counted = (position >= plan.full_depth_first) & (position < lengths[:, None])  # [B, T]
                if index in fit.xx:
                    x = layer.normalised(stream)
                    refit = torch.cat((x, F.pad(x, (0, 0, 1, -1))), dim=-1) if fit.taps == 2 else x
                    inputs[number] = refit[counted].double()
                    fit.xx[index] += inputs[number].T @ inputs[number]
                    fit.x[index] += inputs[number].sum(0)
                if targets is None:
                    targets = torch.cat(layer.projected(h), dim=-1)  # [B, T, 2 * K * E]
                fit.xy[index] += inputs[number].T @ targets[counted].double()
                first = (position < plan.full_depth_first)[:, None]  # [T, 1]
                stream = torch.where(first, updated, stream)
            else:
                stream = layer(stream, rope, attend)
            streams[number] = images.add_deepstack(stream, index)
        return updated

    module.through_layers(tokens, images, step)
    for fit in fits:
        fit.count += int(((position >= fit.plan.full_depth_first) & (position < lengths[:, None])).sum())


# What fits best


class Judge:
    """KL(full || pruned), nats a token, over the last third of each window; what is before it is the prompt, which has
    all images."""

    def __init__(self, model, windows: list[Window]):
        self.model, self.cases = model, []
        for window, seen in windows:
            places = model.vision.locate(window, seen)
            cut = max([min(len(window), JUDGED) * 2 // 3, *(place[-1] + 1 for place in places)])
            prompt, continuation = window[:cut], window[cut : max(JUDGED, cut + JUDGED // 3)]
            full = self._log_probs(prompt, continuation, seen, PrunePlan.none())
            self.cases.append((prompt, continuation, seen, full))

    def _log_probs(self, prompt, continuation, seen, plan) -> torch.Tensor:
        """Log-probabilities [N + 1, V] at the N tokens of the continuation and at the one after."""
        cache = self.model.new_cache(1, len(prompt) + len(continuation))
        first = self.model.prefill([prompt], cache, images=[seen], plan=plan)  # [1, V]
        if not continuation:
            return first.log_softmax(-1)
        rest = engine.extend(self.model.module, torch.tensor([continuation], device=self.model.device), cache)[0]
        return torch.cat((first, rest)).log_softmax(-1)

    def __call__(self, plan: PrunePlan) -> float:
        total = count = 0
        for prompt, continuation, seen, full in self.cases:
            pruned = self._log_probs(prompt, continuation, seen, plan)
            total += F.kl_div(pruned, full, log_target=True, reduction="sum").item()
            count += len(full)
        return total / count


def _choose(fit: _Fit, judge: Judge, step) -> PrunePlan:
    """The best lambda, then the best damping of V's correction, then of K's; none at all if that is better still."""
    solutions, losses = {}, {}

    def plan(ridge: float, damp_k: float, damp_v: float) -> PrunePlan:
        if ridge not in solutions:
            solutions.clear()  # one at a time: they are large
            solutions[ridge] = fit.solve(ridge)
        own, correction, bias = solutions[ridge]
        taps = fit.taps
        if damp_k == damp_v == 0:  # plain pruning has no use for the previous token
            taps, D = 1, fit.model.config.hidden_size
            own, correction = own[..., :D], correction[..., :D]
        damping = torch.tensor([damp_k, damp_v], dtype=own.dtype, device=own.device)[:, None, None]
        dtype, fingerprint = fit.model.dtype, fit.model.fingerprint
        weight, bias = (own + damping * correction).to(dtype), bias.to(dtype)
        if fit.model.part is not None:  # each rank has fitted those of its heads
            weight, bias = (fit.model.part.gather_heads(x) for x in (weight, bias))
        refit = KVProjections(fit.plan.layers, weight, bias, fingerprint, taps)
        return dataclasses.replace(fit.plan, projections=refit)

    def loss(*settings: float) -> float:
        if settings not in losses:
            losses[settings] = judge(plan(*settings))
            if not math.isfinite(losses[settings]):
                raise InputError(
                    "the model's predictions on the texts are not finite; check the weights, or load with "
                    "dtype=torch.bfloat16 or torch.float32"
                )
            step(1)
        return losses[settings]

    ridge = RIDGES[0]
    for larger in RIDGES[1:]:  # the loss has one valley: up to where it rises
        if loss(larger, 1.0, 1.0) >= loss(ridge, 1.0, 1.0):
            step(len(RIDGES) - 1 - RIDGES.index(larger))
            break
        ridge = larger
    damp_v = min(DAMPINGS, key=lambda damp: loss(ridge, 1.0, damp))
    damp_k = min(DAMPINGS, key=lambda damp: loss(ridge, damp, damp_v))
    return plan(*min([(ridge, damp_k, damp_v), (ridge, 0.0, 0.0)], key=lambda settings: loss(*settings)))
