"""Calibration: refit the K and V projections of pruned layers in closed form.

A pruned layer projects K and V from an earlier state than its weights were trained on. Much of the resulting error is
linear. Ridge regression toward the layer's own projection W0 removes it:

    min_W  sum_t |y_t - b0 - W x_t|^2 + lambda n |W - W0|^2
    W = W0 + d D,   D = R' X (X' X + lambda n I)^-1,   R = Y - b0 - X W0',   d = 1

x_t is the normalised state of token t, and y_t the full model's K or V of it. Held-out windows choose lambda and the
damping d. If kept layers follow a group of pruned ones, the same regression also predicts what the group would have
added to h. README.md in this folder derives this.
"""

import dataclasses
import functools
import os
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from itertools import islice, product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from pop.calibration.distill import check_gradients, distill, working_copy
from pop.calibration.held_out import JUDGED, PASSAGE, Judge, Window
from pop.engine.compile import SMALLEST
from pop.errors import InputError, PlanError, UnsupportedError, check_count
from pop.generation.sampling import check_finite
from pop.model import Model
from pop.pruning.corrections import Corrections
from pop.pruning.plan import PrunePlan
from pop.system import __version__
from pop.system.progress import progress_bar

RIDGES = (1e-2, 1e-1, 1.0)  # candidates for lambda
DAMPINGS = (1.0, 0.85)  # candidates for d, of V only: damping K gains nothing
TRIALS = len(RIDGES) + len(DAMPINGS)  # the most settings (lambda, dampings) that are tried for a plan
SHORTEST = 16  # tokens; a shorter window is left out
TOKENS_AT_ONCE = 4096  # the most tokens in one forward pass
LENGTHS = (512, 2048, 8192)  # prompt lengths for which a plan records its speedup


@torch.no_grad()
def calibrate(
    model: Model,
    texts: Sequence[str | Sequence[int]] | None,
    plan: PrunePlan | Sequence[PrunePlan],
    *,
    images=None,
    videos=None,
    taps: int = 2,
    rank: int | None = None,
    window: int = 1024,
    held_out: int = 8,
    steps: int = 0,
    resume: str | os.PathLike | None = None,
    seed: int = 0,
    progress: bool = True,
) -> PrunePlan | list[PrunePlan]:
    """Refit the pruned layers' K and V projections to texts, and updates of h after groups that kept layers follow.

    Args:
        model: A pop.Model.
        texts: Strings or lists of token ids that resemble the prompts to come. Some 50,000 tokens suffice; a wide model
            needs more. None takes a small built-in set of English and Python.
        plan: A PrunePlan or another value of `prune` in `load`, or a list. Several plans share the passes over the
            texts, one for each group of pruned layers.
        images, videos: A list for each text, as in `Model.generate`. All are in memory at the same time.
        taps: 2 also gives the projections the previous token, and 1 does not.
        rank: Store corrections of this rank in all, such as a quarter of taps * D, for each group of pruned layers. The
            plan is smaller, and two taps cost less. None: whole projections.
        window: The tokens of a window, ideally as many as in a typical prompt. Texts with images stay whole.
        held_out: The number of windows, at most a fifth of all, that choose lambda and the damping but are not fitted.
            A plan is judged by the 128 tokens after their first 256, or after their last image, and by a passage of
            these 256 that is repeated after them.
        steps: Steps of distillation after the closed form (distill.py), such as 150. 0: none.
        resume: A file that keeps the unfinished work of these steps. If it exists, they continue from it.
        seed: Decides which windows are held out, and what the steps train on.
        progress: Show a bar on stderr, if tqdm is installed.

    Returns:
        The plan with projections, and with a full_depth_first of at least 1. For a list of plans, a list. Its `about`
        records the model, the texts, the options and the loss on held-out windows.

    Raises:
        InputError: The texts are too short, or an option is out of range.
        PlanError: A plan does not fit the model, or prunes nothing.
        UnsupportedError: Several processes share the model, and steps is not 0.
    """
    if not isinstance(model, Model):
        raise InputError(f"the model is a {type(model).__name__}; load one with pop.load")
    several = isinstance(plan, (list, tuple))
    plans = [PrunePlan.of(one, model.config.num_layers) for one in (plan if several else [plan])]
    if not plans:
        raise PlanError("the list of plans is empty; give at least one plan")
    if not all(one.layers for one in plans):
        raise PlanError("the plan prunes no layers, so there is nothing to calibrate; give its layers")
    plans = [dataclasses.replace(one, full_depth_first=max(1, one.full_depth_first), corrections=None) for one in plans]
    taps = check_count("taps", taps, least=1, most=2)
    rank = model.config.hidden_size // 2 if rank is None else rank
    if rank is not None:
        rank = check_count("rank", rank, least=1, most=taps * model.config.hidden_size)
    seed = check_count("seed", seed, least=-(2**63), most=2**63 - 1)
    window = min(check_count("window", window, least=SHORTEST), model.max_seq_len)
    held_out = check_count("held_out", held_out)
    steps = check_count("steps", steps, least=0)
    if steps and model.part is not None:
        raise UnsupportedError(f"steps is {steps}, but distillation works in one process only; give 0, or one process")
    if resume is not None and (not steps or len(plans) > 1):
        raise InputError(f"resume keeps the steps for one plan, but {steps} steps and {len(plans)} plans are given")
    if steps:
        check_gradients(model)
    if resume is not None and not (isinstance(resume, str | os.PathLike) and Path(resume).expanduser().parent.is_dir()):
        raise InputError(f"resume is {resume!r:.200}, which cannot be written; give a file in a folder that exists")
    if isinstance(texts, str) or not isinstance(texts, Iterable | None):
        raise InputError(f"texts is a {type(texts).__name__}; give a list of strings or of lists of token ids")
    texts = builtin_texts() if texts is None else list(texts)
    windows = text_windows(model, texts, images, videos, window)
    if len(windows) < 2:
        needed = f"calibration needs two windows of {SHORTEST} to {window} tokens, but the texts have {len(windows)}"
        raise InputError(f"{needed}; give several texts, {window + SHORTEST} tokens in one text, or a smaller window")
    random.Random(seed).shuffle(windows)
    held_out = min(held_out, max(1, len(windows) // 5))
    judge, windows = windows[:held_out], windows[held_out:]
    fits = [_Fit(model, one, taps, rank) for one in plans]
    # Passes in bfloat16 leave the loss as it is. A small model, or a part of one, need not be copied.
    module = working_copy(model) if model.num_parameters >= SMALLEST and model.part is None else model.module
    trial = sum(min(len(tokens), JUDGED) + PASSAGE for tokens, _ in judge)  # tokens that judging a plan runs
    passes, tokens = max(len(fit.groups) for fit in fits), sum(len(tokens) for tokens, _ in windows)
    with progress_bar("calibrating", passes * tokens + len(fits) * TRIALS * trial, "tokens", progress) as step:
        for number in range(passes):
            due = [fit for fit in fits if number < len(fit.groups)]
            for batch in _batches(windows):
                _accumulate(model, batch, due, number, module)
                step(sum(len(tokens) for tokens, _ in batch))
            if not all(fit.count for fit in fits):
                raise InputError("full_depth_first leaves no token to fit to; make it smaller, or give longer texts")
            for fit in due:
                fit.finish(number)
        del module
        loss = Judge(model, judge, plans)
        results = [_choose(fit, loss, not steps, lambda trials: step(trials * trial)) for fit in fits]
    if steps:
        with progress_bar("distilling", len(fits) * steps, "steps", progress) as step:
            results = [distill(model, result, windows, loss, steps, seed, resume, step) for result in results]
    about = {"texts": len(texts), "windows": len(windows), "held_out": held_out, "window": window, "tokens": tokens}
    results = [_recorded(model, one, loss, about | {"steps": steps, "seed": seed}) for one in results]
    return results if several else results[0]


def builtin_texts() -> list[str]:
    """The texts for texts=None: public-domain English of five kinds, and some Python of this package."""
    folder = files("pop").joinpath("data", "calibration")
    return [file.read_text(encoding="utf-8") for file in sorted(folder.iterdir(), key=lambda file: file.name)]


def text_windows(model, texts, images, videos, size: int) -> list[Window]:
    """Cut the texts into windows of at most `size` token ids. Where a text begins with BOS, so do its windows."""
    windows = []
    for text, media in zip(texts, model.vision.prepare_batch(images, videos, len(texts)), strict=True):
        if isinstance(text, int):
            raise InputError(f"texts holds {text}; give strings or lists of token ids")
        tokens = model.encode(text, "text", media=media)
        if media:
            model.check_fits(len(tokens), "a text with images", media)
            windows.append((tokens, media))
            continue
        bos = tokens[:1] if tokens[0] == model.config.bos_id else []
        step = max(1, size - len(bos))
        windows += [(bos + tokens[begin : begin + step], []) for begin in range(len(bos), len(tokens), step)]
    return [(tokens, media) for tokens, media in windows if len(tokens) >= SHORTEST]


def _batches(windows: list[Window]) -> Iterator[list[Window]]:
    """Batch windows of similar lengths, as many as TOKENS_AT_ONCE allows."""
    queue = iter(sorted(windows, key=lambda window: len(window[0]), reverse=True))
    while first := next(queue, None):
        yield [first, *islice(queue, max(0, TOKENS_AT_ONCE // len(first[0]) - 1))]


class _Solution(NamedTuple):
    """What solves the normal equations of a group of n layers, in float64. I is taps * D."""

    own: torch.Tensor  # W0 [n, 2, K * E, I]
    correction: torch.Tensor  # D of the same shape, or U [n, 2, K * E, R]
    bias: torch.Tensor  # b0 [n, 2, K * E]
    shared: torch.Tensor | None  # V [R, I]
    update: torch.Tensor | None  # A [D, I], or [D, R]


class _Fit:
    """The normal equations of one plan, by group of pruned layers.

    A later group's inputs depend on the updates of h after earlier groups. So each group needs its own pass, and sums
    exist from this pass on, until a group is solved for good.
    """

    def __init__(self, model, plan: PrunePlan, taps: int, rank: int | None = None):
        self.model, self.plan, self.taps, self.rank = model, plan, taps, rank
        self.count = 0  # n, the number of tokens
        groups = plan.groups(L := model.config.num_layers, model.module.deepstack_layers)
        self.groups = [list(group.layers) for group in groups if group.is_pruned]
        self.starts = {group[0] for group in self.groups}
        self.updated = {group[-1] for group in self.groups if group[-1] + 1 not in (*plan.layers, L)}
        if rank is not None and any(index - 1 in plan.layers for index in self.starts):
            raise PlanError(f"rank is {rank}, but DeepStack features come between {plan.layers}; prune others")
        D, KE = model.config.hidden_size, model.module.config.num_kv_heads * model.module.config.head_dim

        def sums(*shape: int) -> defaultdict[int, torch.Tensor]:
            return defaultdict(lambda: torch.zeros(shape, dtype=torch.float64, device=model.device))

        self.xx, self.x = sums(taps * D, taps * D), sums(taps * D)  # X' X, and the sum of X, by a group's first layer
        self.xy, self.xu = sums(taps * D, 2 * KE), sums(taps * D, D)  # X' Y, and X' times updates of h, by layer
        self.updates: dict[int, torch.Tensor] = {}  # A [D, taps * D], by a group's last layer
        self.solved: dict[int, _Solution] = {}  # groups whose solution others depend on, by number

    def finish(self, number: int) -> None:
        """Solve a group for good if h is updated after it."""
        group = self.groups[number]
        if (last := group[-1]) in self.updated:
            self.solved[number] = solution = self._solve(number, RIDGES[0])
            shared = solution.shared
            self.updates[last] = solution.update if shared is None else solution.update @ shared
            for sums, index in product((self.xx, self.x, self.xy, self.xu), group):
                sums.pop(index, None)

    def depth(self, number: int) -> int:
        """How many layers run to get the targets of a group: all before its last, and that one if h is updated."""
        return (last := self.groups[number][-1]) + (last in self.updated)

    def solve(self, ridge: float) -> list[_Solution]:
        """The solution of each group for lambda = ridge."""
        return [self.solved.get(number) or self._solve(number, ridge) for number in range(len(self.groups))]

    def _solve(self, number: int, ridge: float) -> _Solution:
        group, KV = self.groups[number], []
        xx, x = self.xx[group[0]], self.x[group[0]]
        for sums in (xx, *(sums[index] for sums in (self.xy, self.xu) for index in group if index in sums)):
            check_finite(sums, "hidden states of the texts")
        factor = torch.linalg.cholesky(xx + ridge * self.count * torch.eye(len(xx), dtype=xx.dtype, device=xx.device))
        for index in group:
            own, bias = self.model.module.layers[index].folded_projections()
            own = F.pad(own, (0, len(xx) - own.shape[2]))  # the layer's own projection ignores the previous token
            residual = self.xy[index] - xx @ own.flatten(0, 1).T - x[:, None] * bias.flatten()  # X' R
            KV.append((own, torch.cholesky_solve(residual, factor).T.unflatten(0, own.shape[:2]), bias))
        own, correction, bias = map(torch.stack, zip(*KV, strict=True))
        if self.model.part is not None:  # each process has fitted those of its heads
            own, correction, bias = (self.model.part.gather_heads(x) for x in (own, correction, bias))
        update = torch.cholesky_solve(self.xu[group[-1]], factor).T if group[-1] in self.updated else None
        if self.rank is None:
            return _Solution(own, correction, bias, None, update)
        rows = [correction.flatten(0, 2)] + ([] if update is None else [update])
        codes, shared = low_rank(torch.cat(rows), factor / self.count**0.5, self.rank)
        KV, *update = codes.split([len(x) for x in rows])
        return _Solution(own, KV.unflatten(0, correction.shape[:3]), bias, shared, update[0] if update else None)

    def refit(self, solutions: list[_Solution], damp_v: float | None) -> PrunePlan:
        """The plan with projections, given the damping of V. None: with the layers' own ones, as in plain pruning."""
        own, correction, bias, shared, update = zip(*solutions, strict=True)
        weight, correction, bias = torch.cat(own), torch.cat(correction), torch.cat(bias)
        if damp_v is None:  # no updates, and nothing of the previous token
            weight, others = weight[..., : self.model.config.hidden_size], {}
        else:
            correction = correction * correction.new_tensor([1.0, damp_v])[:, None, None]
            weight, bias = correction, torch.zeros_like(bias)
            others = {"shared": shared, "update": [x for x in update if x is not None]}
            others = {name: torch.stack(x) for name, x in others.items() if x and x[0] is not None}
        tensors = {"weight": weight, "bias": bias, **others}
        tensors = {name: x.to(self.model.dtype) for name, x in tensors.items()}
        corrections = Corrections(self.plan.layers, fingerprint=self.model.fingerprint, **tensors)
        return dataclasses.replace(self.plan, corrections=corrections)


def low_rank(corrections: torch.Tensor, factor: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The U [M, R] and V [R, taps * D] that minimise |(D - U V) L|², so that D x changes least on the calibration text.

    V x has a mean square of about 1.

    Args:
        corrections: D [M, taps * D], of all layers of a group.
        factor: L [taps * D, taps * D], lower triangular. L L' is the mean of x x', plus lambda.
        rank: R.
    """
    scaled = corrections @ factor
    basis = torch.linalg.eigh(scaled.T @ scaled).eigenvectors[:, -rank:]  # of the largest eigenvalues
    return scaled @ basis, torch.linalg.solve_triangular(factor, basis.T, upper=False, left=False)


def _accumulate(model, batch: list[Window], fits: list[_Fit], number: int, module=None) -> None:
    """Add the tokens of a batch of windows to the sums of group `number` of each fit.

    One full forward pass gives the targets. Beside it, each plan has a stream from its first pruned layer to this
    group, in which tokens skip the plan's layers. The first tokens run at full depth, and are not fitted to. In a pass
    of 16-bit numbers, whose products are exact in float32, the sums of one batch are float32.

    module: Runs in place of the model's own.
    """
    module = model.module if module is None else module
    lengths = torch.tensor([len(tokens) for tokens, _ in batch])
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(tokens) for tokens, _ in batch], batch_first=True)
    images = model.vision.images(module, [media for _, media in batch], tokens, lengths)
    position = torch.arange(tokens.shape[1], device=model.device)
    inside = position < lengths.to(model.device)[:, None]  # [B, T], not padding
    fitted = [inside & (position >= fit.plan.full_depth_first) for fit in fits]  # [B, T] each
    wide = torch.float32 if next(module.parameters()).dtype.itemsize == 2 else torch.float64
    # By number of the fit: h [B, T, D], the group's inputs [B, T, taps * D], and X [N, taps * D], those of some tokens.
    streams, inputs, fitted_inputs = {}, {}, {}

    def step(index, layer, h, rope, attend):
        full = layer(h, rope, attend) if any(index < fit.depth(number) for fit in fits) else h
        targets = torch.cat(layer.projected(h), dim=-1) if any(index in fit.groups[number] for fit in fits) else None
        for this, fit in enumerate(fits):
            if not fit.plan.layers[0] <= index <= fit.groups[number][-1]:
                continue
            stream = h if index == fit.plan.layers[0] else streams[this]
            if index in fit.starts:
                x = layer.normalised(stream)
                inputs[this] = torch.cat((x, F.pad(x, (0, 0, 1, -1))), dim=-1) if fit.taps == 2 else x
                if index in fit.groups[number]:
                    X = fitted_inputs[this] = inputs[this][fitted[this]].to(wide)
                    fit.xx[index] += X.T @ X
                    fit.x[index] += X.sum(0)
                    fit.count += len(X) if number == 0 else 0
            if index in fit.groups[number]:
                X = fitted_inputs[this]
                fit.xy[index] += X.T @ targets[fitted[this]].to(wide)
                if index in fit.updated:
                    fit.xu[index] += X.T @ (full - stream)[fitted[this]].to(wide)
            elif index in fit.updates:
                stream = stream + F.linear(inputs[this], fit.updates[index].to(stream.dtype))
            if index in fit.plan.layers:
                stream = torch.where((position < fit.plan.full_depth_first)[:, None], full, stream)
            else:
                stream = layer(stream, rope, attend)
            streams[this] = images.add_deepstack(stream, index)
        return full

    module.through_layers(tokens.to(model.device), images, step)


def _choose(fit: _Fit, judge: Judge, may_be_plain: bool, step) -> PrunePlan:
    """Choose lambda, then the damping of V, or plain pruning if it is better than all of them.

    Distillation cannot start from plain pruning: a step changes a matrix in proportion to its size, which is zero.
    """
    solved = {}

    def refit(ridge: float, damp_v: float | None) -> PrunePlan:
        if ridge not in solved:
            solved.clear()  # solutions are large, so only one is kept
            solved[ridge] = fit.solve(ridge)
        return fit.refit(solved[ridge], damp_v)

    @functools.cache
    def loss(*settings: float | None) -> float:
        found = judge.losses(refit(*settings)).mean
        check_finite(torch.tensor(found), "predictions on the texts")
        step(1)
        return found

    ridge = RIDGES[0]
    for larger in RIDGES[1:] if len(fit.solved) < len(fit.groups) else ():
        if loss(larger, 1.0) >= loss(ridge, 1.0):  # the loss has one valley, so stop where it rises
            break
        ridge = larger
    candidates = [(ridge, damp_v) for damp_v in DAMPINGS] + [(ridge, None)] * False
    best = min(candidates, key=lambda settings: loss(*settings))
    step(TRIALS - loss.cache_info().currsize)
    return refit(*best)


def _recorded(model, plan: PrunePlan, judge: Judge, about: dict) -> PrunePlan:
    """The plan with a record of how it was made, its loss on the windows that chose it, and the speedups it allows."""
    loss = {name: max(0.0, round(value, 6)) for name, value in judge.losses(plan)._asdict().items()}
    lengths = sorted({min(length, model.config.max_positions) for length in LENGTHS})
    limits = {f"{length} tokens": round(plan.speedup(model, length), 3) for length in lengths}
    about = {"model": model.name, "version": __version__, **about, "full_depth_last": plan.full_depth_last}
    return dataclasses.replace(plan, about=about | {"loss": loss, "speedup_limit": limits})
